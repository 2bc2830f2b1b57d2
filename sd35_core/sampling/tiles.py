"""Pictures larger than a model draws at once: tiles that overlap, and how their predictions join.

Coordinates are cells of a latent. All tiles of a picture have one size, so that they fit into one
batch; at every step their predictions are blended into one latent with weights that rise and fall
smoothly and sum to 1, so no seam comes about that would have to be hidden (MultiDiffusion, Bar-Tal
et al. 2023, arXiv:2302.08113, with smooth weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import SettingError

STEP = 2
"""Tiles begin at whole patches: every so many cells."""


@dataclass(frozen=True)
class Tiling:
    """Where tiles lie on a latent (height x width): all combinations of rows and columns.

    size: of a tile, (height, width), no more than the latent's; rows, columns: where tiles begin.
    """

    whole: tuple[int, int]
    size: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top and left of each tile, row by row."""
        return [(top, left) for top in self.rows for left in self.columns]

    def cut(self, x: Tensor, number: int) -> Tensor:
        """A tile of x (..., H, W)."""
        top, left = self.corners[number]
        return x[..., top : top + self.size[0], left : left + self.size[1]]

    @cached_property
    def weights(self) -> Tensor:
        """What each tile gives to each of its cells, summing to 1 in every cell: (N, h, w)."""
        down = _shares(self.rows, self.size[0], self.whole[0])
        across = _shares(self.columns, self.size[1], self.whole[1])
        return (down[:, None, :, None] * across[None, :, None, :]).flatten(0, 1)

    def blended(self, tiles: list[Tensor], weights: Tensor | None = None) -> Tensor:
        """The latent (..., H, W) that predictions (..., h, w) for each tile make together.

        weights: the tiling's own, where they are on the predictions' device already.
        """
        if len(self) == 1:
            return tiles[0]
        first = tiles[0]
        whole = torch.zeros(
            *first.shape[:-2], *self.whole, dtype=torch.float32, device=first.device
        )
        weights = self.weights.to(first.device) if weights is None else weights
        for number, tile in enumerate(tiles):
            self.cut(whole, number).addcmul_(tile.float(), weights[number])
        return whole.to(first.dtype)


def tiling(whole: tuple[int, int], tile: int, overlap: int) -> Tiling:
    """Tiles of at most `tile` cells a side over a latent, overlapping by at least `overlap`.

    They are spread evenly. Raises SettingError for an overlap that leaves no way forward.
    """
    if tile < STEP:
        raise SettingError(f"A tile is {tile} cells wide; at least {STEP} are needed.")
    if not 0 <= overlap <= tile - STEP:
        raise SettingError(
            f"The overlap is {overlap} cells of a tile of {tile}; at most {tile - STEP} are "
            "possible. Make it smaller, or the tile larger."
        )
    sides = [min(tile, side) for side in whole]
    rows, columns = (_starts(side, size, overlap) for side, size in zip(whole, sides))
    return Tiling(whole, (sides[0], sides[1]), rows, columns)


def _starts(side: int, size: int, overlap: int) -> tuple[int, ...]:
    """Where tiles begin on one axis: evenly, at whole patches, the last at the end."""
    room = side - size
    if room <= 0:
        return (0,)
    steps = -(-room // max(STEP, (size - overlap) // STEP * STEP))
    inner = (round(room * i / steps / STEP) * STEP for i in range(steps))
    return (*inner, room)


def _shares(starts: tuple[int, ...], size: int, side: int) -> Tensor:
    """Of each tile on one axis, what it gives to each of its cells: (N, size)."""
    found = torch.ones(len(starts), size, dtype=torch.float64)
    for number, start in enumerate(starts):
        before = starts[number - 1] + size - start if number else 0
        after = start + size - starts[number + 1] if number + 1 < len(starts) else 0
        found[number, :before] *= _ramp(before)
        found[number, size - after :] *= _ramp(after).flip(0)
    total = torch.zeros(side, dtype=torch.float64)
    for start, share in zip(starts, found):
        total[start : start + size] += share
    return torch.stack(
        [share / total[start : start + size] for start, share in zip(starts, found)]
    ).float()


def _ramp(length: int) -> Tensor:
    """From near 0 to near 1 along half a cosine."""
    places = (torch.arange(length, dtype=torch.float64) + 0.5) / max(length, 1)
    return 0.5 - 0.5 * torch.cos(torch.pi * places)
