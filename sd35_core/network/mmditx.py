"""MMDiT-X, the network of SD3 and SD3.5 (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError
from .config import AXES, TIMESTEP_WIDTH, MMDiTXConfig
from .layers import (
    Attend,
    Embedder,
    FinalLayer,
    JointBlock,
    Operations,
    PatchEmbedder,
    attention,
    by_rows,
    joined_axes,
    sinusoid,
)

RunBlock = Callable[..., tuple[Tensor, Tensor]]
"""(index, block, context, x, c, attend, modulation) -> context, x: a host hooks in here."""


def run_block(
    index: int,
    block: JointBlock,
    context: Tensor,
    x: Tensor,
    c: Tensor,
    attend: Attend,
    modulation: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The default `RunBlock`: just run it."""
    return block(context, x, c, attend, modulation)


@dataclass(frozen=True)
class Modulations:
    """What timestep and pooled text do to every layer, for the rows of a batch.

    c: (B, hidden); blocks: (text, image) of each block, (B, parts * hidden); final: (B, 2 hidden).
    """

    c: Tensor
    blocks: Sequence[tuple[Tensor, Tensor]]
    final: Tensor


@dataclass(frozen=True)
class Twin:
    """A batch row that is run with some layers skipped: they are the identity on both streams.

    `source` is a row with equal inputs, if there is one in the batch: up to the first skipped
    layer the two are the same, so the twin joins the batch only there.
    """

    row: int
    layers: frozenset[int]
    source: int | None = None


