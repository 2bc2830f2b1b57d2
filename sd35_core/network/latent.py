"""The scale of SD3.5's latents: what the VAE gives is not what the network takes."""

from __future__ import annotations

from torch import Tensor

SCALE = 1.5305
SHIFT = 0.0609
LATENT_CHANNELS = 16
PIXELS = 8
"""Pixels per latent cell, each way."""


def to_model(z: Tensor) -> Tensor:
    """The VAE's latent (B, 16, H, W) -> the network's."""
    return (z - SHIFT) * SCALE


def from_model(x: Tensor) -> Tensor:
    """The network's latent (B, 16, H, W) -> the VAE's."""
    return x / SCALE + SHIFT
