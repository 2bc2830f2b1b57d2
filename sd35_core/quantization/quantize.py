"""Write a model or a ControlNet with 8, 4, 3 or 2 bits a weight beside the original."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.controlnet import controlnet, controlnet_config
from ..checkpoint.layouts import (
    MARK,
    OTHER_MODELS,
    PREFIXES,
    TEXT_MARKS,
    Part,
    diffusion_model,
    is_controlnet,
)
from ..checkpoint.loading import checked_config, shapes_of, with_axes
from ..checkpoint.tensor_file import Entry, StateDict, TensorFile, metadata_of, write_as_made
from ..errors import SettingError
from ..packing.formats import RAW_FP8, VECTORS, VERSION, is_packed, pack, packed_entries, unpack
from ..whole_file import free_name
from .calibration import Moments
from .plan import WRITTEN, Fitted, Layer, Plan, Report

log = logging.getLogger("sd35")
_BLOCK = re.compile(r"(?:joint|transformer)_blocks\.(\d+)\.")
Done = Callable[[int, int], object]


def quantized(
    tensors: Mapping[str, Tensor],
    plan: Plan | Fitted,
    moments: Iterable[Moments] | None = None,
    on_layer: Done = lambda done, total: None,
) -> tuple[StateDict, Report]:
    """Pack the tensors of a model or a ControlNet (Stability's keys, no prefix).

    moments: the layers' second moments, block by block, as `moments_of` gives them. `on_layer`
    hears how many layers are done, and may raise to stop. Raises SettingError for a model that is
    packed already or does not fit.
    """
    work = Quantizing(tensors, plan, moments, on_layer)
    found = dict(work.made())
    return found, work.report()


class Quantizing:
    """The work on one model: what it will be, then one layer after the other."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        plan: Plan | Fitted,
        moments: Iterable[Moments] | None,
        on_layer: Done,
    ):
        if is_packed(tensors):
            raise quantized_already()
        self.tensors, self.plan, self.on_layer = tensors, plan, on_layer
        self.calibrated, self.moments = moments is not None, iter(moments or ())
        shapes = shapes_of(tensors)
        self.forms = {k: f for k, s in shapes.items() if (f := plan.format_of(k, s)) is not None}
        rest = {key: tensors[key] for key in tensors if key not in self.forms}
        self.before = _bytes(rest.values())
        self.rest = with_axes(rest) if VECTORS.keys() & self.forms.values() else rest
        self.layers: list[Layer] = []
        self.entries: dict[str, Entry] = {}
        """Types and shapes of what is made, in that order."""
        for key in chain(*self._blocks()):
            prefix = key.removesuffix("weight")
            made = packed_entries(self.forms[key], shapes[key])
            self.entries |= {prefix + name: entry for name, entry in made.items()}
        self.entries |= {key: (t.dtype, tuple(t.shape)) for key, t in self.rest.items()}

    def _blocks(self) -> list[list[str]]:
        """The layers to pack, block by block; those of none are last."""
        found: dict[int, list[str]] = {}
        for key in self.forms:
            block = _BLOCK.match(key)
            found.setdefault(int(block[1]) if block else -1, []).append(key)
        return [found.get(i, []) for i in (*range(max(found, default=-1) + 1), -1)]

    def made(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the smaller model."""
        for block in self._blocks():
            second = next(self.moments, {})
            for key in block:
                yield from self._packed(key, second.get(key))
        yield from self.rest.items()

    def _packed(self, key: str, second: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        weight = self.tensors[key] if second is None else self.tensors[key].to(second.device)
        if weight.dtype.itemsize == 1:
            raise quantized_already()
        form, prefix = self.forms[key], key.removesuffix("weight")
        packed = pack(weight, form, second)
        error = relative_error(weight, unpack(packed, form, torch.float32), second)
        self.layers.append(Layer(key, form, error, _bytes([weight]), _bytes(packed.values())))
        yield from ((prefix + name, tensor.cpu()) for name, tensor in packed.items())
        self.on_layer(len(self.layers), len(self.forms))

    def report(self) -> Report:
        """Once everything is made."""
        before = self.before + sum(layer.before for layer in self.layers)
        after = _bytes(self.rest.values()) + sum(layer.after for layer in self.layers)
        return Report(self.plan, self.calibrated, self.layers, before, after)


def quantized_already() -> SettingError:
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


def output_path(path: Path, plan: Plan | Fitted, calibrated: bool) -> Path:
    """Beside the original, with what it is in its name."""
    return path.with_name(f"{path.stem}_{plan.words(calibrated)}.safetensors")


def network_of(file: TensorFile, source: str) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of the model, the ControlNet or the text encoder in a file, with Stability's
    keys, and what stands before them there. Raises CheckpointError."""
    prefix = next((p for p in PREFIXES if p + MARK in file), "")
    if text_encoder_in(file):
        tensors = Part(file, "")
    elif is_controlnet(file):
        tensors = controlnet(file, source)
        controlnet_config(tensors, source)
    else:
        tensors = Part(file, prefix) if prefix + MARK in file else diffusion_model(file, source)
        checked_config(tensors, source)
    return tensors, prefix


def text_encoder_in(file: Mapping[str, Tensor]) -> str | None:
    """T5 or CLIP, where a file holds that alone."""
    return next((name for name, mark in TEXT_MARKS.items() if mark in file), None)


def check_readable(file: Mapping[str, Tensor], plan: Plan | Fitted, forms: set[str]) -> None:
    """Raise SettingError for a text encoder in a format that ComfyUI's own text path can't read,
    which loads it in any case: it knows packed layers in T5 alone, and none of this pack's."""
    kind = text_encoder_in(file)
    if kind == "T5" and forms & VECTORS.keys():
        raise SettingError(
            f"T5 is read by ComfyUI, which does not know {plan.title} of this pack. Choose int8, "
            "fp8, mxfp8 or nvfp4."
        )
    if kind == "CLIP" and forms - {RAW_FP8}:
        raise SettingError(
            f"CLIP is read by ComfyUI, which knows no packed layers in it ({plan.title} were asked "
            "for). Choose raw fp8, or leave it: it is small."
        )


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
    plan: Plan | Fitted,
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
    file = TensorFile(path)
    tensors, prefix = network_of(file, f"'{path.name}'")
    work = Quantizing(tensors, plan, moments, on_layer)
    check_readable(file, plan, set(work.forms.values()))
    others = [k for k in file if k.startswith(OTHER_MODELS) or not k.startswith(prefix)]
    entries = {prefix + key: entry for key, entry in work.entries.items()}
    entries |= {key: file.entry(key) for key in others}
    made = chain(
        ((prefix + key, tensor) for key, tensor in work.made()),
        ((key, file[key]) for key in others),
    )
    about = {**plan.about(), "calibrated": work.calibrated, "version": VERSION}
    metadata = {**file.metadata, WRITTEN: about}
    write_as_made(out, entries, made, metadata, replace=not free)
    report = work.report()
    if out != wanted:
        note = f"'{wanted.name}' is there already and was not written by SD3.5 Quantize; wrote"
        report = replace(report, note=f"{note} '{out.name}'.")
    return out, report
