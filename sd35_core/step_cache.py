"""Step caching: model calls whose result the last ones foretell are left out. Approximate."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

LEARNED = 2
"""Steps that are computed before the first forecast, anew after every change of what acts."""


@dataclass(frozen=True)
class Pace:
    """How much is left out: `error` is the largest relative error of a forecast that counts as
    good, `most` how many steps in a row are left out after one."""

    error: float
    most: int


PACES = {"safe": Pace(1.0, 2), "fast": Pace(9.0, 2), "fastest": Pace(1.0, 4)}
"""By the small model's pictures; see `tools/nano/step_cache_study.py`."""


class StepCache:
    """The denoised picture of a run's steps, computed or foretold.

    Each computed step is compared with what a line through the two before it foretells; where
    that was good, the following steps take the line's value and the model is not called: neither
    for the prompt nor the negative one, skipped layers or ControlNets. The last step is always
    computed. It works on what leaves guidance, so it cannot undo any of it.
    """

    def __init__(self, pace: Pace, steps: int):
        self.pace, self.steps = pace, steps
        self.known: list[tuple[float, Tensor]] = []
        self.acting: Hashable = None
        self.good, self.in_a_row = False, 0
        self.left_out: list[int] = []

    def denoised(
        self, step: int, sigma: float, acting: Hashable, compute: Callable[[], Tensor]
    ) -> Tensor:
        """The denoised x at `sigma`, in `step` (from 0).

        `acting` says what acts in this step; at a change all before is forgotten.
        """
        if acting != self.acting or (self.known and sigma > self.known[-1][0]):
            self.known, self.acting, self.good = [], acting, False
        foretold = self._foretold(sigma)
        if foretold is not None and self._leaves_out(step):
            self.in_a_row += 1
            self.left_out.append(step)
            return foretold
        found = compute()
        if foretold is not None:
            error = (found - foretold).abs().mean() / found.abs().mean().clamp(min=1e-6)
            self.good = float(error) <= self.pace.error
        self.known = [*self.known[1 - LEARNED :], (sigma, found)]
        self.in_a_row = 0
        return found

    def _leaves_out(self, step: int) -> bool:
        allowed = self.good and self.in_a_row < self.pace.most
        return allowed and len(self.known) >= LEARNED and step < self.steps - 1

    def _foretold(self, sigma: float) -> Tensor | None:
        """The value at `sigma` of the line through the last two, None without them."""
        if len(self.known) < 2:
            return None
        (before, older), (last, newer) = self.known[-2:]
        if not sigma < last < before:
            return None
        return newer + (newer - older) * ((last - sigma) / (before - last))
