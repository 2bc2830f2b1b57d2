"""llama.cpp's formats Q8_0 and Q2_K, to compare with: a weight -> what is left of it.

Written from the description of the formats: Q8_0 has a scale for 32 weights; Q2_K has for each 16
weights a 4-bit scale and a 4-bit minimum, which a pair of fp16 numbers scales for 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

Q8_0_BITS, Q2_K_BITS = 8.5, 2.625


def q8_0(weight: Tensor) -> Tensor:
    """(out, in), in a multiple of 32."""
    blocks = weight.float().view(-1, 32)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half().float().clamp(min=1e-12)
    return ((blocks / scale).round().clamp(-127, 127) * scale).view_as(weight)


def q2_k(weight: Tensor) -> Tensor:
    """(out, in), in a multiple of 256. Scales and minima by least squares, from several starts."""
    blocks = weight.float().view(-1, 16)
    low = (-blocks.amin(dim=1, keepdim=True)).clamp(min=0)
    reach = blocks.amax(dim=1, keepdim=True) + low
    best, kept = None, None
    for shrink in torch.linspace(0.5, 1.0, 11):
        scale, minimum = reach * shrink / 3, low * shrink
        for _ in range(4):
            codes = ((blocks + minimum) / scale.clamp(min=1e-12)).round().clamp(0, 3)
            mean, codes_mean = blocks.mean(1, keepdim=True), codes.mean(1, keepdim=True)
            spread = (codes - codes_mean).square().sum(1, keepdim=True).clamp(min=1e-6)
            scale = ((codes - codes_mean) * (blocks - mean)).sum(1, keepdim=True) / spread
            minimum = (scale * codes_mean - mean).clamp(min=0)
        error = (scale * codes - minimum - blocks).square().sum(1, keepdim=True)
        if kept is None or best is None:
            best, kept = error, (scale, minimum)
        else:
            better = error < best
            best = torch.where(better, error, best)
            kept = (
                torch.where(better, scale, kept[0]),
                torch.where(better, minimum, kept[1]),
            )
    assert kept is not None
    scale, minimum = (_of_4_bits(values.view(-1, 16)).view(-1, 1) for values in kept)
    codes = ((blocks + minimum) / scale.clamp(min=1e-12)).round().clamp(0, 3)
    return (scale * codes - minimum).view_as(weight)


def _of_4_bits(values: Tensor) -> Tensor:
    """Sixteen numbers, none negative, as multiples 0..15 of one fp16 number."""
    values = values.clamp(min=0)
    unit = (values.amax(dim=1, keepdim=True) / 15).half().float().clamp(min=1e-12)
    return (values / unit).round().clamp(0, 15) * unit
