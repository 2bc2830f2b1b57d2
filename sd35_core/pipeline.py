"""Draw without a host: captions in, pictures out. For small models, training and tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint.layouts import under
from .checkpoint.loading import fill, load
from .checkpoint.tensor_file import TensorFile
from .encoders.autoencoder import TinyAutoencoder
from .encoders.text_encoder import (
    SAVED,
    ClipTextModel,
    Tokenize,
    check_encoder,
    encoder_configs,
    joined_encodings,
    padded_tokens,
)
from .network.controlnet import ControlNetEmbedder
from .network.latent import LATENT_CHANNELS, PIXELS, from_model
from .network.mmditx import MMDiTX, Twin
from .sampling.guidance import SkipLayers, away_from_skipped, guided, step_of
from .sampling.samplers import SAMPLERS, Denoise
from .sampling.schedules import make_sigmas
from .sampling.step_cache import PACES, StepCache

BATCH = 16
NO_SKIPPING = SkipLayers(frozenset(), 0, 0, 0)


@dataclass(frozen=True)
class Settings:
    """How to draw; size: (width, height) in pixels. `without` names a text encoder to leave out."""

    steps: int = 28
    cfg: float = 4.0
    shift: float = 1.0
    sampler: str = "dpmpp_2m"
    schedule: str = "simple"
    slg: SkipLayers = NO_SKIPPING
    negative: str = ""
    without: str = ""
    size: tuple[int, int] = (128, 128)
    pace: str = ""
    """Of a step cache, for each batch; none if empty."""


@dataclass(frozen=True)
class Pipeline:
    """A network with its text encoders (clip_l, clip_g) and its VAE, and CLIP's tokenizer.

    With a `control`, pictures are steered by hints.
    """

    network: MMDiTX
    encoders: Mapping[str, ClipTextModel]
    autoencoder: TinyAutoencoder
    tokenize: Tokenize
    control: ControlNetEmbedder | None = None

    @classmethod
    def load(cls, path: Path, tokenize: Tokenize) -> Pipeline:
        """From a single file, in fp32. Raises CheckpointError for a file without all the parts."""
        encoders = load_encoders(path)
        return cls(load(path, dtype=torch.float32), encoders, load_vae(path), tokenize)

    @property
    def device(self) -> torch.device:
        return self.network.x_embedder.proj.weight.device

    def encode(self, captions: list[str], without: str = "") -> tuple[Tensor, Tensor]:
        """Context (B, 77, 4096) and pooled (B, width) of the captions.

        `without` names a text encoder, clip_l or clip_g, whose output is replaced by zeros.
        """
        ids = [self.tokenize(caption) for caption in captions]
        encoded = []
        for name, encoder in self.encoders.items():
            tokens = torch.tensor(
                [padded_tokens(row, encoder.config) for row in ids], device=self.device
            )
            hidden, pooled = encoder(tokens)
            encoded.append((0 * hidden, 0 * pooled) if name == without else (hidden, pooled))
        return joined_encodings(encoded, self.network.config.context_dim)

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
        sigmas = make_sigmas(settings.steps, settings.shift, settings.schedule)
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            seeds_of_part = seeds[start : start + BATCH]
            noise = torch.cat([noise_of(seed, settings.size) for seed in seeds_of_part])
            context, y = self.encode([*part, *[settings.negative] * len(part)], settings.without)
            hint = None if hints is None else hints[start : start + BATCH].to(self.device)
            denoise = partial(self.denoised, settings=settings, sigmas=sigmas, hint=hint)
            if settings.pace:
                denoise = paced(denoise, settings, sigmas)
            inputs = {"context": context, "y": y}
            sample = SAMPLERS[settings.sampler]
            with torch.autocast(self.device.type, torch.bfloat16):
                latent = sample(denoise, noise.to(self.device), sigmas, inputs)
                pixels = self.autoencoder.decode(from_model(latent)).float().clamp(0, 1)
            pictures += (255 * pixels).round().byte().permute(0, 2, 3, 1).cpu().contiguous()
            on_done(len(pictures))
        return pictures

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


def noise_of(seed: int, size: tuple[int, int]) -> Tensor:
    """(1, 16, H / 8, W / 8), as a host makes it: on the CPU from the seed alone."""
    shape = (1, LATENT_CHANNELS, size[1] // PIXELS, size[0] // PIXELS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load_encoders(path: Path) -> dict[str, ClipTextModel]:
    """The text encoders of a small model's file, in fp32, not for training.

    Raises CheckpointError for a file without them.
    """
    file, encoders = TensorFile(path), {}
    saved = file.get(SAVED)
    for name, config in encoder_configs(file.metadata, path.name, saved).items():
        tensors = under(file, f"text_encoders.{name}.transformer.")
        check_encoder(tensors, config, f"The text encoder {name} in '{path.name}'")
        encoder = encoders[name] = ClipTextModel(config).requires_grad_(False).eval()
        fill(encoder, tensors, path.name, f"the text encoder {name}")
    return encoders


def load_vae(path: Path) -> TinyAutoencoder:
    """A VAE in TAESD's layout, from a file of its own or out of a checkpoint, in fp32.

    Raises CheckpointError for a file without one.
    """
    file = TensorFile(path)
    tensors = under(file, "first_stage_model.") or dict(file)
    vae = TinyAutoencoder().requires_grad_(False).eval()
    fill(vae, tensors, path.name, "the VAE")
    return vae
