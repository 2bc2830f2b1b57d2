"""Make the examples to train on, latents and token ids: python -m tools.nano.prepare"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from sd35_core.autoencoder import TinyAutoencoder
from sd35_core.checkpoint import write_file
from sd35_core.text_encoder import clip_g, clip_l, padded
from tools import host

from .pictures import emoji_folder, nano_folder
from .scenes import FAMILIAR, Scene, draw_scene, render

PIXELS = 128
BATCH = 64
Tokenize = Callable[[str], list[int]]


def tokenizer() -> Tokenize:
    """CLIP's byte-pair encoding, without start and end; its files come with ComfyUI."""
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer.from_pretrained(host.find().folder / "comfy" / "sd1_tokenizer")
    return lambda caption: clip(caption)["input_ids"][1:-1]


def pictures_of(scenes: list[Scene], first_seed: int) -> Tensor:
    """The scenes as (B, 3, 128, 128) in 0..255, uint8; scene i is moved by seed first_seed + i."""
    folder = emoji_folder()
    drawn = [
        numpy.array(render(scene, folder, PIXELS, first_seed + i)) for i, scene in enumerate(scenes)
    ]
    return torch.from_numpy(numpy.stack(drawn)).permute(0, 3, 1, 2)


@torch.no_grad()
def latents_of(autoencoder: TinyAutoencoder, pictures: Tensor) -> Tensor:
    """(B, 3, 128, 128) uint8 -> (B, 16, 16, 16) fp16, on the VAE's scale."""
    image = pictures.float().div(255).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        return autoencoder.encode(image).contiguous().half()


def tokens_of(captions: list[str], tokenize: Tokenize) -> dict[str, Tensor]:
    """Padded ids of both encoders, (B, 77) int32 each."""
    ids = [tokenize(caption) for caption in captions]
    configs = {"tokens_l": clip_l(1, 1, 1), "tokens_g": clip_g(1, 1, 1)}
    return {
        name: torch.tensor([padded(row, config) for row in ids], dtype=torch.int32)
        for name, config in configs.items()
    }


def examples(
    autoencoder: TinyAutoencoder, tokenize: Tokenize, count: int, first_seed: int = 0
) -> dict[str, Tensor]:
    """What sd35_core.training reads: latents, token ids, and the ids of the empty caption."""
    latents, captions = [], []
    for seed in range(first_seed, first_seed + count, BATCH):
        scenes = [draw_scene(s) for s in range(seed, min(seed + BATCH, first_seed + count))]
        latents.append(latents_of(autoencoder, pictures_of(scenes, seed)))
        captions += [scene.caption for scene in scenes]
        print(f"\r{len(captions)} of {count} scenes", end="", flush=True)
    print()
    tensors = {"latents": torch.cat(latents), **tokens_of(captions, tokenize)}
    empty = tokens_of([""], tokenize)
    return tensors | {f"{name}_empty": ids[0] for name, ids in empty.items()}


def familiar(tensors: dict[str, Tensor], first_seed: int) -> dict[str, Tensor]:
    """Those of the examples that show familiar things alone, for the second stage."""
    count = len(tensors["latents"])
    scenes = (draw_scene(seed) for seed in range(first_seed, first_seed + count))
    kept = torch.tensor([all(t.name in FAMILIAR for t in scene.things) for scene in scenes])
    return {
        name: tensor if name.endswith("_empty") else tensor[kept].clone()
        for name, tensor in tensors.items()
    }


def load_autoencoder(path: Path) -> TinyAutoencoder:
    """A trained autoencoder, ready to encode."""
    autoencoder = TinyAutoencoder()
    autoencoder.load_state_dict(load_file(path))
    autoencoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return autoencoder.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, default=nano_folder() / "vae.safetensors")
    parser.add_argument("--out", type=Path, default=nano_folder() / "examples.safetensors")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    autoencoder = load_autoencoder(options.vae)
    tensors = examples(autoencoder, tokenizer(), options.scenes, options.first_seed)
    write_file(options.out, tensors, {"scenes": options.scenes, "first_seed": options.first_seed})
    second = options.out.with_name("familiar.safetensors")
    write_file(second, familiar(tensors, options.first_seed), {"first_seed": options.first_seed})
    print(f"wrote {options.out} and {second.name}")


if __name__ == "__main__":
    main()
