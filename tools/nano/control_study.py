"""Do the small ControlNets control? python -m tools.nano.control_study [KIND ...]

Two hundred scenes that training never showed: one thing, of any size anywhere, whose caption names
neither size nor place. Each is drawn from the caption alone and with each ControlNet; the edges of
the picture are compared with those of the scene, and its centre with the scene's. Writes
models/nano/controlnet/figures.json and a sheet for each kind.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d
from tqdm import tqdm

from sd35_core.checkpoint.controlnet import load_controlnet
from sd35_core.encoders.hints import CANNY_THRESHOLDS, edges
from sd35_core.network.controlnet import CONTROL_TYPES
from sd35_core.network.latent import to_model
from sd35_core.pipeline import Pipeline, Settings
from sd35_core.training.dataset import encoded_hint
from sd35_core.whole_file import write_picture, write_text

from .pictures import emoji_folder
from .prepare import clip_tokenizer, hints_of, pictures_of
from .scenes import draw_anywhere
from .scoring import MODEL, MODEL_FILE

FOLDER = MODEL / "controlnet"
FIRST_SEED = 2_000_000
COUNT = 200
SHOWN = 10
QUICK = Settings(steps=10, sampler="euler")
"""On this model as good as 28 steps of dpmpp_2m (web/docs/SD35Sampler.md)."""
NEAR = 8.0
"""Pixels within which a thing is in its place."""


def edge_map(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 1, H, W), 1 on an edge."""
    return edges(pictures.float() / 255, *CANNY_THRESHOLDS)[..., :1].permute(0, 3, 1, 2)


def edge_f1(found: Tensor, wanted: Tensor, reach: int) -> float:
    """Mean F1 of edges (B, 1, H, W); one within `reach` pixels counts as found."""

    def near(a: Tensor, b: Tensor) -> Tensor:
        """The share of a's edges that lie on or near one of b's."""
        wide = max_pool2d(b, 2 * reach + 1, stride=1, padding=reach)
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
    found, asked = edge_map(pictures), edge_map(wanted)
    return {
        "edge F1": edge_f1(found, asked, 0),
        "edge F1 within a pixel": edge_f1(found, asked, 1),
        "in place": float((away <= NEAR).float().mean()),
    }


def sheet(rows: list[Tensor], path: Path) -> None:
    """Rows of pictures (B, H, W, 3) uint8 under each other."""
    lines = [torch.cat(list(row[:SHOWN]), dim=1) for row in rows]
    picture = Image.fromarray(torch.cat(lines).numpy())
    write_picture(path, picture, replace=True, quality=88)


class Scenes:
    """The scenes of the study: what they show, their captions and their hints."""

    def __init__(self, count: int = COUNT, first_seed: int = FIRST_SEED):
        emoji_folder()
        self.scenes = [draw_anywhere(first_seed + i, unseen=True) for i in range(count)]
        self.first_seed = first_seed
        self.pictures = pictures_of(self.scenes, first_seed)
        self.shown = self.pictures.permute(0, 2, 3, 1).contiguous()
        self.captions = [scene.caption for scene in self.scenes]

    def seen(self, kind: str) -> Tensor:
        """What the VAE sees of the hints, (B, H, W, 3)."""
        return hints_of(self.scenes, self.pictures, self.first_seed, kind)

    def draw(
        self, pipeline: Pipeline, kind: str = "", file: Path | None = None,
        settings: Settings = QUICK,
    ) -> Tensor:  # fmt: skip
        """Their pictures from the captions, with a ControlNet if one is named, (B, H, W, 3)."""
        hints = None
        if kind:
            file = file or FOLDER / f"sd35_nano_{kind}.safetensors"
            pipeline = replace(pipeline, control=load_controlnet(file, dtype=torch.float32))
            hints = to_model(encoded_hint(pipeline.autoencoder, self.seen(kind)).float())
        seeds = list(range(len(self.scenes)))
        return torch.stack(pipeline.draw(self.captions, seeds, settings, hints=hints))


def main() -> None:
    scenes, pipeline = Scenes(), Pipeline.load(MODEL_FILE, clip_tokenizer())
    plain = scenes.draw(pipeline)
    file = FOLDER / "figures.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found["the prompt alone"] = figures(plain, scenes.shown)
    for kind in tqdm(sys.argv[1:] or CONTROL_TYPES):
        drawn = scenes.draw(pipeline, kind)
        found[kind] = figures(drawn, scenes.shown)
        looks = (255 * (scenes.seen(kind) + 1) / 2).round().byte().expand(-1, -1, -1, 3)
        sheet([looks, drawn, plain], FOLDER / f"{kind}.jpg")
    write_text(file, json.dumps(found, indent=1) + "\n", replace=True)
    for name, values in found.items():
        print(name, ", ".join(f"{what} {value:.3f}" for what, value in values.items()))


if __name__ == "__main__":
    main()
