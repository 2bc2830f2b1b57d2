"""Packed weights, 8 or 2 bits each: how a layer lies in a file, and how it runs.

A packed Linear has, in place of its `weight`, codes under that name, scales under `weight_scale`
and a `comfy_quant` entry, a JSON text as bytes, that names the format:

- `int8_tensorwise`: int8, one scale for each output row (ComfyUI's own format);
- `float8_e4m3fn`: fp8, one scale for the layer (ComfyUI's own format);
- `sd35_vq2`: four weights in a byte, which counts an entry of the layer's `weight_codebook`
  (256, 4); one scale for 128 weights of a row. 2.13 bits a weight. Chosen with the activations
  of the layer (GPTQ, Frantar et al. 2022, arXiv:2210.17323; over vectors, van Baalen et al. 2024,
  arXiv:2402.15319), or with none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CheckpointError, SettingError
from .limits import COMFY_QUANT, bounded

INT8, FP8, VQ2 = "int8_tensorwise", "float8_e4m3fn", "sd35_vq2"
CODES = {
    INT8: (torch.int8,),
    FP8: (torch.float8_e4m3fn, torch.float8_e5m2),
    VQ2: (torch.uint8,),
}
"""Format -> what a layer's `weight` can hold; ComfyUI's older files call both fp8 the same."""
FORMATS = tuple(CODES)
RAW_FP8 = "raw fp8"
"""Weights cast to fp8, without scales and without a `comfy_quant` entry: for every loader."""
VERSION = 1
"""Of sd35_vq2; a file of a newer one is refused."""
GROUP = 128
"""Weights of a row that share a scale in sd35_vq2; both 1536 and 2432 are multiples."""
VECTOR, ENTRIES = 4, 256
INT8_ROWS = 32
"""The fewest rows of an int8 product: on CUDA it takes more than 16."""
CHUNK = 1 << 16
"""Vectors that are compared with all entries at once."""
DAMPING = 0.1
"""Share of the mean diagonal that is added to a layer's second moments before GPTQ."""

Packed = dict[str, Tensor]
"""The entries of one layer by their suffix: weight, weight_scale, comfy_quant, ..."""


