"""Draw without a host: captions in, pictures out. For small models, training and tests.

    python -m sd35_core.pipeline sample RUN --prompt "a big owl" --out owl.png

RUN is the folder of a training, or a small model's file.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint.layouts import under
from .checkpoint.loading import fill, load
from .checkpoint.tensor_file import TensorFile, metadata_of
from .encoders.autoencoder import Autoencoder, PixelSpace, TinyAutoencoder
from .encoders.described import T5, Encoder, load_encoders
from .encoders.t5 import t5_rows, t5_tokenizer, with_t5
from .encoders.text_encoder import (
    KINDS,
    LENGTH,
    ClipTextModel,
    Tokenize,
    joined_encodings,
    padded_tokens,
    tokenizer,
)
from .errors import CheckpointError, SD35Error, SettingError
from .network.controlnet import ControlNetEmbedder
from .network.latent import from_model
from .network.mmditx import MMDiTX, Twin
from .sampling.guidance import SkipLayers, away_from_skipped, guided, step_of
from .sampling.samplers import SAMPLERS, Denoise
from .sampling.schedules import SCHEDULES, make_sigmas
from .sampling.step_cache import PACES, StepCache
from .whole_file import free_name, write_picture

BATCH = 16
STATE, MODEL = "state.safetensors", "model.safetensors"
"""In the folder of a training."""
NO_SKIPPING = SkipLayers(frozenset(), 0, 0, 0)


@dataclass(frozen=True)
class Settings:
    """How to draw; size: (width, height) in pixels, None for the size that the model was trained
    at. `without` names a text encoder to leave out."""

    steps: int = 28
    cfg: float = 4.0
    shift: float = 1.0
    sampler: str = "dpmpp_2m"
    schedule: str = "simple"
    slg: SkipLayers = NO_SKIPPING
    negative: str = ""
    without: str = ""
    size: tuple[int, int] | None = None
    pace: str = ""
    """Of a step cache, for each batch; none if empty."""


@dataclass(frozen=True)
class Pipeline:
    """A network with its text encoders (clip_l, clip_g, perhaps t5xxl), its VAE and tokenizers.

    With a `control`, pictures are steered by hints.
    """

    network: MMDiTX
    encoders: Mapping[str, Encoder]
    autoencoder: Autoencoder
    tokenize: Tokenize
    control: ControlNetEmbedder | None = None
    tokens: int = LENGTH
    """To how many of CLIP's a prompt is padded, as in training; a longer one stays as it is."""
    tokenize_t5: Tokenize | None = None
    size: tuple[int, int] = (128, 128)
    """Width and height that the network was trained at."""

    @classmethod
    def load(cls, path: Path, tokenize: Tokenize, tokenize_t5: Tokenize | None = None) -> Pipeline:
        """From a single file, in fp32; T5, if it is there, where its tokenizer is given.

        Raises CheckpointError for a file without all the parts.
        """
        file = TensorFile(path)
        said, encoders = description(file.metadata), load_encoders(file)
        if tokenize_t5 is None:
            encoders.pop(T5, None)
        pixels, tokens = said.get("pixels"), said.get("prompt_tokens")
        autoencoder = PixelSpace(pixels) if pixels in (1, 3) else load_vae(path)
        network = load(path, dtype=torch.float32)
        if autoencoder.channels != network.config.in_channels:
            raise CheckpointError(
                f"'{path.name}' draws {network.config.in_channels} channels, and its VAE has "
                f"{autoencoder.channels}. Use the file as it came."
            )
        tokens = tokens if type(tokens) is int and 2 <= tokens <= LENGTH else LENGTH
        return cls(
            network, encoders, autoencoder, tokenize, tokens=tokens, tokenize_t5=tokenize_t5,
            size=trained_size(said),
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.network.x_embedder.proj.weight.device

    def encode(self, captions: list[str], without: str = "") -> tuple[Tensor, Tensor]:
        """Context (B, 77, 4096), with T5 longer, and pooled (B, width) of the captions.

        `without` names a text encoder: clip_l or clip_g, whose output is replaced by zeros, or
        t5xxl, whose tokens are left out.
        """
        ids = [self.tokenize(caption) for caption in captions]
        columns = min(LENGTH, max(self.tokens, 2 + max(map(len, ids))))
        encoded = []
        for name in KINDS:
            encoder = self.encoders[name]
            assert isinstance(encoder, ClipTextModel)
            tokens = torch.tensor(
                [padded_tokens(row, encoder.config)[:columns] for row in ids],
                device=self.device,
            )
            hidden, pooled = encoder(tokens)
            encoded.append((0 * hidden, 0 * pooled) if name == without else (hidden, pooled))
        context, pooled = joined_encodings(encoded, self.network.config.context_dim)
        if T5 in self.encoders and self.tokenize_t5 is not None and without != T5:
            tokens = t5_rows(captions, self.tokenize_t5).to(self.device)
            context = with_t5(context, self.encoders[T5](tokens))
        return context, pooled

    def noise(self, seed: int, size: tuple[int, int]) -> Tensor:
        """(1, C, H, W) for a picture of so many pixels, as a host makes it: on the CPU from the
        seed alone."""
        width, height = (side // self.autoencoder.cell for side in size)
        if width < 1 or height < 1:
            raise SettingError(
                f"The size is {size[0]}x{size[1]}; the least of this model is "
                f"{self.autoencoder.cell}x{self.autoencoder.cell} pixels."
            )
        shape = (1, self.network.config.in_channels, height, width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def draw(
        self,
        captions: list[str],
        seeds: list[int],
        settings: Settings = Settings(),
        on_done: Callable[[int], object] = lambda done: None,
        hints: Tensor | None = None,
    ) -> list[Tensor]:
        """One picture (H, W, 3) uint8 per caption, from noise of its seed.

        `on_done` hears how many there are; `hints` (B, 16, H / 8, W / 8), one per caption, are on
        the model's scale.
        """
        pictures: list[Tensor] = []
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            seeds_of_part = seeds[start : start + BATCH]
            size = settings.size or self.size
            noise = torch.cat([self.noise(seed, size) for seed in seeds_of_part])
            prompts = self.encode([*part, *[settings.negative] * len(part)], settings.without)
            hint = None if hints is None else hints[start : start + BATCH].to(self.device)
            latent = self.latents(noise, *prompts, settings, hint)
            with torch.autocast(self.device.type, torch.bfloat16):
                pixels = self.autoencoder.decode(from_model(latent)).float().clamp(0, 1)
            pictures += (255 * pixels).round().byte().permute(0, 2, 3, 1).cpu().contiguous()
            on_done(len(pictures))
        return pictures

    @torch.no_grad()
    def latents(
        self,
        noise: Tensor,
        context: Tensor,
        y: Tensor,
        settings: Settings,
        hint: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Noise (B, C, H, W) drawn to latents on the model's scale; context and y hold the rows of
        the captions, then the negative ones. `on_step` hears of every step."""
        sigmas = make_sigmas(settings.steps, settings.shift, settings.schedule)
        denoise = partial(self.denoised, settings=settings, sigmas=sigmas, hint=hint)
        if settings.pace:
            denoise = paced(denoise, settings, sigmas)
        inputs = {"context": context, "y": y}
        with torch.autocast(self.device.type, torch.bfloat16):
            sample = SAMPLERS[settings.sampler]
            return sample(denoise, noise.to(self.device), sigmas, inputs, lambda _: on_step())

    def denoised(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        y: Tensor,
        settings: Settings,
        sigmas: Tensor,
        hint: Tensor | None = None,
    ) -> Tensor:
        """The guided picture; context and y hold the captions' rows, then the negative ones."""
        count, slg = len(x), settings.slg
        rows = [torch.arange(count, device=x.device)]
        if settings.cfg != 1:
            rows.append(rows[0] + count)
        active = slg.active(step_of(sigma[0], sigmas), settings.steps)
        twins = []
        if active:
            first = len(rows) * count
            twins = [Twin(first + i, slg.layers, source=i) for i in range(count)]
            rows.append(rows[0])
        which = torch.cat(rows)
        x, sigma = (tensor.repeat(len(rows), *[1] * (tensor.ndim - 1)) for tensor in (x, sigma))
        residuals: list[Tensor] = []
        if self.control is not None and hint is not None:
            hint = hint.repeat(len(rows), 1, 1, 1)
            layers = self.control(self.network, x, 1000 * sigma, y[which], hint)
            residuals = [layers[i] for i in self.control.config.spread(self.network.config.depth)]
        velocity = self.network(
            x, 1000 * sigma, context[which], y[which], residuals=residuals, twins=twins
        ).float()
        parts = list((x - sigma[:, None, None, None] * velocity).split(count))
        cond = parts[0]
        result = guided(parts[1], cond, settings.cfg) if settings.cfg != 1 else cond
        return away_from_skipped(result, cond, parts[-1], slg.scale) if active else result


def paced(denoise: Denoise, settings: Settings, sigmas: Tensor) -> Denoise:
    """The same with a step cache, for one run."""
    cache = StepCache(PACES[settings.pace], len(sigmas) - 1)

    def denoised(x: Tensor, sigma: Tensor, **inputs: Tensor) -> Tensor:
        level, step = float(sigma[0]), step_of(sigma[0], sigmas)
        acting = settings.slg.active(step, settings.steps)
        return cache.denoised(step, level, acting, lambda: denoise(x, sigma, **inputs))

    return denoised


def load_vae(path: Path) -> TinyAutoencoder:
    """A VAE in TAESD's layout, from a file of its own or out of a checkpoint, in fp32.

    Raises CheckpointError for a file without one.
    """
    file = TensorFile(path)
    tensors = under(file, "first_stage_model.") or dict(file)
    vae = TinyAutoencoder().requires_grad_(False).eval()
    fill(vae, tensors, path.name, "the VAE")
    return vae


def description(metadata: Mapping[str, str], key: str = "sd35_config") -> dict[str, Any]:
    """What a small model's file says of itself in its metadata; nothing where that is no JSON."""
    try:
        said = json.loads(metadata.get(key, "{}"))
    except (RecursionError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def draw_prompts(options: argparse.Namespace) -> Path:
    """Draw the prompts and save them, one below the other; where. Raises SD35Error, OSError."""
    from PIL import Image

    folder = options.run if options.run.is_dir() else options.run.parent
    path = options.run / MODEL if options.run.is_dir() else options.run
    said = description(metadata_of(folder / STATE), "config")
    words = options.tokenizer or said.get("tokenizer")
    if not isinstance(words, (str, Path)) or not str(words):
        raise SettingError(
            "Name a folder with CLIP's tokenizer with --tokenizer. ComfyUI has one, "
            "comfy/sd1_tokenizer."
        )
    t5 = options.tokenizer_t5 or said.get("tokenizer_t5")
    tokenize_t5 = t5_tokenizer(Path(str(t5))) if t5 else None
    pipeline = Pipeline.load(path, tokenizer(Path(words)), tokenize_t5)
    settings = Settings(
        options.steps, options.cfg, sampler=options.sampler, schedule=options.schedule,
        shift=options.shift, negative=options.negative,
        size=options.size,
    )  # fmt: skip
    seeds = [options.seed + i for i in range(len(options.prompt))]
    drawn = torch.cat(pipeline.draw(options.prompt, seeds, settings))
    out = options.out or free_name(folder / "sample.png")
    write_picture(out, Image.fromarray(drawn.numpy()), replace=False)
    return out


def trained_size(said: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height that a small model's description names, else those of a Pipeline."""
    size = said.get("size")
    if not isinstance(size, list) or len(size) != 2 or any(s not in range(1, 2049) for s in size):
        return Pipeline.size
    return int(size[0]), int(size[1])


def size_of(text: str) -> tuple[int, int]:
    """ "128x96" -> (128, 96)."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """How to draw, for command lines."""
    parser.add_argument("--size", type=size_of, metavar="WxH", help="default: as it was trained")
    parser.add_argument("--seed", type=int, default=0, help="the first picture's; then + 1 each")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--cfg", type=float, default=Settings.cfg)
    parser.add_argument("--shift", type=float, default=Settings.shift)
    parser.add_argument("--sampler", choices=list(SAMPLERS), default=Settings.sampler)
    parser.add_argument("--schedule", choices=list(SCHEDULES), default=Settings.schedule)
    parser.add_argument("--negative", default="", help="a negative prompt for all")


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m sd35_core.pipeline")
    command = parser.add_subparsers(required=True).add_parser("sample", help="draw prompts")
    command.add_argument("run", type=Path, help="the folder of a training, or a small model's file")
    command.add_argument("--prompt", action="append", required=True, help="once for each picture")
    command.add_argument("--out", type=Path, help="default: sample.png, in the folder")
    add_settings(command)
    command.add_argument("--tokenizer", type=Path, help="a folder with CLIP's; default: the run's")
    command.add_argument("--tokenizer-t5", type=Path, help="a folder with T5's, if it has one")
    options = parser.parse_args(arguments)
    log = logging.getLogger("sd35")
    try:
        log.info(f"wrote {draw_prompts(options)}")
    except (SD35Error, OSError) as error:
        log.error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
