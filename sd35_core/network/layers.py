"""The parts of an MMDiT-X block. Attribute names are the checkpoint's keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HEAD_WIDTH, TIMESTEP_WIDTH

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(q, k, v, context tokens) -> output. q, k, v: (B, heads, L, 64), output: (B, L, heads * 64).

The first `context tokens` of L are text, the rest image; 0 means the image attends to itself."""

ROWS = 16

Operations = Any
"""A namespace with torch.nn's Linear, Conv2d, LayerNorm and RMSNorm; torch.nn itself by default.

It may have a `linear_gelu` in place of this module's."""


def attention(q: Tensor, k: Tensor, v: Tensor, context_tokens: int) -> Tensor:
    """Scaled dot-product attention by torch, the default `Attend`."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attended_to(attend: Attend, heads: Iterable[Tensor], context_tokens: int) -> Tensor:
    """The attention of q, k, v as `Attention.heads` gives them, each (B, L, heads, 64)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in heads)
    return attend(q, k, v, context_tokens)


def attended_jointly(
    attend: Attend, text: Sequence[Tensor], image: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The attention of text and image to both; their q, k, v as `Attention.heads` gives them."""
    lengths = [text[0].shape[1], image[0].shape[1]]
    joined = (torch.cat(pair, dim=1) for pair in zip(text, image))
    to_text, to_image = attended_to(attend, joined, lengths[0]).split(lengths, dim=1)
    return to_text.contiguous(), to_image.contiguous()


class Modulation(NamedTuple):
    """What timestep and pooled text do around one part of a stream; each (B, 1, hidden).

    The last text block and the final layer have no gate.
    """

    shift: Tensor
    scale: Tensor
    gate: Any = None

    def on(self, x: Tensor) -> Tensor:
        """What the part reads of x (B, L, hidden): x (1 + scale) + shift."""
        return torch.addcmul(self.shift, x, 1 + self.scale)

    def added(self, x: Tensor, change: Tensor) -> Tensor:
        """x with what the part gave, gated."""
        return torch.addcmul(x, self.gate, change)


class StreamModulation(NamedTuple):
    """The modulations of a stream's parts, in the order of its adaLN's output."""

    attn: Modulation
    mlp: Any = None
    attn2: Any = None


def sinusoid(timestep: Tensor, width: int = TIMESTEP_WIDTH, max_period: float = 10000) -> Tensor:
    """Cosines and sines of (B,) timesteps in 0..1000, fp32: (B, width). Vaswani et al. 2017."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Sines and cosines of (R,) and (C,) coordinates, columns first: (1, R * C, width)."""

    def axis(coordinates: Tensor) -> Tensor:
        exponents = torch.arange(width // 4, device=rows.device) / (width // 4)
        angles = coordinates.double()[:, None] * 10000.0 ** -exponents.double()
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    return joined_axes(axis(columns), axis(rows)).float()


def joined_axes(columns: Tensor, rows: Tensor) -> Tensor:
    """A table (1, R * C, width) of columns' (C, width / 2) and rows' (R, width / 2) halves."""
    across = columns.repeat(len(rows), 1)
    down = rows.repeat_interleave(len(columns), dim=0)
    return torch.cat([across, down], dim=-1)[None]


def split_axes(table: Tensor) -> Tensor | None:
    """(1, n * n, width) -> (2, n, width / 2), whose `joined_axes` are the same numbers.

    None for a table that isn't made of columns and rows.
    """
    size = math.isqrt(table.shape[1])
    columns, rows = table.unflatten(1, (size, size))[0].chunk(2, dim=-1)
    axes = torch.stack([columns[0], rows[:, 0]])
    same = (
        torch.equal(columns[i], columns[0]) and torch.equal(rows[i], rows[i, :1].expand_as(rows[i]))
        for i in range(size)
    )
    return axes if all(same) else None


def by_rows(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x) of (B, width), always 16 rows in a call: a row gives the same in every batch."""
    parts = [layer(part) for part in F.pad(x, (0, 0, 0, -len(x) % ROWS)).split(ROWS)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(x)]


class Embedder(nn.Module):
    """Two Linear layers with SiLU between: timesteps or pooled text -> (B, hidden)."""

    def __init__(self, width: int, hidden: int, operations: Operations, **factory: Any):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(width, hidden, **factory),
            nn.SiLU(),
            operations.Linear(hidden, hidden, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PatchEmbedder(nn.Module):
    """Patches of a latent (B, C, H, W) -> tokens (B, H/p * W/p, hidden), row by row."""

    def __init__(
        self, channels: int, patch: int, hidden: int, operations: Operations, **factory: Any
    ):
        super().__init__()
        self.proj = operations.Conv2d(channels, hidden, kernel_size=patch, stride=patch, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh form) of a Linear's output."""
    return F.gelu(layer(x), approximate="tanh")


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear; four times as wide inside."""

    def __init__(self, hidden: int, operations: Operations, **factory: Any):
        super().__init__()
        self.linear_gelu = getattr(operations, "linear_gelu", linear_gelu)
        self.fc1 = operations.Linear(hidden, 4 * hidden, **factory)
        self.fc2 = operations.Linear(4 * hidden, hidden, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.linear_gelu(self.fc1, x))


class Attention(nn.Module):
    """The projections around an attention; the attention itself is the caller's `Attend`."""

    def __init__(
        self,
        hidden: int,
        qk_norm: bool,
        operations: Operations,
        project: bool = True,
        **factory: Any,
    ):
        super().__init__()
        self.qkv = operations.Linear(hidden, 3 * hidden, **factory)
        if project:
            self.proj = operations.Linear(hidden, hidden, **factory)
        self.qk_norm = qk_norm
        if qk_norm:
            self.ln_q = operations.RMSNorm(HEAD_WIDTH, eps=1e-6, **factory)
            self.ln_k = operations.RMSNorm(HEAD_WIDTH, eps=1e-6, **factory)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, hidden) -> q, k, v, each (B, L, heads, 64)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_WIDTH)).unbind(2)
        if self.qk_norm:
            q, k = self.ln_q(q), self.ln_k(k)
        return q, k, v


