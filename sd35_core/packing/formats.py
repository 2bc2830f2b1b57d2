"""Packed weights, 8, 4, 3 or 2 bits each: how a layer lies in a file, and how it runs.

A packed Linear has, in place of its `weight`, codes under that name, scales under `weight_scale`
and a `comfy_quant` entry, a JSON text as bytes, that names the format:

- `int8_tensorwise`: int8, one scale for each output row (ComfyUI's own format);
- `float8_e4m3fn`: fp8, one scale for the layer (ComfyUI's own format);
- `sd35_vq2`: four weights in a byte, which counts an entry of the layer's `weight_codebook`
  (256, 4); one scale for 128 weights of a row. 2.13 bits a weight;
- `sd35_vq3`: the same with 64 entries of two weights, numbered by 6 bits. 3.13 bits a weight;
- `sd35_vq4`: the same with 256 entries of two weights. 4.13 bits a weight;
- those of kitchen.py, where the package comfy-kitchen is installed.

Vectors are chosen with the activations of the layer, or with none (see vectors.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..limits import COMFY_QUANT, bounded
from .kitchen import (
    LAYOUTS,
    entries_of,
    is_here,
    kitchen_config,
    pack_for_host,
    turned_by,
    unpack_for_host,
)
from .vectors import GROUP, Code, Entries, Packed, pack_vectors, vectors

INT8, FP8 = "int8_tensorwise", "float8_e4m3fn"
VQ2, VQ3, VQ4 = "sd35_vq2", "sd35_vq3", "sd35_vq4"
VECTORS = {VQ2: Code(4, 8), VQ3: Code(2, 6), VQ4: Code(2, 8)}
"""This pack's own formats."""
CODES = {
    INT8: (torch.int8,),
    FP8: (torch.float8_e4m3fn, torch.float8_e5m2),
    **dict.fromkeys(VECTORS, (torch.uint8,)),
    **{form: (layout.codes,) for form, layout in LAYOUTS.items()},
}
"""Format -> what a layer's `weight` can hold; ComfyUI's older files call both fp8 the same."""
FORMATS = (INT8, FP8, *VECTORS)
"""Those that need no package."""
RAW_FP8 = "raw fp8"
"""Weights cast to fp8, without scales and without a `comfy_quant` entry: for every loader."""
BESIDE = ("weight_scale", "weight_scale_2", "weight_codebook")
"""Entries of a packed layer beside its codes."""
GROUPS_TURNED = (4, 16, 64, 256)
"""Inputs that a Hadamard matrix of comfy-kitchen's can turn together."""
VERSION = 1
"""Of this pack's own formats; a file of a newer one is refused."""


def pack(weight: Tensor, form: str, moments: Tensor | None = None) -> Packed:
    """A weight (out, in) in a format.

    moments: the layer's mean of x x^T, (in, in), for vectors; without, each takes its nearest
    entry. Raises SettingError when the width does not fit the groups.
    """
    if form == RAW_FP8:
        return {"weight": weight.to(torch.float8_e4m3fn)}
    weight = weight.float()
    if form in LAYOUTS:
        packed = pack_for_host(weight, form)
    elif form == INT8:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        packed = {"weight": codes, "weight_scale": scale}
    elif form == FP8:
        scale = weight.abs().amax().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        packed = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    else:
        packed = pack_vectors(weight, VECTORS[form], moments)
    return {**packed, "comfy_quant": _mark(form, weight.shape[1])}


def _mark(form: str, columns: int) -> Tensor:
    """The entry that names a layer's format."""
    config: dict[str, Any] = {"format": form}
    if form in LAYOUTS:
        config = kitchen_config(form, columns)
    if form == FP8:
        config["full_precision_matrix_mult"] = True
    elif form in VECTORS:
        config |= {"version": VERSION, "group_size": GROUP}
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def packed_entries(form: str, shape: tuple[int, ...]) -> Entries:
    """Type and shape of what `pack` makes of a weight (out, in)."""
    rows, columns = shape
    if form == RAW_FP8:
        return {"weight": (torch.float8_e4m3fn, (rows, columns))}
    mark = _mark(form, columns)
    return {**_entries(form, rows, columns), "comfy_quant": (mark.dtype, tuple(mark.shape))}


