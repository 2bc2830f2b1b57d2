"""Make the examples to train on, latents and token ids: python -m tools.nano.prepare"""

from __future__ import annotations

import argparse
import multiprocessing
from functools import cache, partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from sd35_core.checkpoint import write_file
from sd35_core.dataset import Size, encoded, tokens_of
from sd35_core.text_encoder import Tokenize, tokenizer
from sd35_core.training import load_vae
from tools import host

from .pictures import emoji_folder, nano_folder
from .scenes import Scene, draw_scene, render

BATCH = 64
SIZE = (128, 128)
MORE_SIZES = {
    (192, 192): (3072, 300_000), (160, 96): (2048, 310_000),
    (96, 160): (2048, 320_000), (128, 128): (6144, 330_000),
}  # fmt: skip
"""For the second stage: how many scenes of each size, and their first seed."""


vae_of = cache(load_vae)
"""A VAE by its path, loaded once in each process."""


def clip_tokenizer() -> Tokenize:
    """CLIP's, whose files come with ComfyUI."""
    return tokenizer(host.find().folder / "comfy" / "sd1_tokenizer")


def pictures_of(scenes: list[Scene], first_seed: int, size: Size = SIZE) -> Tensor:
    """The scenes as (B, 3, H, W) in 0..255, uint8; scene i is moved by seed first_seed + i."""
    folder = emoji_folder()
    drawn = [
        numpy.array(render(scene, folder, size, first_seed + i)) for i, scene in enumerate(scenes)
    ]
    return torch.from_numpy(numpy.stack(drawn)).permute(0, 3, 1, 2)


def batch_of(vae: Path, size: Size, first_seed: int) -> tuple[numpy.ndarray, list[str]]:
    """Latents and captions of BATCH scenes; runs in a process of its own."""
    torch.set_num_threads(1)
    scenes = [draw_scene(seed) for seed in range(first_seed, first_seed + BATCH)]
    latents = encoded(vae_of(vae), pictures_of(scenes, first_seed, size))
    return latents.numpy(), [scene.caption for scene in scenes]


def examples(
    vae: Path, tokenize: Tokenize, count: int, first_seed: int = 0, size: Size = SIZE
) -> dict[str, Tensor]:
    """What sd35_core.training reads: latents, token ids, and the ids of the empty caption."""
    latents, captions = [], []
    seeds = range(first_seed, first_seed + count, BATCH)
    with multiprocessing.get_context("spawn").Pool() as pool:
        for made, words in pool.imap(partial(batch_of, vae, size), seeds):
            latents.append(torch.from_numpy(made))
            captions += words
            print(f"\r{len(captions)} of {count} scenes", end="", flush=True)
    print()
    return {"latents": torch.cat(latents), **tokens_of(captions, tokenize)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=61_440)
    parser.add_argument("--sizes", action="store_true", help="those for the second stage instead")
    parser.add_argument("--vae", type=Path, default=nano_folder() / "vae.safetensors")
    options = parser.parse_args()
    emoji_folder()
    wanted = {"examples": (options.scenes, SIZE, 0)}
    if options.sizes:
        wanted = {f"examples_{s[0]}x{s[1]}": (n, s, seed) for s, (n, seed) in MORE_SIZES.items()}
    for name, (count, size, first_seed) in wanted.items():
        out = nano_folder() / f"{name}.safetensors"
        tensors = examples(options.vae, clip_tokenizer(), count, first_seed, size)
        write_file(out, tensors, {"scenes": count, "first_seed": first_seed})
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