def pack(weight: Tensor, form: str, moments: Tensor | None = None) -> Packed:
    """A weight (out, in) in a format.

    moments: the layer's mean of x x^T, (in, in), for sd35_vq2; without, each vector of four
    weights takes its nearest entry. Raises SettingError when the width does not fit the groups.
    """
    if form == RAW_FP8:
        return {"weight": weight.to(torch.float8_e4m3fn)}
    weight = weight.float()
    config: dict[str, Any] = {"format": form}
    if form == INT8:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        packed = {"weight": codes, "weight_scale": scale}
    elif form == FP8:
        scale = weight.abs().amax().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        packed = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        config["full_precision_matrix_mult"] = True
    else:
        packed = _pack_vectors(weight, moments)
        config |= {"version": VERSION, "group_size": GROUP}
    text = json.dumps(config).encode()
    return {**packed, "comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}


def unpack(packed: Mapping[str, Tensor], form: str, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that a layer's codes stand for, in `dtype`."""
    if form == RAW_FP8:
        return packed["weight"].to(dtype)
    codes, scale = packed["weight"], packed["weight_scale"]
    if form != VQ2:
        return codes.to(dtype) * scale.to(dtype)
    return vectors(codes, scale, packed["weight_codebook"], dtype)


def vectors(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """sd35_vq2: codes (out, in / 4), scale (out, groups), codebook (256, 4) -> (out, in)."""
    entries = codebook.to(dtype)
    weight = entries.index_select(0, codes.flatten().int()).view(*scale.shape, -1)
    return (weight * scale.to(dtype)[..., None]).flatten(1)


def format_of(packed: Mapping[str, Tensor], name: str) -> str:
    """The format that a layer's `comfy_quant` names. Raises CheckpointError for an unknown one."""
    form, config = format_named(packed, name)
    version, group = config.get("version", VERSION), config.get("group_size", GROUP)
    whole = type(version) is int and 1 <= version <= VERSION
    if form not in FORMATS or not whole:
        raise CheckpointError(
            f"The layer '{name}' is packed as {form}, version {version}. Known here are "
            f"{', '.join(FORMATS)} up to version {VERSION}; update the pack, and ComfyUI."
        )
    if form == VQ2 and group != GROUP:
        raise CheckpointError(
            f"The layer '{name}' is packed with a scale for {group} weights, known here is one "
            f"for {GROUP}. Update the pack, or quantize the original again."
        )
    return form


def format_named(packed: Mapping[str, Tensor], name: str) -> tuple[str, dict[str, Any]]:
    """Format that a layer's `comfy_quant` names, known here or not, and all that it says.

    Raises CheckpointError when it is damaged.
    """
    entry = packed["comfy_quant"]
    try:
        if entry.dtype != torch.uint8 or entry.ndim != 1:
            raise ValueError(f"a text of {entry.dtype} with {entry.ndim} dimensions")
        bounded(COMFY_QUANT, entry.numel(), f"The layer '{name}'")
        config = json.loads(bytes(entry.tolist()))
        if not isinstance(config, dict) or not isinstance(config.get("format"), str):
            raise ValueError("it names no format")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The layer '{name}' does not say how it is packed ({error}). Quantize the original "
            "file again."
        ) from error
    inner = config.get("params")
    turned = config.get("convrot", isinstance(inner, dict) and inner.get("convrot"))
    return config["format"] + (" with convrot" if turned else ""), config


def _pack_vectors(weight: Tensor, moments: Tensor | None) -> Packed:
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
        nearest = [_nearest(part, codebook.float()) for part in points.split(CHUNK)]
        codes = torch.cat(nearest).view(rows, -1)
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
    products, lengths = points @ centres.T, centres.square().sum(dim=1)
    if scale is None:
        return (lengths - 2 * products).argmin(dim=1)
    return (scale[:, None] * lengths - 2 * products).argmin(dim=1)


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


class PackedLinear(nn.Module):
    """A Linear whose weight is packed, or plain, as the state dict that it loads has it.

    The weight is unpacked for each call. With `native` int8 weights meet inputs rounded to int8
    (a scale for each token) in the processor's own int8 product: faster, less exact.
    """

    native = False
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.form: str | None = None
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        empty = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.register_parameter("bias", empty)

    def _load_from_state_dict(
        self, state_dict: Packed, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        packed = packed_under(state_dict, prefix)
        if packed:
            shape = (self.out_features, self.in_features)
            self.form = check_packed(packed, shape, prefix[:-1])
            del self.weight
            for name, tensor in packed.items():
                self.register_buffer(name, torch.empty_like(tensor, device="meta"))
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in)."""
        if self.form is None:
            return self.weight.to(dtype)
        return unpack(dict(self.named_buffers()), self.form, dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.native and self.form == INT8:
            scale = dict(self.named_buffers())["weight_scale"]
            product = int8_product(x.flatten(0, -2), self.weight, scale)
            product = product.view(*x.shape[:-1], -1)
            return product if bias is None else product + bias
        return F.linear(x, self.dense(x.dtype), bias)


class NativeLinear(PackedLinear):
    """The same with the processor's own int8 product."""

    native = True


class PackedOperations:
    """Layers for MMDiTX and ControlNetEmbedder that load packed files."""

    Linear, Conv2d, LayerNorm, RMSNorm = PackedLinear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm


class NativeOperations(PackedOperations):
    """The same with int8 products where weights are int8."""

    Linear = NativeLinear


def int8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (N, in) times codes (out, in)^T times scale (out, 1), with x rounded to int8: (N, out)."""
    per_token = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 127
    rounded = (x / per_token).round().to(torch.int8)
    missing = max(INT8_ROWS - len(x), 0)
    rounded = F.pad(rounded, (0, 0, 0, missing)) if missing else rounded
    if adds_exactly(x.device.type):
        product = torch._int_mm(rounded, codes.T)  # pyright: ignore[reportPrivateImportUsage]
    else:
        product = rounded.float() @ codes.float().T
    return (product[: len(x)] * (per_token * scale.float().T)).to(x.dtype)


@cache
def adds_exactly(device: str) -> bool:
    """Whether torch's int8 product is right on a kind of device.

    On x86 processors without VNNI its sums of two products end at 32,767 (seen in torch 2.11 with
    oneDNN 3.10: products of large values lose nearly all).
    """
    x = torch.full((INT8_ROWS, 64), 127, dtype=torch.int8, device=device)
    seen = torch._int_mm(x, x.T)  # pyright: ignore[reportPrivateImportUsage]
    return bool((seen == 64 * 127 * 127).all())


def packed_under(state_dict: Mapping[str, Tensor], prefix: str) -> Packed:
    """The entries of a packed layer, by suffix; empty when it is not packed."""
    if prefix + "comfy_quant" not in state_dict:
        return {}
    names = ("weight", "weight_scale", "weight_codebook", "comfy_quant")
    return {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}


def packed_layers(keys: Iterable[str]) -> set[str]:
    """The layers that are packed, by this pack or by ComfyUI."""
    mark = ".comfy_quant"
    return {key.removesuffix(mark) for key in keys if key.endswith(mark)}


def is_packed(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether any layer is packed."""
    return bool(packed_layers(state_dict))


def check_packed(packed: Packed, shape: tuple[int, int], name: str) -> str:
    """The format of a layer, once its entries make a weight of `shape`, of finite numbers.

    Raises CheckpointError.
    """
    form = format_of(packed, name)

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(
            f"The packed layer '{name}' ({form}) has {what}. The file is damaged; quantize the "
            "original again."
        )

    rows, columns = shape
    wanted: dict[str, tuple[int, ...]] = {"weight": shape, "weight_scale": ()}
    if form == INT8:
        wanted["weight_scale"] = (rows, 1)
    elif form == VQ2:
        if columns % GROUP:
            raise damaged(f"{columns} inputs, expected a multiple of {GROUP}")
        wanted = {
            "weight": (rows, columns // VECTOR),
            "weight_scale": (rows, columns // GROUP),
            "weight_codebook": (ENTRIES, VECTOR),
        }
    for suffix, expected in wanted.items():
        tensor = packed.get(suffix)
        if tensor is None:
            raise damaged(f"{suffix} missing, expected one of shape {list(expected)}")
        seen = tuple(tensor.shape)
        for_all = form != VQ2 and suffix == "weight_scale" and seen in ((), (1,))
        if seen != expected and not for_all:
            raise damaged(f"{suffix} of shape {list(seen)}, expected {list(expected)}")
        if suffix == "weight":
            if tensor.dtype not in CODES[form]:
                raise damaged(f"codes of {tensor.dtype}, expected {CODES[form][0]}")
            continue
        values = "scales" if suffix == "weight_scale" else "codebook entries"
        if not tensor.dtype.is_floating_point:
            raise damaged(f"{values} of {tensor.dtype}, expected floating-point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise damaged(f"{values} that are NaN or infinite")
    return form
