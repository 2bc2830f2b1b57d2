"""Classifier-free guidance and Skip Layer Guidance: the maths, free of any network or host."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from ..errors import SettingError
from ..limits import BLOCKS

LONGEST_TEXT = 1000
"""Characters of a list of layers."""
NAMED = 5
"""How many wrong layers are named."""


@dataclass(frozen=True)
class SkipLayers:
    """Guidance away from what the network predicts with some layers left out.

    `start` and `end` are shares of the steps, 0..1; both ends are strict.
    """

    layers: frozenset[int]
    scale: float
    start: float
    end: float

    def active(self, step: int, steps: int) -> bool:
        """Whether it acts on `step`, counted from 0, of `steps`."""
        return (
            self.scale != 0 and bool(self.layers) and self.start * steps < step < self.end * steps
        )

    def acting(self, steps: int) -> list[int]:
        """The steps, from 0, of `steps` on which it acts."""
        return [step for step in range(steps) if self.active(step, steps)]


def shares_around(acting: list[int], count: int) -> tuple[float, float]:
    """Start and end half a step before the first and after the last step of a run of `count` on
    which guidance is to act; to three places, as nodes show them. (0, 0) for no step."""
    if not acting:
        return 0.0, 0.0
    start, end = (acting[0] - 0.5) / count, (acting[-1] + 0.5) / count
    return max(round(start, 3), 0.0), min(round(end, 3), 1.0)


def parse_layers(text: str, depth: int | None = None) -> frozenset[int]:
    """ "7, 8, 9" or "7-9" -> {7, 8, 9}; an empty text is no layer.

    Raises SettingError for anything else, and for layers outside 0..depth-1 when depth is known.
    """
    if len(text) > LONGEST_TEXT:
        raise SettingError(
            f"layers has {len(text):,} characters, and {LONGEST_TEXT:,} is the most. Write numbers "
            "separated by commas, such as 7, 8, 9."
        )
    end = BLOCKS.most if depth is None else depth
    layers: set[int] = set()
    outside: set[int] = set()
    for part in filter(None, re.split(r"[,;\s]+", text)):
        span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if span is None:
            raise SettingError(
                f"layers is '{text}': '{part}' is not a layer number. Write numbers separated by "
                "commas, such as 7, 8, 9."
            )
        first, last = int(span[1]), int(span[2] or span[1])
        layers.update(range(first, min(last + 1, end)))
        outside.update(range(max(first, end), last + 1)[:NAMED])
    if outside:
        has = f"this model has layers 0 to {end - 1}" if depth else f"no model has {end} layers"
        missing = ", ".join(map(str, sorted(outside)[:NAMED]))
        raise SettingError(f"layers is '{text}', but {has}; there is no layer {missing}.")
    return frozenset(layers)


def guided(uncond: Tensor, cond: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022)."""
    return uncond + cfg * (cond - uncond)


def away_from_skipped(denoised: Tensor, cond: Tensor, skipped: Tensor, scale: float) -> Tensor:
    """Add Skip Layer Guidance to an already guided `denoised`."""
    return denoised + scale * (cond - skipped)


def step_of(sigma: Tensor, schedule: Tensor) -> int:
    """The step, from 0, in which a model call at `sigma` falls; schedule: (steps + 1,), falling.

    Calls between two levels, as second-order samplers make them, belong to the step under way.
    Of a sigma on a card one number is read, so the program waits for it once.
    """
    reached = (schedule[:-1] >= sigma * (1 - 1e-6)).sum()
    return max(int(reached) - 1, 0)
