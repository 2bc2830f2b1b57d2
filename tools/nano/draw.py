"""Draw with the small model, without ComfyUI: its text encoders, network, sampler and VAE."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from sd35_core.autoencoder import TinyAutoencoder
from sd35_core.checkpoint import StateDict, load, read_file, under
from sd35_core.guidance import guided
from sd35_core.latent import CHANNELS, PIXELS, from_model
from sd35_core.sampling import SAMPLERS, sigmas
from sd35_core.text_encoder import ClipTextModel, clip_g, clip_l, joined, padded

from .prepare import tokenizer

SIZE = 128
BATCH = 16
KINDS = {"clip_l": clip_l, "clip_g": clip_g}


def filled(module: nn.Module, weights: StateDict) -> nn.Module:
    """The module with a file's weights, in fp32."""
    module.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    return module.requires_grad_(False).eval()


class Painter:
    """The small model, ready: captions in, pictures out."""

    def __init__(self, path: Path):
        tensors, metadata = read_file(path)
        described = json.loads(metadata["sd35_config"])["text_encoders"]
        self.network = load(path, dtype=torch.float32)
        self.encoders: list[ClipTextModel] = []
        for name, kind in KINDS.items():
            config = described[name]
            heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
            encoder = ClipTextModel(kind(config["hidden_size"], heads, layers))
            filled(encoder, under(tensors, f"text_encoders.{name}.transformer."))
            self.encoders.append(encoder)
        self.autoencoder = TinyAutoencoder()
        filled(self.autoencoder, under(tensors, "first_stage_model."))
        self.tokenize = tokenizer()

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Context (B, 77, 4096) and pooled (B, width) of the captions."""
        ids = [self.tokenize(caption) for caption in captions]
        encoded = [
            encoder(torch.tensor([padded(row, encoder.config) for row in ids]))
            for encoder in self.encoders
        ]
        return joined(encoded, self.network.config.context_dim)

    @torch.no_grad()
    def draw(
        self,
        captions: list[str],
        seeds: list[int],
        steps: int = 28,
        cfg: float = 4.0,
        shift: float = 1.0,
        sampler: str = "dpmpp_2m",
        schedule: str = "simple",
    ) -> list[Image.Image]:
        """One 128x128 picture per caption, from noise of its seed."""
        pictures: list[Image.Image] = []
        levels = sigmas(steps, shift, schedule)
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            noise = [noise_of(seed) for seed in seeds[start : start + BATCH]]
            context, y = self.encode([*part, *[""] * len(part)])

            def denoise(x: Tensor, sigma: Tensor, context: Tensor, y: Tensor) -> Tensor:
                both, levels = x.repeat(2, 1, 1, 1), sigma.repeat(2)
                velocity = self.network(both, 1000 * levels, context, y).float()
                cond, uncond = (both - levels[:, None, None, None] * velocity).chunk(2)
                return guided(uncond, cond, cfg)

            inputs = {"context": context, "y": y}
            with torch.autocast("cpu", torch.bfloat16):
                latent = SAMPLERS[sampler](denoise, torch.cat(noise), levels, inputs)
                pixels = self.autoencoder.decode(from_model(latent)).float().clamp(0, 1)
            for picture in (255 * pixels).round().byte().permute(0, 2, 3, 1).numpy():
                pictures.append(Image.fromarray(numpy.ascontiguousarray(picture)))
        return pictures


def noise_of(seed: int) -> Tensor:
    """(1, 16, 16, 16), as a host makes it: on the CPU from the seed alone."""
    shape = (1, CHANNELS, SIZE // PIXELS, SIZE // PIXELS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
