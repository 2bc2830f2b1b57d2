"""Make the examples to train on, latents and token ids: python -m tools.nano.prepare"""

from __future__ import annotations

import argparse
import multiprocessing
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from sd35_core.checkpoint.tensor_file import write_file
from sd35_core.encoders.hints import made_hint, vae_input
from sd35_core.encoders.text_encoder import Tokenize, tokenizer
from sd35_core.network.controlnet import CONTROL_TYPES
from sd35_core.pipeline import load_vae
from sd35_core.training.dataset import Size, encoded_hint, encoded_picture, tokens_of
from tools import host

from .pictures import emoji_folder, nano_folder
from .scenes import Scene, depth_map, draw_anywhere, draw_scene, render

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
    return tokenizer(host.find_comfyui().folder / "comfy" / "sd1_tokenizer")


def pictures_of(scenes: list[Scene], first_seed: int, size: Size = SIZE) -> Tensor:
    """The scenes as (B, 3, H, W) in 0..255, uint8; scene i is moved by seed first_seed + i."""
    folder = emoji_folder()
    drawn = [
        numpy.array(render(scene, folder, size, first_seed + i)) for i, scene in enumerate(scenes)
    ]
    return torch.from_numpy(numpy.stack(drawn)).permute(0, 3, 1, 2)


def hints_of(scenes: list[Scene], pictures: Tensor, first_seed: int, kind: str) -> Tensor:
    """What the VAE sees of the scenes' hints, (B, H, W, 3); depth is the scenes' own."""
    maps = pictures.permute(0, 2, 3, 1).float() / 255
    if kind == "depth":
        size, folder = (pictures.shape[3], pictures.shape[2]), emoji_folder()
        drawn = [
            numpy.array(depth_map(scene, folder, size, first_seed + i))
            for i, scene in enumerate(scenes)
        ]
        maps = torch.from_numpy(numpy.stack(drawn))[..., None].float() / 255
    return vae_input(made_hint(maps, kind), "2b", kind)


def batch_of(
    vae: Path, size: Size, controls: bool, first_seed: int
) -> tuple[dict[str, numpy.ndarray], list[str]]:
    """Latents, if asked those of hints too, and captions; runs in a process of its own."""
    torch.set_num_threads(1)
    scenes = [draw_scene(seed) for seed in range(first_seed, first_seed + BATCH)]
    if controls:
        scenes[::2] = [draw_anywhere(first_seed + i) for i in range(0, BATCH, 2)]
    pictures = pictures_of(scenes, first_seed, size)
    found = {"latents": encoded_picture(vae_of(vae), pictures).numpy()}
    for kind in CONTROL_TYPES if controls else ():
        seen = hints_of(scenes, pictures, first_seed, kind)
        found[kind] = encoded_hint(vae_of(vae), seen).numpy()
    return found, [scene.caption for scene in scenes]


def examples(
    vae: Path,
    tokenize: Tokenize,
    count: int,
    first_seed: int = 0,
    size: Size = SIZE,
    controls: bool = False,
) -> dict[str, Tensor]:
    """What sd35_core.training reads: latents, token ids, and the ids of the empty caption."""
    parts: dict[str, list[numpy.ndarray]] = defaultdict(list)
    captions: list[str] = []
    seeds = range(first_seed, first_seed + count, BATCH)
    with multiprocessing.get_context("spawn").Pool() as pool:
        for made, words in pool.imap(partial(batch_of, vae, size, controls), seeds):
            for name, values in made.items():
                parts[name].append(values)
            captions += words
            print(f"\r{len(captions)} of {count} scenes", end="", flush=True)
    print()
    tensors = {name: torch.from_numpy(numpy.concatenate(p)) for name, p in parts.items()}
    return tensors | tokens_of(captions, tokenize)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=61_440)
    parser.add_argument("--sizes", action="store_true", help="those for the second stage instead")
    parser.add_argument("--controls", action="store_true", help="those for ControlNets instead")
    parser.add_argument("--vae", type=Path, default=nano_folder() / "vae.safetensors")
    options = parser.parse_args()
    emoji_folder()
    tokenize = clip_tokenizer()
    if options.controls:
        tensors = examples(options.vae, tokenize, 6_144, 400_000, controls=True)
        hints = {kind: tensors.pop(kind) for kind in CONTROL_TYPES}
        for kind, values in hints.items():
            write(kind, {**tensors, "hints": values}, 400_000)
    elif options.sizes:
        for (width, height), (count, seed) in MORE_SIZES.items():
            tensors = examples(options.vae, tokenize, count, seed, (width, height))
            write(f"examples_{width}x{height}", tensors, seed)
    else:
        write("examples", examples(options.vae, tokenize, options.scenes), 0)


def write(name: str, tensors: dict[str, Tensor], first_seed: int) -> None:
    """Into the cache, for training."""
    path = nano_folder() / f"{name}.safetensors"
    write_file(path, tensors, {"first_seed": first_seed})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