class Stream(nn.Module):
    """One of the two streams of a joint block: text (`context_block`) or image (`x_block`).

    `dual` adds MMDiT-X's second attention, over the image alone; `pre_only` is the last text
    block, which hands over its q, k, v and ends there.
    """

    def __init__(
        self,
        hidden: int,
        qk_norm: bool,
        operations: Operations,
        dual: bool = False,
        pre_only: bool = False,
        **factory: Any,
    ):
        super().__init__()
        self.pre_only = pre_only
        self.dual = dual
        norm = {"elementwise_affine": False, "eps": 1e-6, **factory}
        self.norm1 = operations.LayerNorm(hidden, **norm)
        self.attn = Attention(hidden, qk_norm, operations, project=not pre_only, **factory)
        if dual:
            self.attn2 = Attention(hidden, qk_norm, operations, **factory)
        if not pre_only:
            self.norm2 = operations.LayerNorm(hidden, **norm)
            self.mlp = Mlp(hidden, operations, **factory)
        self.modulations = 2 if pre_only else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(hidden, self.modulations * hidden, **factory)
        )

    def modulation(self, c: Tensor) -> Tensor:
        """(B, hidden) -> shift, scale, gate of attn, of mlp, of attn2, side by side."""
        return by_rows(self.adaLN_modulation, c)

    def parts(self, modulation: Tensor) -> StreamModulation:
        """The modulation of each part."""
        found = modulation[:, None].chunk(self.modulations, dim=-1)
        return StreamModulation(*(Modulation(*found[i : i + 3]) for i in range(0, len(found), 3)))

    def finish(self, x: Tensor, attended: Tensor, modulation: StreamModulation) -> Tensor:
        """Add the gated attention, then the gated MLP."""
        x = modulation.attn.added(x, self.attn.proj(attended))
        return modulation.mlp.added(x, self.mlp(modulation.mlp.on(self.norm2(x))))


class JointBlock(nn.Module):
    """Text and image, each with its own weights, meet in one attention over all tokens."""

    def __init__(
        self,
        hidden: int,
        qk_norm: bool,
        operations: Operations,
        dual: bool,
        last: bool,
        **factory: Any,
    ):
        super().__init__()
        self.context_block = Stream(hidden, qk_norm, operations, pre_only=last, **factory)
        self.x_block = Stream(hidden, qk_norm, operations, dual=dual, **factory)

    def modulation(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """(B, hidden) -> the text's and the image's modulation."""
        return self.context_block.modulation(c), self.x_block.modulation(c)

    def forward(
        self,
        context: Tensor,
        x: Tensor,
        c: Tensor,
        attend: Attend = attention,
        modulation: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """context: (B, L, hidden), x: (B, N, hidden), c: (B, hidden) -> the next context and x.

        `modulation` is that of c, where it is known.
        """
        text, image = self.context_block, self.x_block
        known = self.modulation(c) if modulation is None else modulation
        of_text, of_image = text.parts(known[0]), image.parts(known[1])
        normed = image.norm1(x)
        to_text, to_image = attended_jointly(
            attend,
            text.attn.heads(of_text.attn.on(text.norm1(context))),
            image.attn.heads(of_image.attn.on(normed)),
        )
        if image.dual:
            own = attended_to(attend, image.attn2.heads(of_image.attn2.on(normed)), 0)
            x = of_image.attn2.added(x, image.attn2.proj(own))
            del own
        del normed  # what is not needed is not held while the MLP takes the most memory
        if not text.pre_only:
            context = text.finish(context, to_text, of_text)
        del to_text
        return context, image.finish(x, to_image, of_image)


class FinalLayer(nn.Module):
    """Tokens (B, N, hidden) -> patches (B, N, p * p * channels)."""

    def __init__(
        self, hidden: int, patch: int, channels: int, operations: Operations, **factory: Any
    ):
        super().__init__()
        self.norm_final = operations.LayerNorm(
            hidden, elementwise_affine=False, eps=1e-6, **factory
        )
        self.linear = operations.Linear(hidden, patch * patch * channels, **factory)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(hidden, 2 * hidden, **factory)
        )

    def modulation(self, c: Tensor) -> Tensor:
        """(B, hidden) -> shift and scale side by side."""
        return by_rows(self.adaLN_modulation, c)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        found = Modulation(*modulation[:, None].chunk(2, dim=-1))
        return self.linear(found.on(self.norm_final(x)))
