"""Weights in 2, 3 or 4 bits: a few of them are one entry of a codebook, chosen with the layer's
inputs.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) over vectors (van Baalen et al. 2024,
arXiv:2402.15319).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SettingError

GROUP = 128
"""Weights of a row that share a scale; both 1536 and 2432 are multiples."""
DISTANCES = 1 << 20
"""Between vectors and entries, computed at once: 4 MB, which stay in a cache."""
SAMPLES = 1 << 15
"""Vectors that a codebook is learned from."""
DAMPING = 0.1
"""Share of the mean diagonal that is added to a layer's second moments before GPTQ."""

Packed = dict[str, Tensor]
"""The entries of one layer by their suffix: weight, weight_scale, comfy_quant, ..."""


Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Their types and shapes."""


class Code(NamedTuple):
    """How many weights an entry stands for, and the bits of its number: 8, or 6."""

    vector: int
    index_bits: int

    @property
    def entries(self) -> int:
        return 1 << self.index_bits

    @property
    def bits(self) -> float:
        """For a weight, without scales."""
        return self.index_bits / self.vector

    def width(self, columns: int) -> int:
        """Bytes of a row of codes."""
        return columns // self.vector * self.index_bits // 8

    def to_bytes(self, indices: Tensor) -> Tensor:
        """Numbers of entries (out, n) -> (out, bytes). Of numbers of 6 bits come the lower four of
        all of them, two in a byte, then the upper two, four in a byte; the first lies lowest."""
        numbers = indices.to(torch.uint8)
        if self.index_bits == 8:
            return numbers
        low = (numbers & 15).unflatten(1, (-1, 2))
        high = (numbers >> 4).unflatten(1, (-1, 4))
        pairs = low[..., 0] | low[..., 1] << 4
        fours = high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6
        return torch.cat([pairs, fours], dim=1)

    def from_bytes(self, codes: Tensor) -> Tensor:
        """The other way: (out, n), int32."""
        if self.index_bits == 8:
            return codes.int()
        split = codes.shape[1] * 2 // 3
        pairs, fours = codes[:, :split], codes[:, split:]
        low = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
        high = torch.stack([fours >> 2 * i & 3 for i in range(4)], dim=-1).flatten(1)
        return (low | high << 4).int()


def vectors(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (out, bytes), scale (out, groups), codebook (entries, vector) -> (out, in)."""
    entries = codebook.to(dtype)
    code = Code(codebook.shape[1], len(codebook).bit_length() - 1)
    weight = entries.index_select(0, code.from_bytes(codes).flatten()).view(*scale.shape, -1)
    return (weight * scale.to(dtype)[..., None]).flatten(1)


def pack_vectors(weight: Tensor, code: Code, moments: Tensor | None) -> Packed:
    """weight (out, in), moments (in, in) or none. Raises SettingError for a width that is no
    multiple of GROUP."""
    rows, columns = weight.shape
    if columns % GROUP:
        raise SettingError(
            f"A layer has {columns} inputs, which are no multiple of {GROUP}, the group of the "
            f"{code.bits:g}-bit format. Use 8 bits for this model."
        )
    groups = weight.view(rows, -1, GROUP)
    scale = _group_scale(groups)
    importance = None if moments is None else moments.diagonal().to(weight)
    codebook = learned_codebook(weight, scale, code, importance)
    if moments is None:
        points = (groups / scale[..., None].float()).view(-1, code.vector)
        indices = _nearest(points, codebook.float()).view(rows, -1)
    else:
        indices, scale = _calibrated(weight.clone(), moments.to(weight), codebook.float())
    return {
        "weight": code.to_bytes(indices),
        "weight_scale": scale,
        "weight_codebook": codebook,
    }


def _group_scale(groups: Tensor) -> Tensor:
    """(..., GROUP) -> their root mean squares, fp16, never 0."""
    return groups.square().mean(dim=-1).sqrt().clamp(1e-7, 60000).half()


def learned_codebook(
    weight: Tensor, scale: Tensor, code: Code, importance: Tensor | None = None
) -> Tensor:
    """Vectors of a few weights, (entries, vector) fp16: the centres of the layer's own (k-means).

    importance: (in,), how much each input matters. Drawn with a fixed seed.
    """
    entries, vector = code.entries, code.vector
    generator = torch.Generator(device=weight.device).manual_seed(0)
    points = (weight.view(*scale.shape, GROUP) / scale[..., None].float()).view(-1, vector)
    weights = scale.float().square().repeat_interleave(GROUP // vector, dim=1).flatten()
    if importance is not None:
        weights = weights * importance.view(-1, vector).mean(dim=1).repeat(len(weight))
    count = min(len(points), SAMPLES)
    chosen = torch.randint(len(points), (count,), generator=generator, device=weight.device)
    points, weights = points[chosen], weights[chosen].clamp(min=1e-30)
    start = torch.randperm(count, generator=generator, device=weight.device)
    centres = points[start[:entries]] if count >= entries else points.repeat(entries, 1)[:entries]
    for _ in range(16):
        nearest = _nearest(points, centres)
        total = torch.zeros(entries, device=weight.device).index_add_(0, nearest, weights)
        moved = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        centres = torch.where(total[:, None] > 0, moved / total[:, None].clamp(min=1e-30), centres)
    return centres.half()


def _nearest(points: Tensor, centres: Tensor, scale: Tensor | None = None) -> Tensor:
    """For each of (N, vector) the index of the nearest of (entries, vector) times its own scale
    (N,)."""
    lengths, found = centres.square().sum(dim=1), []
    chunk = DISTANCES // len(centres)
    for start in range(0, len(points), chunk):
        here = slice(start, start + chunk)
        base = lengths if scale is None else scale[here, None] * lengths
        found.append(torch.addmm(base, points[here], centres.T, alpha=-2).argmin(dim=1))
    return torch.cat(found)


def _calibrated(weight: Tensor, moments: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ: each few columns take their entries, and the columns after them, which are still
    free, take over the error that it makes in the layer's output. Entries' numbers and scales.
    """
    factor = inverse_factor(moments)
    vector = codebook.shape[1]
    indices, scales = [], []
    for start in range(0, weight.shape[1], GROUP):
        end = start + GROUP
        group = weight[:, start:end]
        scale = _group_scale(group)
        wide = scale.float()
        errors = torch.empty_like(group)
        for i in range(0, GROUP, vector):
            here = slice(start + i, start + i + vector)
            metric = torch.linalg.inv(factor[here, here])
            part = group[:, i : i + vector]
            index = _nearest(part @ metric, codebook @ metric, wide)
            error = (part - wide[:, None] * codebook[index]) @ metric
            group[:, i + vector :] -= error @ factor[here, start + i + vector : end]
            errors[:, i : i + vector] = error
            indices.append(index)
        weight[:, end:] -= errors @ factor[start:end, end:]
        scales.append(scale)
    return torch.stack(indices, dim=1), torch.stack(scales, dim=1)


def inverse_factor(moments: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (moments + damping)^-1, (in, in).

    On the CPU: it takes float64, which some devices lack, and several times the layer's memory.
    """
    damped = moments.cpu().double()
    diagonal = damped.diagonal()
    mean = diagonal.mean().clamp(min=1e-12)
    damped = damped + DAMPING * mean * torch.eye(len(damped), device=damped.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(moments)