class MMDiTX(nn.Module):
    """The velocity that carries a noisy latent to its picture.

    One class for sd3_medium, sd3.5_medium (attn2 in some blocks), sd3.5_large and turbo.
    `operations` supplies the layers: torch.nn by default, a host's or a quantized set otherwise.
    """

    def __init__(
        self,
        config: MMDiTXConfig,
        operations: Operations = nn,
        dtype: Any = None,
        device: Any = None,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        hidden = config.hidden
        self.config = config
        self.dtype = dtype
        self.x_embedder = PatchEmbedder(
            config.in_channels, config.patch_size, hidden, operations, **factory
        )
        self.t_embedder = Embedder(TIMESTEP_WIDTH, hidden, operations, **factory)
        self.y_embedder = Embedder(config.pooled_dim, hidden, operations, **factory)
        self.context_embedder = operations.Linear(config.context_dim, hidden, **factory)
        self.pos_embed: Tensor
        self.pos_embed_axes: Tensor
        size = config.pos_embed_max_size
        if config.axes:
            self.register_buffer(AXES, torch.empty(2, size, hidden // 2, **factory))
        else:
            self.register_buffer("pos_embed", torch.empty(1, size**2, hidden, **factory))
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                hidden,
                config.qk_norm,
                operations,
                dual=i in config.dual_blocks,
                last=i == config.depth - 1,
                **factory,
            )
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(
            hidden, config.patch_size, config.in_channels, operations, **factory
        )

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor,
        *,
        attend: Attend = attention,
        run_block: RunBlock = run_block,
        residuals: Sequence[Tensor | None] = (),
        twins: Sequence[Twin] = (),
        positions: Tensor | None = None,
        modulations: Modulations | None = None,
    ) -> Tensor:
        """Velocity (B, 16, H, W) of x: (B, 16, H, W) at timestep: (B,) in 0..1000.

        context: (B, L, context_dim), y: (B, pooled_dim); `residuals[i]` (B, N, hidden) is added
        to the image after block i; `twins` are rows with skipped layers, which take no residual
        at a layer they skip; `positions` (B, N, hidden) replace the table's centre crop;
        `modulations` are those of timestep and y, where they are known.
        Raises SettingError for a latent larger than the position table.
        """
        height, width = x.shape[-2:]
        x = self.embed(x, positions)
        c = modulations.c if modulations else self.conditioning(timestep, y)
        rows = Rows(len(x), twins, self.config.depth)
        context, x = (rows.leading(tensor) for tensor in (self.context_embedder(context), x))
        for i, block in enumerate(self.joint_blocks):
            context, x = rows.joined(i, context, x)
            running = rows.running(i)
            if not running.rows:
                continue
            known = tuple(map(running.of_batch, modulations.blocks[i])) if modulations else None
            text, image = running.taken(context), running.taken(x)
            text, image = run_block(i, block, text, image, running.of_batch(c), attend, known)
            if i < len(residuals) and (residual := residuals[i]) is not None:
                image = image + running.of_batch(residual).to(image.dtype)
            context, x = running.put_back(text, context), running.put_back(image, x)
        (x,) = rows.joined(self.config.depth, x)
        final = modulations.final if modulations else self.final_layer.modulation(c)
        return self.unpatchify(self.final_layer(rows.ordered(x), final), height, width)

    def conditioning(self, timestep: Tensor, y: Tensor) -> Tensor:
        """c (B, hidden) of timesteps (B,) in 0..1000 and pooled text (B, pooled_dim)."""
        times = by_rows(self.t_embedder, sinusoid(timestep).to(y.dtype))
        return times + by_rows(self.y_embedder, y)

    def embed(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Latent (B, 16, H, W) -> tokens with their positions, (B, N, hidden)."""
        x = padded_latent(x, self.config.patch_size)
        tokens = self.x_embedder(x)
        if positions is not None:
            return tokens + positions.to(tokens)
        rows, columns = (side // self.config.patch_size for side in x.shape[-2:])
        return tokens + self.positions(rows, columns, tokens)

    def positions(self, rows: int, columns: int, like: Tensor | None = None) -> Tensor:
        """The centre crop of the position table, (1, rows * columns, hidden), of the dtype and on
        the device of `like`; columns and rows are moved there before they are joined."""
        like = self.get_buffer(AXES if self.config.axes else "pos_embed") if like is None else like
        size = self.config.pos_embed_max_size
        if rows > size or columns > size:
            pixels = 8 * self.config.patch_size
            raise SettingError(
                f"The picture is {columns * pixels}x{rows * pixels} pixels; this model's position "
                f"table ends at {size * pixels}x{size * pixels}. Make the latent smaller."
            )
        top, left = (size - rows) // 2, (size - columns) // 2
        if self.config.axes:
            across, down = self.pos_embed_axes
            ends = across[left : left + columns], down[top : top + rows]
            return joined_axes(*(end.to(like) for end in ends))
        table = self.pos_embed.unflatten(1, (size, size))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2).to(like)

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """Patches (B, N, p * p * C) -> latent (B, C, height, width), the padding cut off."""
        patch = self.config.patch_size
        rows = -(-height // patch)
        x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)[..., :height, :width]


def chosen(tensor: Tensor, rows: list[int]) -> Tensor:
    """Rows of a tensor (B, ...), by slices: an index from the CPU would have a card wait for it."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    if runs == [[0, len(tensor)]]:
        return tensor
    parts = [tensor[start:end] for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def padded_latent(x: Tensor, patch: int) -> Tensor:
    """A latent (B, C, H, W) whose sides are multiples of `patch`: the first rows come again."""
    odd_height, odd_width = -x.shape[-2] % patch, -x.shape[-1] % patch
    if odd_height or odd_width:
        return F.pad(x, (0, odd_width, 0, odd_height), mode="circular")
    return x


class Rows:
    """The rows of a batch on their way through the blocks, with twins joining on the way."""

    def __init__(self, count: int, twins: Sequence[Twin], depth: int):
        self.skipped = {twin.row: twin.layers for twin in twins}
        self.joining = {
            twin.row: (min(twin.layers, default=depth), twin.source)
            for twin in twins
            if twin.source is not None
        }
        self.all_lead = not self.joining
        self.present = [row for row in range(count) if row not in self.joining]

    def leading(self, tensor: Tensor) -> Tensor:
        """The rows that start at the first block."""
        return chosen(tensor, self.present)

    def joined(self, index: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """With copies of their sources for the twins whose first skipped layer is `index`."""
        new = {row: source for row, (first, source) in self.joining.items() if first == index}
        if not new:
            return tensors
        places = [self.present.index(source) for source in new.values()]
        self.present += new
        return tuple(torch.cat([tensor, chosen(tensor, places)]) for tensor in tensors)

    def running(self, index: int) -> Running:
        """The present rows that don't skip block `index`."""
        rows = [row for row in self.present if index not in self.skipped.get(row, ())]
        return Running(rows, self.present)

    def ordered(self, tensor: Tensor) -> Tensor:
        """The rows in the order in which they came."""
        if self.all_lead:
            return tensor
        return chosen(tensor, sorted(range(len(self.present)), key=self.present.__getitem__))


class Running:
    """Rows of a batch that one block runs on, among those that are present."""

    def __init__(self, rows: list[int], present: list[int]):
        self.rows = rows
        self.places = [place for place, row in enumerate(present) if row in rows]
        self.resting = [place for place, row in enumerate(present) if row not in rows]

    def of_batch(self, tensor: Tensor) -> Tensor:
        """Of what the whole batch has."""
        return chosen(tensor, self.rows)

    def taken(self, tensor: Tensor) -> Tensor:
        """Of what the present rows have."""
        return chosen(tensor, self.places)

    def put_back(self, new: Tensor, old: Tensor) -> Tensor:
        """The present rows again: new ones where they ran, old ones where they rested."""
        if not self.resting:
            return new
        order = self.places + self.resting
        back = sorted(range(len(order)), key=order.__getitem__)
        return chosen(torch.cat([new, chosen(old, self.resting)]), back)
