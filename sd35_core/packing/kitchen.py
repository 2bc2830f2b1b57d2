"""Formats of ComfyUI that its package comfy-kitchen packs and unpacks; for where it is installed.

Sources: comfy_kitchen/tensor, and comfy/ops.py for how they lie in a file (ComfyUI 0.30).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SettingError
from .vectors import Entries, Packed

CONVROT_INT8 = "int8_tensorwise with convrot"
CONVROT_W4A4, NVFP4, MXFP8 = "convrot_w4a4", "nvfp4", "mxfp8"


class Layout(NamedTuple):
    """A class of comfy-kitchen's, the type of its codes, the weights in one of them, and how many
    inputs share a scale or are turned together."""

    name: str
    codes: torch.dtype
    weights: int
    block: int
    turned: bool = False
    """Whether groups of inputs are turned by a Hadamard matrix first."""


LAYOUTS = {
    CONVROT_INT8: Layout("TensorWiseINT8Layout", torch.int8, 1, 64, turned=True),
    CONVROT_W4A4: Layout("TensorCoreConvRotW4A4Layout", torch.int8, 2, 64, turned=True),
    NVFP4: Layout("TensorCoreNVFP4Layout", torch.uint8, 2, 16),
    MXFP8: Layout("TensorCoreMXFP8Layout", torch.float8_e4m3fn, 1, 32),
}
ROWS = 32
"""Outputs of a layer are multiples of it; comfy-kitchen would pad others."""
_POWERS_OF_TWO = getattr(torch, "float8_e8m0fnu", torch.uint8)
"""Before torch 2.7 there is no type for them, nor mxfp8."""
_DTYPES = {NVFP4: torch.float8_e4m3fn, MXFP8: _POWERS_OF_TWO}
"""Of the scales for blocks, which files may hold as plain bytes."""


def is_here() -> bool:
    return find_spec("comfy_kitchen") is not None


def turned_by(config: Mapping[str, Any]) -> Any:
    """How many inputs a layer says are turned together, at either place where ComfyUI reads it."""
    inner = config.get("params")
    inner = inner if isinstance(inner, dict) else {}
    return config.get("convrot_groupsize", inner.get("convrot_groupsize", 256))


def _layout(form: str) -> Any:
    if not is_here():
        raise SettingError(
            f"The format {form} is packed and unpacked by the package comfy-kitchen, which is not "
            "installed here. ComfyUI brings it; use ComfyUI's Python, or another format."
        )
    from comfy_kitchen.tensor import get_layout_class

    try:
        return get_layout_class(LAYOUTS[form].name)
    except KeyError as error:
        raise SettingError(
            f"The installed comfy-kitchen does not know the format {form}. Update ComfyUI, or use "
            "another format."
        ) from error


def group_for(columns: int) -> int:
    """Inputs that are turned together: 256, for which there are fused kernels, else 64."""
    return 256 if columns % 256 == 0 else 64


def pack_for_host(weight: Tensor, form: str) -> Packed:
    """A weight (out, in), fp32, as ComfyUI reads it. Raises SettingError for a width that does not
    fit, and where comfy-kitchen is missing or too old."""
    columns, layout = weight.shape[1], LAYOUTS[form]
    kitchen = _layout(form)
    if columns % layout.block or len(weight) % ROWS:
        raise SettingError(
            f"A layer has {len(weight)} outputs and {columns} inputs; the format {form} needs "
            f"multiples of {ROWS} and {layout.block}. Use another one for this model."
        )
    settings: dict[str, Any] = {"per_channel": True, "convrot": True} if layout.turned else {}
    if layout.turned:
        settings["convrot_groupsize"] = group_for(columns)
    codes, params = kitchen.quantize(weight, **settings)
    found = kitchen.state_dict_tensors(codes, params)
    return {f"weight{suffix}": _as_bytes(tensor) for suffix, tensor in found.items()}


def kitchen_config(form: str, columns: int) -> dict[str, Any]:
    """What ComfyUI wants to be told of a layer."""
    config: dict[str, Any] = {"format": form.removesuffix(" with convrot")}
    if LAYOUTS[form].turned:
        config["convrot_groupsize"] = group_for(columns)
    return config | ({"convrot": True} if form == CONVROT_INT8 else {})


def entries_of(form: str, rows: int, columns: int) -> Entries:
    """Type and shape of the entries of a layer; scales for blocks lie in tiles of 128x4."""
    layout = LAYOUTS[form]
    found: Entries = {"weight": (layout.codes, (rows, columns // layout.weights))}
    if layout.turned:
        found["weight_scale"] = torch.float32, (rows, 1) if form == CONVROT_INT8 else (rows,)
        return found
    tiles = 128 * -(-rows // 128), 4 * -(-columns // layout.block // 4)
    found["weight_scale"] = torch.uint8 if form == MXFP8 else torch.float8_e4m3fn, tiles
    return found | ({"weight_scale_2": (torch.float32, ())} if form == NVFP4 else {})


def _as_bytes(tensor: Tensor) -> Tensor:
    """Scales that safetensors has no name for as plain bytes, as ComfyUI takes them."""
    return tensor.view(torch.uint8) if tensor.dtype == _POWERS_OF_TWO else tensor


def unpack_for_host(packed: Mapping[str, Tensor], form: str, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a layer in one of ComfyUI's formats."""
    kitchen = _layout(form)
    codes = packed["weight"]
    shape = codes.shape[0], codes.shape[1] * LAYOUTS[form].weights
    config = json.loads(bytes(packed["comfy_quant"].tolist()))
    scale = packed["weight_scale"]
    if form in _DTYPES:
        scale = scale.view(_DTYPES[form])
    values: dict[str, Any] = {"scale": scale}
    if form == NVFP4:
        values = {"scale": packed["weight_scale_2"], "block_scale": scale}
    if LAYOUTS[form].turned:
        values["convrot_groupsize"] = turned_by(config)
    if form == CONVROT_INT8:
        values["convrot"] = True
    params = kitchen.Params(**values, orig_dtype=dtype, orig_shape=shape)
    return kitchen.dequantize(codes, params)
