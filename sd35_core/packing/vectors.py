"""Weights in 2 bits: four of them are one entry of a codebook, chosen with the layer's inputs.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) over vectors (van Baalen et al. 2024,
arXiv:2402.15319).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SettingError

GROUP = 128
"""Weights of a row that share a scale in sd35_vq2; both 1536 and 2432 are multiples."""
VECTOR, ENTRIES = 4, 256
CHUNK = 1 << 12
"""Vectors that are compared with all entries at once: 4 MB of distances, which stay in a cache."""
DAMPING = 0.1
"""Share of the mean diagonal that is added to a layer's second moments before GPTQ."""

Packed = dict[str, Tensor]
"""The entries of one layer by their suffix: weight, weight_scale, comfy_quant, ..."""


def vectors(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """sd35_vq2: codes (out, in / 4), scale (out, groups), codebook (256, 4) -> (out, in)."""
    entries = codebook.to(dtype)
    weight = entries.index_select(0, codes.flatten().int()).view(*scale.shape, -1)
    return (weight * scale.to(dtype)[..., None]).flatten(1)


def pack_vectors(weight: Tensor, moments: Tensor | None) -> Packed:
    rows, columns = weight.shape
    if columns % GROUP:
        raise SettingError(
            f"A layer has {columns} inputs, which are no multiple of {GROUP}, the group of the "
            "2-bit format. Use 8 bits for this model."
        )
    groups = weight.view(rows, -1, GROUP)
    scale = _group_scale(groups)
    importance = None if moments is None else moments.diagonal().to(weight)
    codebook = learned_codebook(weight, scale, importance)
    if moments is None:
        points = (groups / scale[..., None].float()).view(-1, VECTOR)
        codes = _nearest(points, codebook.float()).view(rows, -1)
    else:
        codes, scale = _calibrated(weight.clone(), moments.to(weight), codebook.float())
    return {
        "weight": codes.to(torch.uint8),
        "weight_scale": scale,
        "weight_codebook": codebook,
    }


def _group_scale(groups: Tensor) -> Tensor:
    """(..., GROUP) -> their root mean squares, fp16, never 0."""
    return groups.square().mean(dim=-1).sqrt().clamp(1e-7, 60000).half()


def learned_codebook(weight: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """256 vectors of four weights, (256, 4) fp16: the centres of the layer's own (k-means).

    importance: (in,), how much each input matters. Drawn with a fixed seed.
    """
    generator = torch.Generator(device=weight.device).manual_seed(0)
    points = (weight.view(*scale.shape, GROUP) / scale[..., None].float()).view(-1, VECTOR)
    weights = scale.float().square().repeat_interleave(GROUP // VECTOR, dim=1).flatten()
    if importance is not None:
        weights = weights * importance.view(-1, VECTOR).mean(dim=1).repeat(len(weight))
    count = min(len(points), 128 * ENTRIES)
    chosen = torch.randint(len(points), (count,), generator=generator, device=weight.device)
    points, weights = points[chosen], weights[chosen].clamp(min=1e-30)
    start = torch.randperm(count, generator=generator, device=weight.device)
    centres = points[start[:ENTRIES]] if count >= ENTRIES else points.repeat(ENTRIES, 1)[:ENTRIES]
    for _ in range(16):
        nearest = _nearest(points, centres)
        total = torch.zeros(ENTRIES, device=weight.device).index_add_(0, nearest, weights)
        moved = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        centres = torch.where(total[:, None] > 0, moved / total[:, None].clamp(min=1e-30), centres)
    return centres.half()


def _nearest(points: Tensor, centres: Tensor, scale: Tensor | None = None) -> Tensor:
    """For each of (N, 4) the index of the nearest of (256, 4) times its own scale (N,)."""
    lengths, found = centres.square().sum(dim=1), []
    for start in range(0, len(points), CHUNK):
        here = slice(start, start + CHUNK)
        base = lengths if scale is None else scale[here, None] * lengths
        found.append(torch.addmm(base, points[here], centres.T, alpha=-2).argmin(dim=1))
    return torch.cat(found)


def _calibrated(weight: Tensor, moments: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ: each four columns take their entries, and the columns after them, which are still
    free, take over the error that it makes in the layer's output. Codes and scales.
    """
    factor = inverse_factor(moments)
    codes, scales = [], []
    for start in range(0, weight.shape[1], GROUP):
        end = start + GROUP
        group = weight[:, start:end]
        scale = _group_scale(group)
        wide = scale.float()
        errors = torch.empty_like(group)
        for i in range(0, GROUP, VECTOR):
            here = slice(start + i, start + i + VECTOR)
            metric = torch.linalg.inv(factor[here, here])
            part = group[:, i : i + VECTOR]
            index = _nearest(part @ metric, codebook @ metric, wide)
            error = (part - wide[:, None] * codebook[index]) @ metric
            group[:, i + VECTOR :] -= error @ factor[here, start + i + VECTOR : end]
            errors[:, i : i + VECTOR] = error
            codes.append(index)
        weight[:, end:] -= errors @ factor[start:end, end:]
        scales.append(scale)
    return torch.stack(codes, dim=1), torch.stack(scales, dim=1)


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
