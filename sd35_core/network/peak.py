"""What a call of the network takes beside its weights, counted on tensors without values.

The network runs on torch's device "meta", and the bytes that exist at once are added up as they
come and go. Of a device's own workspaces and of gaps between tensors it knows nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import MMDiTXConfig
from .mmditx import MMDiTX

WIDTHS = {2: torch.bfloat16, 4: torch.float32}
"""Bytes of a number -> its type."""


class Alive(TorchDispatchMode):
    """While it is on: bytes of tensors that exist, `now` and at `most`.

    Tensors that share memory count once, the weights of `outside` never.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in outside}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class UnpackedLinear(nn.Linear):
    """A Linear whose weight is made for each call: its codes as numbers, then those times their
    scales, of which the second is multiplied with."""

    def forward(self, input: Tensor) -> Tensor:
        numbers = torch.empty_like(self.weight)
        weight = numbers * 1.0
        del numbers
        return F.linear(input, weight, self.bias)


class UnpackedOperations:
    """Layers of packed weights, as far as memory goes."""

    Linear, Conv2d, LayerNorm, RMSNorm = UnpackedLinear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm


@dataclass(frozen=True)
class NetworkCall:
    """A call of the network.

    rows: of the batch; height, width: of the latent, in cells; tokens: of the prompts; number:
    bytes of one; unpacks: whether weights are packed; residuals: how many ControlNets give.
    """

    rows: int
    height: int
    width: int
    tokens: int
    number: int = 2
    unpacks: bool = False
    residuals: int = 0


@lru_cache(maxsize=64)
def peak_of_call(shape: MMDiTXConfig, call: NetworkCall) -> int:
    """Bytes at most, its inputs among them.

    Blocks are alike, and none leaves anything behind: two of them tell what all of them take, the
    first with a second attention where any has one. Attention is one that keeps no weights of its
    own, as torch's on a card.
    """
    side = max(call.height, call.width) // shape.patch_size + 1
    few = MMDiTXConfig(
        depth=min(shape.depth, 2),
        hidden=shape.hidden,
        context_dim=shape.context_dim,
        pooled_dim=shape.pooled_dim,
        pos_embed_max_size=side,
        qk_norm=shape.qk_norm,
        dual_blocks=(0,) if shape.dual_blocks else (),
        in_channels=shape.in_channels,
        patch_size=shape.patch_size,
        axes=True,
    )
    factory = {"dtype": WIDTHS[call.number], "device": "meta"}
    model = MMDiTX(few, UnpackedOperations if call.unpacks else nn, **factory)
    weights = [*model.parameters(), *model.buffers()]
    with torch.no_grad(), Alive(weights) as alive:
        x = torch.empty(call.rows, few.in_channels, call.height, call.width, **factory)
        context = torch.empty(call.rows, call.tokens, few.context_dim, **factory)
        y = torch.empty(call.rows, few.pooled_dim, **factory)
        times = torch.empty(call.rows, device="meta")
        patches = -(-call.height // few.patch_size) * -(-call.width // few.patch_size)
        kept = torch.empty(call.residuals, call.rows, patches, few.hidden, **factory)
        model(x, times, context, y, attend=_fused, residuals=kept[: few.depth])
    return alive.most


def _fused(q: Tensor, k: Tensor, v: Tensor, context_tokens: int) -> Tensor:
    """An `Attend` that gives an output and nothing else."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
