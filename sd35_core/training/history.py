"""The losses of a run, step by step and by how noisy the pictures were, and their curve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BANDS = 4
"""Equal parts of the noise levels 0 to 1; what is learned in one hardly shows in another."""
SPAN = 100
"""Steps over which a loss is smoothed."""
COLOURS = ("#2b2b2b", "#4477aa", "#228833", "#ccbb44", "#ee6677")
"""Of the whole loss and of each band (Tol's bright scheme, told apart by the colour-blind)."""


class History:
    """table: (steps, 2, BANDS), of each step the sum of the losses in a band and their count."""

    def __init__(self, table: Tensor | None = None):
        self.rows = [] if table is None else list(table.float().cpu().unbind())

    def add(self, sigma: Tensor, losses: Tensor) -> None:
        """A step's examples: noise levels in 0..1 and losses, both (B,)."""
        band = (BANDS * sigma.float().cpu()).long().clamp(0, BANDS - 1)
        row = torch.zeros(2, BANDS)
        row[0].index_add_(0, band, losses.detach().float().cpu())
        row[1].index_add_(0, band, torch.ones(len(band)))
        self.rows.append(row)

    @property
    def table(self) -> Tensor:
        return torch.stack(self.rows) if self.rows else torch.zeros(0, 2, BANDS)

    def smoothed(self) -> Tensor:
        """(steps, 1 + BANDS): the mean loss of the last SPAN steps, all and of each band; NaN where
        there was none."""
        whole = torch.cat([self.table.sum(dim=2, keepdim=True), self.table], dim=2)
        sums = torch.cat([torch.zeros(1, 2, 1 + BANDS), whole]).double().cumsum(dim=0)
        last = torch.arange(1, len(whole) + 1)
        over = sums[last] - sums[(last - SPAN).clamp(min=0)]
        return (over[:, 0] / over[:, 1]).float()

    def words(self) -> str:
        """The smoothed loss now, and of each band."""
        if not self.rows:
            return "no step was made"
        now = self.smoothed()[-1].tolist()
        bands = (
            f"{band / BANDS:g} to {(band + 1) / BANDS:g}: {loss:.4f}"
            for band, loss in enumerate(now[1:])
            if loss == loss
        )
        return f"loss {now[0]:.4f} (noise {', '.join(bands)})"

    def curve(self, width: int = 768, height: int = 384) -> Any:
        """A picture of Pillow's: the smoothed losses over the steps, the whole one in black."""
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        losses, edge = self.smoothed(), 40
        seen = losses[torch.isfinite(losses)]
        most = 1.05 * float(seen.max()) if len(seen) and float(seen.max()) > 0 else 1.0
        right, bottom = width - edge // 2, height - edge
        draw.line([(edge, edge // 2), (edge, bottom), (right, bottom)], fill=COLOURS[0])
        draw.text((4, edge // 2), f"{most:.3g}", fill=COLOURS[0])
        draw.text((4, bottom - 6), "0", fill=COLOURS[0])
        draw.text((right - edge, bottom + 6), f"step {len(losses)}", fill=COLOURS[0])
        names = ["all", *(f"noise {b / BANDS:g}-{(b + 1) / BANDS:g}" for b in range(BANDS))]
        for line in reversed(range(1 + BANDS)):
            points = [
                (edge + (right - edge) * step / max(1, len(losses) - 1),
                 bottom - (bottom - edge // 2) * loss / most)
                for step, loss in enumerate(losses[:, line].tolist())
                if loss == loss
            ]  # fmt: skip
            if len(points) > 1:
                draw.line(points, fill=COLOURS[line], width=1 + (line == 0))
            draw.text((edge + 8 + 110 * line, 4), names[line], fill=COLOURS[line])
        return picture