def _entries(form: str, rows: int, columns: int) -> Entries:
    if form in LAYOUTS:
        return entries_of(form, rows, columns)
    if form not in VECTORS:
        scale = (rows, 1) if form == INT8 else ()
        return {"weight": (CODES[form][0], (rows, columns)), "weight_scale": (torch.float32, scale)}
    code = VECTORS[form]
    return {
        "weight": (torch.uint8, (rows, code.width(columns))),
        "weight_scale": (torch.float16, (rows, columns // GROUP)),
        "weight_codebook": (torch.float16, (code.entries, code.vector)),
    }


def packed_bytes(form: str, shape: tuple[int, ...]) -> int:
    """What a weight (out, in) takes in a format."""
    return sum(t.itemsize * prod(size) for t, size in packed_entries(form, shape).values())


def unpack(packed: Mapping[str, Tensor], form: str, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that a layer's codes stand for, in `dtype`."""
    if form == RAW_FP8:
        return packed["weight"].to(dtype)
    if form in LAYOUTS:
        return unpack_for_host(packed, form, dtype)
    codes, scale = packed["weight"], packed["weight_scale"]
    if form not in VECTORS:
        return codes.to(dtype) * scale.to(dtype)
    return vectors(codes, scale, packed["weight_codebook"], dtype)


def format_of(packed: Mapping[str, Tensor], name: str) -> str:
    """The format that a layer's `comfy_quant` names. Raises CheckpointError for an unknown one."""
    form, config = format_named(packed, name)
    version, group = config.get("version", VERSION), config.get("group_size", GROUP)
    whole = type(version) is int and 1 <= version <= VERSION
    known = (*FORMATS, *(LAYOUTS if is_here() else ()))
    if form not in known or not whole:
        raise CheckpointError(
            f"The layer '{name}' is packed as {form}, version {version}. Known here are "
            f"{', '.join(known)} up to version {VERSION}; update the pack, and ComfyUI."
        )
    if form in VECTORS and group != GROUP:
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


def packed_under(state_dict: Mapping[str, Tensor], prefix: str) -> Packed:
    """The entries of a packed layer, by suffix; empty when it is not packed."""
    if prefix + "comfy_quant" not in state_dict:
        return {}
    names = ("weight", *BESIDE, "comfy_quant")
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
    if form in VECTORS and columns % GROUP:
        raise damaged(f"{columns} inputs, expected a multiple of {GROUP}")
    if form in LAYOUTS and LAYOUTS[form].turned:
        group = turned_by(format_named(packed, name)[1])
        if group not in GROUPS_TURNED or columns % group:
            raise damaged(f"groups of {group!r} inputs, expected 4, 16, 64 or 256 that divide them")
    wanted = {suffix: size for suffix, (_, size) in _entries(form, rows, columns).items()}
    for suffix, expected in wanted.items():
        tensor = packed.get(suffix)
        if tensor is None:
            raise damaged(f"{suffix} missing, expected one of shape {list(expected)}")
        seen = tuple(tensor.shape)
        for_all = form in (INT8, FP8) and suffix == "weight_scale" and seen in ((), (1,))
        if seen != expected and not for_all:
            raise damaged(f"{suffix} of shape {list(seen)}, expected {list(expected)}")
        if suffix == "weight":
            if tensor.dtype not in CODES[form]:
                raise damaged(f"codes of {tensor.dtype}, expected {CODES[form][0]}")
            continue
        if tensor.dtype == torch.uint8 and form in LAYOUTS:
            continue  # powers of two
        values = "codebook entries" if suffix == "weight_codebook" else "scales"
        if not tensor.dtype.is_floating_point:
            raise damaged(f"{values} of {tensor.dtype}, expected floating-point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise damaged(f"{values} that are NaN or infinite")
    return form
