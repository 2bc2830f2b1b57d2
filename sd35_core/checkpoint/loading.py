"""A network from a state dict in Stability's names: its sizes, its checks, its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..network.config import AXES, MMDiTXConfig, Shapes, config_from_shapes
from ..network.layers import Operations, joined_axes, split_axes
from ..network.mmditx import MMDiTX
from ..packing.formats import is_packed, packed_layers
from ..packing.layers import PackedOperations
from .gguf_file import EXTENSION, GGUFFile
from .layouts import (
    MARK,
    diffusion_model,
    dtype_name,
    from_diffusers_key,
    keys_under,
    model_prefix,
)
from .tensor_file import StateDict, TensorFile, Tensors

OLD_QUANTS = "_quantization_metadata"
"""In the metadata of files that name their formats there."""
OLD_SCALES = ("scaled_fp8", ".scale_weight")
"""Keys of ComfyUI's scaled fp8 before it had comfy_quant."""
Module = TypeVar("Module", bound=nn.Module)
QUANTIZATION_SUFFIXES = (
    ".weight_scale", ".weight_codebook", ".input_scale", ".comfy_quant", ".scale_weight"
)  # fmt: skip


def open_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors or GGUF file. Raises CheckpointError."""
    return GGUFFile(path) if path.suffix.lower() == EXTENSION else TensorFile(path)


def shapes_of(state_dict: Mapping[str, Tensor]) -> Shapes:
    """Of a file without reading its tensors."""
    if isinstance(state_dict, Tensors):
        return {key: state_dict.shape(key) for key in state_dict}
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def described_config(file: Tensors) -> MMDiTXConfig | None:
    """The shape of the SD3 model in a file, in Stability's or diffusers' layout."""
    prefix = model_prefix(file)
    if prefix is None:
        return None
    shapes = {key: file.shape(prefix + key) for key in keys_under(file, prefix)}
    found = shapes if MARK in shapes else _stability_shapes(shapes)
    return config_from_shapes(found, file.path.name)


def _stability_shapes(shapes: Shapes) -> Shapes:
    """diffusers' under Stability's keys; those of other keys are left out."""
    placed = ((from_diffusers_key(key), shape) for key, shape in shapes.items())
    return {
        place.key: (place.parts * shape[0], *shape[1:]) if shape else shape
        for place, shape in placed
        if place is not None
    }


def checked_config(
    state_dict: Mapping[str, Tensor], source: str = "this file", largest: int | None = None
) -> MMDiTXConfig:
    """The configuration, once every tensor is there, of the right shape and finite.

    Raises CheckpointError. largest: as in `check_tensors`.
    """
    config = config_from_shapes(shapes_of(state_dict), source)
    expected = shapes_of(MMDiTX(config, device="meta").state_dict())
    check_tensors(state_dict, expected, config.variant, source, largest)
    return config


def check_tensors(
    state_dict: Mapping[str, Tensor],
    expected: Shapes,
    what: str,
    source: str,
    largest: int | None = None,
) -> None:
    """Raise CheckpointError unless every expected tensor is there, of its shape, and of finite
    numbers.

    Of a packed layer's entries it is only checked that the layer is one whose weight is a matrix:
    the rest is left to the layer that loads them. Each tensor is read once; with `largest`, of
    those with more values none: a host that reads weights as it needs them would read them twice.
    """
    shapes = shapes_of(state_dict)
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of {len(expected)} tensors, '{missing[0]}' among "
            "them. The file is incomplete; download it again."
        )
    packed = {f"{layer}.weight" for layer in packed_layers(shapes)}
    for key in sorted(packed):
        if len(expected.get(key, ())) != 2:
            raise CheckpointError(
                f"{source} says that '{key}' is packed, which a {what} "
                f"{'can not have packed' if key in expected else 'does not have'}. The file is "
                "damaged or of another model; quantize the original again."
            )
    for key, shape in expected.items():
        if shapes[key] != shape and key not in packed:
            raise CheckpointError(
                f"{source}: '{key}' has shape {list(shapes[key])}, expected {list(shape)} in a "
                f"{what}. The file mixes two models or is damaged; use the original."
            )
    for key in expected:
        if key in packed:
            continue
        tensor = state_dict[key]
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{source}: '{key}' holds {dtype_name(tensor.dtype)} numbers, expected "
                "floating-point ones. The file was converted wrongly; download the original."
            )
        if (largest is None or tensor.numel() <= largest) and not _finite(tensor):
            raise CheckpointError(
                f"{source}: '{key}' holds NaN or infinite values, so every picture would be "
                "black. The file is damaged or was converted wrongly; download the original."
            )


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass without a copy; 8-bit formats pass."""
    if tensor.dtype.itemsize == 1 or tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def with_axes(tensors: StateDict) -> StateDict:
    """With the position table as its columns and rows, where that is the same: Medium's whole one
    takes 0.45 GB at 16 bits. Files for other programs keep the table."""
    axes = split_axes(tensors["pos_embed"]) if "pos_embed" in tensors else None
    if axes is None:
        return tensors
    return {**{key: t for key, t in tensors.items() if key != "pos_embed"}, AXES: axes}


def with_table(tensors: StateDict) -> StateDict:
    """`with_axes` undone, for saving."""
    if AXES not in tensors:
        return tensors
    table = joined_axes(*tensors[AXES])
    return {**{key: t for key, t in tensors.items() if key != AXES}, "pos_embed": table}


def load(path: str | Path, operations: Operations | None = None, dtype: Any = None) -> MMDiTX:
    """An MMDiTX with the weights of a file, on the CPU, in the file's own dtype or `dtype`.

    Packed layers stay packed, in layers of PackedOperations unless others are given. Raises
    CheckpointError for scales that are not read here, without which the weights are wrong.
    """
    file = TensorFile(path)
    if OLD_QUANTS in file.metadata or any(key.endswith(OLD_SCALES) for key in file):
        raise CheckpointError(
            f"'{file.path.name}' is quantized in an older form of ComfyUI's, whose scales are read "
            "by SD3.5 Loader in ComfyUI alone. Take the model in 16 bits here, or write it in 8 "
            "bits with SD3.5 Quantize."
        )
    tensors = diffusion_model(file, f"'{Path(path).name}'")
    config = checked_config(tensors, f"'{Path(path).name}'")
    operations = operations or operations_for(tensors)
    return with_weights(MMDiTX(config, operations, device="meta"), tensors, dtype)


def operations_for(tensors: Mapping[str, Tensor]) -> Operations:
    """torch's own layers, or those for packed weights where some are."""
    return PackedOperations if is_packed(tensors) else nn


def with_weights(model: Module, tensors: StateDict, dtype: Any) -> Module:
    """A model made on "meta", with its checked tensors, not for training.

    What else lies beside a packed weight, as the scales of its inputs, is not used here.
    """
    wanted = weights_for(model.state_dict(), tensors, dtype)
    model.load_state_dict(wanted, strict=False, assign=True)
    return model.requires_grad_(False).eval()


def weights_for(known: Iterable[str], tensors: StateDict, dtype: Any) -> StateDict:
    """The tensors whose keys a model knows, in `dtype`, and packed layers as they are."""
    known, wanted = set(known), {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        if f"{layer}.comfy_quant" in tensors and name != "bias":
            wanted[key] = tensor
        elif key in known:
            wanted[key] = tensor.to(dtype) if dtype else tensor
    return wanted


def fill(model: nn.Module, tensors: StateDict, source: str, what: str) -> None:
    """Copy weights into a model. Raises CheckpointError, with the first difference."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        difference = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"'{source}' does not fit {what}: {difference[0].strip()}") from error
