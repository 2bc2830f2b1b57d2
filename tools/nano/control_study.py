"""Do the small ControlNets control? python -m tools.nano.control_study

Two hundred scenes that training never showed: one thing, of any size anywhere, whose caption names
neither size nor place. Each is drawn from the caption alone and with each ControlNet; the edges of
the picture are compared with those of the scene, and its centre with the scene's. Writes
models/nano/controlnet/figures.json and a sheet for each kind.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d
from tqdm import tqdm

from sd35_core.controlnet import CONTROL_TYPES, load_controlnet
from sd35_core.dataset import encoded_hint
from sd35_core.hints import CANNY_THRESHOLDS, edges
from sd35_core.latent import to_model
from sd35_core.pipeline import Pipeline, Settings

from .pictures import emoji_folder
from .prepare import clip_tokenizer, hints_of, pictures_of
from .scenes import draw_anywhere
from .scoring import MODEL, model_file

FOLDER = MODEL / "controlnet"
FIRST_SEED = 2_000_000
COUNT = 200
SHOWN = 10
NEAR = 8.0
"""Pixels within which a thing is in its place."""


def edge_map(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 1, H, W), 1 on an edge."""
    return edges(pictures.float() / 255, *CANNY_THRESHOLDS)[..., :1].permute(0, 3, 1, 2)


def edge_f1(found: Tensor, wanted: Tensor) -> float:
    """Mean F1 of edges (B, 1, H, W); a pixel beside counts as found."""

    def near(a: Tensor, b: Tensor) -> Tensor:
        """The share of a's edges that lie on or beside one of b's."""
        wide = max_pool2d(b, 3, stride=1, padding=1)
        return (a * wide).sum(dim=(1, 2, 3)) / a.sum(dim=(1, 2, 3)).clamp(min=1)

    precision, recall = near(found, wanted), near(wanted, found)
    return float((2 * precision * recall / (precision + recall).clamp(min=1e-6)).mean())


def centres(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> the centre of what differs from the picture's border, (B, 2)."""
    values = pictures.float()
    ring = torch.cat([values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1]], dim=1)
    ground = ring.median(dim=1).values[:, None, None]
    there = ((values - ground).abs().amax(dim=-1) > 40).float()
    total = there.sum(dim=(1, 2)).clamp(min=1)
    axes = [torch.arange(side, dtype=torch.float32) for side in there.shape[1:]]
    return torch.stack(
        [
            (there.sum(dim=2) * axes[0]).sum(dim=1) / total,
            (there.sum(dim=1) * axes[1]).sum(dim=1) / total,
        ],
        dim=-1,
    )


def figures(pictures: Tensor, wanted: Tensor) -> dict[str, float]:
    """How much of the scenes (B, H, W, 3) the pictures show."""
    away = (centres(pictures) - centres(wanted)).norm(dim=1)
    return {
        "edge F1": edge_f1(edge_map(pictures), edge_map(wanted)),
        "in place": float((away <= NEAR).float().mean()),
    }


def sheet(rows: list[Tensor], path: Path) -> None:
    """Rows of pictures (B, H, W, 3) uint8 under each other."""
    lines = [torch.cat(list(row[:SHOWN]), dim=1) for row in rows]
    Image.fromarray(torch.cat(lines).numpy()).save(path, quality=88)


def main() -> None:
    scenes = [draw_anywhere(FIRST_SEED + i, unseen=True) for i in range(COUNT)]
    emoji_folder()
    wanted = pictures_of(scenes, FIRST_SEED)
    shown = wanted.permute(0, 2, 3, 1).contiguous()
    pipeline = Pipeline.load(model_file(MODEL), clip_tokenizer())
    captions, seeds = [scene.caption for scene in scenes], list(range(COUNT))
    plain = torch.stack(pipeline.draw(captions, seeds))
    found = {"the prompt alone": figures(plain, shown)}
    for kind in tqdm(CONTROL_TYPES):
        seen = hints_of(scenes, wanted, FIRST_SEED, kind)
        hints = to_model(encoded_hint(pipeline.autoencoder, seen).float())
        control = load_controlnet(FOLDER / f"sd35_nano_{kind}.safetensors", dtype=torch.float32)
        steered = Pipeline(
            pipeline.network, pipeline.encoders, pipeline.autoencoder, pipeline.tokenize, control
        )
        drawn = torch.stack(steered.draw(captions, seeds, Settings(), hints=hints))
        found[kind] = figures(drawn, shown)
        looks = (255 * (seen + 1) / 2).round().byte().expand(-1, -1, -1, 3)
        sheet([looks, drawn, plain], FOLDER / f"{kind}.jpg")
    (FOLDER / "figures.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, values in found.items():
        print(name, ", ".join(f"{what} {value:.3f}" for what, value in values.items()))


if __name__ == "__main__":
    main()
