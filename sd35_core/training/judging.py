"""How good a LoRA was on its way, and whether an earlier one was better than the last."""

from __future__ import annotations

import json
import math
from statistics import fmean, stdev
from typing import NamedTuple

JUDGED = 8
"""Batches by which the best is found, the same with the same noise each time."""
ERRORS = 2.0
"""So many standard errors apart, two losses differ by more than noise."""


class Judged(NamedTuple):
    """A LoRA after so many steps, and its losses on the batches by which it is judged."""

    step: int
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    def beats(self, other: Judged) -> bool:
        """Whether its losses are lower by more than noise, batch by batch."""
        if not math.isfinite(self.loss + other.loss):
            return math.isfinite(self.loss) and not math.isfinite(other.loss)
        lower = [theirs - ours for ours, theirs in zip(self.losses, other.losses)]
        return fmean(lower) > ERRORS * stdev(lower) / len(lower) ** 0.5

    def words(self, last: Judged) -> str:
        """Of one that beats the last."""
        return (
            f"step {self.step} was better by more than noise: loss {self.loss:.4f} against "
            f"{last.loss:.4f} after step {last.step}, on the same pictures and noise"
        )


def judged_before(text: str) -> Judged | None:
    """What a state says in JSON; None where it says none, or an odd one."""
    try:
        step, losses = json.loads(text)
        found = Judged(int(step), tuple(map(float, losses)))
    except (RecursionError, TypeError, ValueError):
        return None
    fits = len(found.losses) == JUDGED and math.isfinite(found.loss)
    return found if fits else None
