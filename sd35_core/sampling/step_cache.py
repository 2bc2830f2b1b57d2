"""Step caching: model calls whose result would hardly differ are left out. Approximate."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pace:
    """How much is left out: `change` is the largest relative change of the denoised picture
    between two computed steps that counts as small, `most` how many steps in a row are left out
    after one."""

    change: float
    most: int


PACES = {"safe": Pace(2.0, 1), "fast": Pace(2.0, 2), "fastest": Pace(2.0, 4)}
"""By the small model's pictures; see `tools/nano/step_cache_study.py`."""


class StepCache:
    """The denoised picture of a run's steps, computed or taken from the last computed step.

    Where it changed little between the last two computed steps, the model is not called in the
    steps after: neither for the prompt nor the negative one, skipped layers or ControlNets. It
    works on what leaves guidance, so it cannot undo any of it. A line through the last two was
    tried in place of the last value: worse, since the noisy steps of DPM++ carry it too far.
    """

    def __init__(self, pace: Pace, steps: int):
        self.pace, self.steps = pace, steps
        self.last: Tensor | None = None
        self.sigma = 0.0
        self.acting: Hashable = None
        self.small, self.in_a_row = False, 0
        self.left_out: list[int] = []

    def denoised(
        self, step: int, sigma: float, acting: Hashable, compute: Callable[[], Tensor]
    ) -> Tensor:
        """The denoised x at `sigma`, in `step` (from 0); the last step is always computed.

        `acting` says what acts in this step; at a change, and where sigma rises, it starts anew.
        """
        if acting != self.acting or sigma > self.sigma:
            self.last, self.small = None, False
        self.acting, self.sigma = acting, sigma
        allowed = self.small and self.in_a_row < self.pace.most and step < self.steps - 1
        if allowed and self.last is not None:
            self.in_a_row += 1
            self.left_out.append(step)
            return self.last
        found = compute()
        if self.last is not None:
            change = (found - self.last).abs().mean() / found.abs().mean().clamp(min=1e-6)
            self.small = float(change) <= self.pace.change
        self.last, self.in_a_row = found, 0
        return found
