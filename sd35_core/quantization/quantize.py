"""Quantize a model or a ControlNet to 8 or 2 bits a weight, and write it beside the original."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.controlnet import controlnet, controlnet_config
from ..checkpoint.layouts import MARK, OTHER_MODELS, PREFIXES, Part, diffusion_model, is_controlnet
from ..checkpoint.loading import checked_config, shapes_of, with_axes
from ..checkpoint.tensor_file import StateDict, TensorFile, metadata_of, write_file
from ..errors import SettingError
from ..packing.formats import VERSION, is_packed, pack, unpack
from ..whole_file import free_name
from .calibration import Moments
from .plan import EIGHT, Layer, Plan, Report

log = logging.getLogger("sd35")
WRITTEN = "sd35_quantization"
"""The key of the metadata of files that this writes."""
Done = Callable[[int, int], object]


def quantized(
    tensors: Mapping[str, Tensor],
    plan: Plan,
    moments: Iterable[Moments] | None = None,
    on_layer: Done = lambda done, total: None,
) -> tuple[StateDict, Report]:
    """Pack the tensors of a model or a ControlNet (Stability's keys, no prefix).

    moments: the layers' second moments, block by block, as `moments_of` gives them. `on_layer`
    hears how many layers are done, and may raise to stop. Raises SettingError for a model that is
    packed already or does not fit.
    """
    if is_packed(tensors):
        raise _quantized_already()
    forms = {k: f for k, s in shapes_of(tensors).items() if (f := plan.format_of(k, s)) is not None}
    found: StateDict = {}
    layers: list[Layer] = []

    def take(key: str, second: Tensor | None) -> None:
        weight = tensors[key] if second is None else tensors[key].to(second.device)
        if weight.dtype.itemsize == 1:
            raise _quantized_already()
        packed = pack(weight, forms[key], second)
        prefix = key.removesuffix("weight")
        found.update({prefix + name: tensor.cpu() for name, tensor in packed.items()})
        error = relative_error(weight, unpack(packed, forms[key], torch.float32), second)
        layers.append(Layer(key, forms[key], error, _bytes([weight]), _bytes(packed.values())))
        on_layer(len(layers), len(forms))

    for block in moments or ():
        for key, second in block.items():
            if key in forms:
                take(key, second)
    taken = {layer.name for layer in layers}
    for key in forms:
        if key not in taken:
            take(key, None)
    rest = {key: tensors[key] for key in tensors if key not in forms}
    found |= with_axes(rest) if plan.bits == 2 else rest
    before = _bytes(rest.values()) + sum(layer.before for layer in layers)
    report = Report(plan, moments is not None, layers, before, _bytes(found.values()))
    return found, report


def _quantized_already() -> SettingError:
    return SettingError(
        "This model is quantized already; quantizing it again would add up the errors. Start from "
        "the original file."
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def relative_error(weight: Tensor, other: Tensor, moments: Tensor | None = None) -> float:
    """Root mean square of (other - weight) x over that of weight x; without moments of x, of
    independent inputs."""
    weight = weight.float()
    difference = other.to(weight) - weight
    if moments is None:
        return float(difference.norm() / weight.norm().clamp(min=1e-30))
    moments = moments.to(weight)
    lost, whole = ((w @ moments * w).sum() for w in (difference, weight))
    return float((lost / whole.clamp(min=1e-30)).clamp(min=0).sqrt())


def output_path(path: Path, plan: Plan, calibrated: bool) -> Path:
    """Beside the original, with what it is in its name."""
    if plan.bits == 8:
        words = EIGHT[plan.eight]
    else:
        words = f"2bit_adaln{plan.modulation_bits}" + ("" if calibrated else "_datafree")
    return path.with_name(f"{path.stem}_{words}.safetensors")


def is_another(path: Path) -> bool:
    """Whether something is there that this did not write, so that it may not be replaced."""
    return os.path.lexists(path) and WRITTEN not in metadata_of(path)


def check_name(out: Path) -> None:
    """Raise SettingError where a file may not have the name that was asked for."""
    if is_another(out):
        raise SettingError(
            f"'{out}' is there already and was not written by SD3.5 Quantize. Choose another name, "
            "or move that file away."
        )


def quantize_file(
    path: Path,
    plan: Plan,
    moments: Iterable[Moments] | None = None,
    on_layer: Done = lambda done, total: None,
    out: Path | None = None,
) -> tuple[Path, Report]:
    """Quantize the diffusion model or the ControlNet in a file and write it, as one whole.

    What else the file holds (text encoders, VAE) is written as it is. A file of that name is
    replaced if this wrote it; otherwise the new one has a number, or is refused where `out` says
    its name. Raises CheckpointError or SettingError; the original and an older file of the same
    name are then as they were.
    """
    if out is not None:
        check_name(out)
    wanted = out or output_path(path, plan, moments is not None)
    out = free_name(wanted, is_another)
    free = not os.path.lexists(out)
    file, source = TensorFile(path), f"'{path.name}'"
    prefix = next((p for p in PREFIXES if p + MARK in file), "")
    if is_controlnet(file):
        tensors = controlnet(file, source)
        controlnet_config(tensors, source)
    else:
        tensors = Part(file, prefix) if prefix + MARK in file else diffusion_model(file, source)
        checked_config(tensors, source)
    packed, report = quantized(tensors, plan, moments, on_layer)
    others = [k for k in file if k.startswith(OTHER_MODELS) or not k.startswith(prefix)]
    whole = {prefix + key: tensor for key, tensor in packed.items()}
    whole |= {key: file[key] for key in others}
    about = {**asdict(plan), "calibrated": report.calibrated, "version": VERSION}
    write_file(out, whole, {**file.metadata, WRITTEN: about}, replace=not free)
    if out != wanted:
        note = f"'{wanted.name}' is there already and was not written by SD3.5 Quantize; wrote"
        report = replace(report, note=f"{note} '{out.name}'.")
    return out, report
