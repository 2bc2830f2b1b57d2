"""Between pictures and what the network takes: a tiny autoencoder, or the pixels themselves.

The autoencoder has 16 latent channels and the layout of TAESD (Ollin Boer Bohan, 2023), which
ComfyUI's own VAE class reads. 2.5 million parameters; 8 pixels a latent cell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..network.latent import LATENT_CHANNELS, PIXELS, from_model, to_model

WIDTH = 64


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class Block(nn.Module):
    """Three convolutions beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """Keeps latents within -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def _down() -> list[nn.Module]:
    return [_conv(WIDTH, WIDTH, stride=2, bias=False), Block(), Block(), Block()]


def _up(blocks: int) -> list[nn.Module]:
    return [
        *(Block() for _ in range(blocks)),
        nn.Upsample(scale_factor=2),
        _conv(WIDTH, WIDTH, bias=False),
    ]


class TinyAutoencoder(nn.Module):
    """Pictures (B, 3, H, W) in 0..1 <-> latents (B, 16, H/8, W/8) on the VAE's side."""

    cell = PIXELS

    def __init__(self, channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        self.channels = channels
        self.taesd_encoder = nn.Sequential(
            _conv(3, WIDTH), Block(), *_down(), *_down(), *_down(), _conv(WIDTH, channels)
        )
        self.taesd_decoder = nn.Sequential(
            SoftClamp(), _conv(channels, WIDTH), nn.ReLU(),
            *_up(3), *_up(3), *_up(3), Block(), _conv(WIDTH, 3),
        )  # fmt: skip
        self.vae_scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.vae_shift = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def encode(self, pictures: Tensor) -> Tensor:
        return self.taesd_encoder(pictures) / self.vae_scale + self.vae_shift

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder((latents - self.vae_shift) * self.vae_scale)


class PixelSpace(nn.Module):
    """The same for a model without a VAE: latents (B, channels, H, W) are the pixels, which the
    network sees from -1 to 1. One channel is grey."""

    cell = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def encode(self, pictures: Tensor) -> Tensor:
        if self.channels == 1:
            pictures = pictures.mean(dim=1, keepdim=True)
        return from_model(2 * pictures - 1)

    def decode(self, latents: Tensor) -> Tensor:
        return (to_model(latents).expand(-1, 3, -1, -1) + 1) / 2


Autoencoder = TinyAutoencoder | PixelSpace
