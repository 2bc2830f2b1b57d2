"""Bits where they matter: a format for each layer, so that the model fits a size.

Of each layer is measured how far each format puts its output off on the calibration's inputs, and
how far an error of its output moves the model's. Errors of layers are taken as independent: the
squares of what they do to the model's output add up. Of all plans within the size the one with the
least sum is looked for: formats of a layer lie on a convex curve of bytes and errors, and the next
step up any of the curves is always the one that wins most for a byte (Shoham and Gersho 1988,
doi:10.1109/29.90373).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.loading import shapes_of, with_axes
from ..checkpoint.tensor_file import Tensors
from ..errors import SettingError
from ..network.config import Shape
from ..network.mmditx import MMDiTX
from ..packing.formats import INT8, VQ2, VQ3, VQ4, is_packed, pack, packed_bytes, unpack
from ..packing.vectors import GROUP
from .calibration import Call, Moments, moments_of
from .plan import Fitted, may_be_packed
from .quantize import quantized_already, relative_error

TRIED = (VQ2, VQ3, VQ4, INT8)
ROWS = 256
"""Rows of a weight on which the formats are tried: they are packed independently."""


@dataclass(frozen=True)
class Choice:
    """A format of a layer: its bytes, and the square of what it does to the model's output."""

    form: str
    size: int
    error: float


def fitted_plan(
    tensors: Mapping[str, Tensor],
    size: int,
    influence: Mapping[str, float],
    moments: Iterable[tuple[Moments, Moments]],
    on_layer: Callable[[int, int], object] = lambda done, total: None,
) -> Fitted:
    """The plan for a model (Stability's keys, no prefix) of at most `size` bytes.

    influence: how far an error of a layer's output moves the model's; moments: the layers' second
    moments, block by block, of two halves of a calibration (see `halves`). Raises SettingError for
    a size that is too small, and says the least.
    """
    shapes, rest = _parts(tensors)
    found: dict[str, list[Choice]] = {}
    for block, other in moments:
        for key, second in block.items():
            if key in shapes:
                weight = tensors[key].to(second.device)
                found[key] = choices(weight, second, other[key], influence.get(key, 0.0))
                on_layer(len(found), len(shapes))
    unseen = [key for key in shapes if key not in found]
    if unseen:
        raise SettingError(
            f"The calibration never ran '{unseen[0]}' ({len(unseen)} of {len(shapes)} layers), so "
            "nothing says which bits it needs. Take more prompts or steps."
        )
    chosen = solved(found, size - rest, rest)
    return Fitted(
        {key: choice.form for key, choice in chosen.items()},
        size,
        rest + sum(choice.size for choice in chosen.values()),
        sum(choice.error for choice in chosen.values()) ** 0.5,
    )


def check_size(tensors: Mapping[str, Tensor], size: int) -> None:
    """Before anything is measured: raise SettingError for a model that is quantized already, and
    for a size below the smallest plan, which is said."""
    shapes, rest = _parts(tensors)
    if is_packed(tensors) or any(dtype_of(tensors, key).itemsize == 1 for key in shapes):
        raise quantized_already()
    alike = {
        key: [Choice(form, packed_bytes(form, shape), 0.0) for form in forms_for(shape)]
        for key, shape in shapes.items()
    }
    solved(alike, size - rest, rest)


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Shape], int]:
    """The shapes of what can be packed, and the bytes of the rest as it will be in the file."""
    every = shapes_of(tensors)
    shapes = {key: shape for key, shape in every.items() if may_be_packed(key, shape)}
    rest = with_axes({key: tensors[key] for key in every if key not in shapes})
    return shapes, sum(tensor.numel() * tensor.element_size() for tensor in rest.values())


def dtype_of(tensors: Mapping[str, Tensor], key: str) -> torch.dtype:
    """Of a file from its header."""
    return tensors.entry(key)[0] if isinstance(tensors, Tensors) else tensors[key].dtype


def forms_for(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The formats that a weight (out, in) can have."""
    return TRIED if shape[1] % GROUP == 0 else (INT8,)


def halves(
    network: MMDiTX, calls: list[Call], device: torch.device
) -> Iterable[tuple[Moments, Moments]]:
    """The moments of the first prompts and of the last: a format is tried with the one, and judged
    by the other. Of what adaLN sees a calibration has few samples, which it would fit too well."""
    if len(calls) < 2:
        raise SettingError(
            f"The calibration recorded {len(calls)} calls of the model; two are the least. Take "
            "more prompts or steps."
        )
    middle = len(calls) // 2
    return zip(
        moments_of(network, calls[:middle], device), moments_of(network, calls[middle:], device)
    )


def choices(weight: Tensor, second: Tensor, judging: Tensor, influence: float) -> list[Choice]:
    """What each format makes of a weight (out, in), tried on some of its rows."""
    shape = (weight.shape[0], weight.shape[1])
    rows = weight[:: -(-len(weight) // ROWS)].float()
    found = []
    for form in forms_for(shape):
        other = unpack(pack(rows, form, second), form, torch.float32)
        error = influence * relative_error(rows, other, judging) ** 2
        found.append(Choice(form, packed_bytes(form, shape), error))
    return found


def solved(layers: Mapping[str, list[Choice]], size: int, beside: int = 0) -> dict[str, Choice]:
    """A choice for each layer, within so many bytes in all, with the least sum of errors.

    `beside` are bytes that are taken anyway, for the error's words. Raises SettingError when even
    the smallest choices are too large.
    """
    curves = {key: curve(choices) for key, choices in layers.items()}
    places = dict.fromkeys(curves, 0)
    left = size - sum(steps[0].size for steps in curves.values())
    if left < 0:
        raise SettingError(
            f"The model does not fit into {(size + beside) / 1e9:.3g} GB; the smallest that can "
            f"be made of it is {(size + beside - left) / 1e9:.3g} GB. Ask for that, or more."
        )
    waiting: list[tuple[float, str]] = []

    def offer(key: str) -> None:
        place, steps = places[key], curves[key]
        if place + 1 < len(steps):
            heapq.heappush(waiting, (-_worth(steps[place], steps[place + 1]), key))

    for key in curves:
        offer(key)
    while waiting:
        _, key = heapq.heappop(waiting)
        before, after = curves[key][places[key] : places[key] + 2]
        if after.size - before.size <= left:
            left -= after.size - before.size
            places[key] += 1
            offer(key)
    return {key: curves[key][place] for key, place in places.items()}


def _worth(before: Choice, after: Choice) -> float:
    """The error that a byte takes away."""
    return (before.error - after.error) / (after.size - before.size)


def curve(choices: list[Choice]) -> list[Choice]:
    """Those of growing size on the lower convex hull: each step up wins less for a byte."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.size, each.error)):
        if found and choice.error >= found[-1].error:
            continue
        while len(found) > 1 and _worth(found[-2], found[-1]) <= _worth(found[-1], choice):
            found.pop()
        found.append(choice)
    return found
