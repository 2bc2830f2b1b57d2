"""Modulations of a run, computed once: a third of the weights then rest while it is sampled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .mmditx import MMDiTX, Modulations

MOST_ROWS = 128
"""Kept at once; Large has 2.2 MB in a row at 16 bits, Medium 1 MB."""

Hold = Callable[[nn.Module], AbstractContextManager[Any]]
"""Has a block's weights at hand while all of its modulations are computed."""


class ModulationCache:
    """The modulations of pairs of timestep and pooled text, each pair computed once.

    Valid while the network's weights stay as they are. All pairs of a run are computed at its
    first call, layer by layer, so every adaLN weight is read once; a sampler that goes elsewhere
    (Heun's midpoints) has those computed when it asks. The numbers are the network's own.
    """

    def __init__(self, hold: Hold = nullcontext) -> None:
        self.hold = hold
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.pairs: tuple[Tensor, Tensor] | None = None
        self.kept: Modulations | None = None

    @torch.no_grad()
    def look_up(
        self, network: MMDiTX, timestep: Tensor, y: Tensor, ahead: Tensor | None = None
    ) -> Modulations:
        """For timestep: (B,) in 0..1000 and y: (B, pooled_dim); `ahead`: the run's timesteps."""
        found = self._places(timestep, y)
        missing = [row for row, place in enumerate(found) if place is None]
        if missing:
            self._add(network, timestep, y, missing, ahead)
            found = self._places(timestep, y)
        if self.kept is None or None in found:  # NaN is never found
            return computed(network, network.conditioning(timestep, y), self.hold)
        rows = torch.tensor(found, device=y.device)
        blocks = [(text[rows], image[rows]) for text, image in self.kept.blocks]
        return Modulations(self.kept.c[rows], blocks, self.kept.final[rows])

    def _places(self, timestep: Tensor, y: Tensor) -> list[int | None]:
        """Where each row of a batch is kept."""
        if self.pairs is None:
            return [None] * len(y)
        times, pooled = self.pairs
        same = (timestep[:, None] == times) & (y[:, None] == pooled).all(dim=-1)
        places, known = torch.stack([same.int().argmax(dim=1), same.any(dim=1)]).tolist()
        return [place if hit else None for place, hit in zip(places, known)]

    def _add(
        self, network: MMDiTX, timestep: Tensor, y: Tensor, rows: list[int], ahead: Tensor | None
    ) -> None:
        """Compute the rows' pairs and, for a text that is new or due, those of the whole run."""
        pairs = torch.cat([timestep[rows, None], y[rows].float()], dim=1).unique(dim=0)
        times, pooled = pairs[:, 0], pairs[:, 1:].to(y.dtype)
        if ahead is not None:
            due = torch.isin(times, ahead)
            if self.pairs is not None:
                due |= ~_among(pooled, self.pairs[1])
            texts = pooled[due].unique(dim=0)
            later = ahead[ahead < times.max()][: max(MOST_ROWS // max(len(texts), 1) - 1, 0)]
            times = torch.cat([times, later.repeat(len(texts))])
            pooled = torch.cat([pooled, texts.repeat_interleave(len(later), dim=0)])
        fresh = computed(network, network.conditioning(times, pooled), self.hold)
        if self.pairs is None or self.kept is None or len(self.pairs[0]) + len(times) > MOST_ROWS:
            self.pairs, self.kept = (times, pooled), fresh
            return
        self.pairs = torch.cat([self.pairs[0], times]), torch.cat([self.pairs[1], pooled])
        blocks = [
            (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]))
            for old, new in zip(self.kept.blocks, fresh.blocks)
        ]
        final = torch.cat([self.kept.final, fresh.final])
        self.kept = Modulations(torch.cat([self.kept.c, fresh.c]), blocks, final)


def computed(network: MMDiTX, c: Tensor, hold: Hold = nullcontext) -> Modulations:
    """The modulations of c: (R, hidden), layer by layer."""
    layers: list[Any] = [*network.joint_blocks, network.final_layer]
    found = []
    for layer in layers:
        with hold(layer):
            found.append(layer.modulation(c))
    return Modulations(c, found[:-1], found[-1])


def most_values(network: MMDiTX) -> int:
    """How many numbers a full cache keeps."""
    blocks: list[Any] = list(network.joint_blocks)
    parts = sum(b.context_block.modulations + b.x_block.modulations for b in blocks)
    return MOST_ROWS * (parts + 3) * network.config.hidden  # and c, and the final layer's two


def _among(rows: Tensor, others: Tensor) -> Tensor:
    """Which of (B, width) are equal to one of (R, width)."""
    return (rows[:, None] == others).all(dim=-1).any(dim=1)
