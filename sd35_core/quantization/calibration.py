"""What the layers of a model see while it draws: second moments of their inputs, for GPTQ.

Calls of the network are recorded while a few prompts are sampled; the blocks are then run one
after the other on what was recorded, so that only one block's moments are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..network.controlnet import ControlNetEmbedder
from ..network.mmditx import MMDiTX

TOKENS = 8192
"""Of each stream; fewer make the 2-bit weights worse, more hardly better."""


class Call(NamedTuple):
    """The inputs of one call of a network or, with a hint, of a ControlNet."""

    x: Any
    timestep: Any
    context: Any
    y: Any
    hint: Any = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """With every tensor changed."""
        return Call(*(None if tensor is None else change(tensor) for tensor in self))


MOST_CALLS = 64
"""That are kept of a run."""


class Calls(list[Call]):
    """Recorded calls, evenly over the run; `base` is what a ControlNet was called with."""

    base: Any = None
    heard = 0
    apart = 1

    def hear(self, call: Call) -> None:
        """Keep a call if it is its turn; of too many every third stays. Not every other: where the
        memory is short a host calls for the prompt and for the negative one in turns."""
        if self.heard % self.apart == 0:
            self.append(call.map(lambda tensor: tensor.detach().cpu()))
        self.heard += 1
        if len(self) > MOST_CALLS:
            self[:] = self[::3]
            self.apart *= 3

    def chosen(self) -> list[Call]:
        """Rows of calls from the whole run, early and late, with TOKENS image tokens in all."""
        if not self:
            return []
        rows, _, height, width = self[0].x.shape
        tokens = height * width // 4
        count = min(len(self), max(4, min(32, TOKENS // tokens)))
        each = min(rows, max(1, round(TOKENS / count / tokens)))
        found = []
        for i in range(count):
            call = self[min(i * len(self) // count + i % 2, len(self) - 1)]
            picked = [(i + j * rows // each) % rows for j in range(each)]
            found.append(call.map(partial(_rows, rows=picked)))
        return found


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Rows of a batch; a single one stands for all."""
    return tensor if len(tensor) == 1 else tensor[rows]


@contextmanager
def recorded(network: nn.Module) -> Iterator[Calls]:
    """The calls of an MMDiTX or a ControlNetEmbedder while a picture is sampled."""
    calls = Calls()
    names = ("x", "timestep", "context", "y")
    if isinstance(network, ControlNetEmbedder):
        names = ("base", "x", "timestep", "y", "hint")

    def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = {**dict(zip(names, arguments)), **named}
        given["timestep"] = given.get("timesteps", given.get("timestep"))
        calls.base = given.get("base")
        calls.hear(Call(*(given.get(field) for field in Call._fields)))

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


Moments = dict[str, Tensor]
"""A layer's weight key -> mean of x x^T over its inputs, (in, in)."""


@contextmanager
def gathered(block: nn.Module, prefix: str) -> Iterator[Moments]:
    """The moments of a block's layers while it runs."""
    sums: Moments = {}
    counts: dict[str, int] = {}
    handles = []

    def gather(key: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).float()
            product = x.T @ x
            sums[key] = sums[key] + product if key in sums else product
            counts[key] = counts.get(key, 0) + len(x)

        return hook

    for name, module in block.named_modules():
        if hasattr(module, "in_features"):
            hook = gather(f"{prefix}.{name}.weight")
            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield sums
        for key, count in counts.items():
            sums[key] /= count
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def moments_of(network: MMDiTX, calls: list[Call], device: torch.device) -> Iterator[Moments]:
    """The moments of one block after the other, computed on `device`."""
    states = []
    for call in calls:
        x, timestep, context, y = _on(device, call.x, call.timestep, call.context, call.y)
        c = network.conditioning(timestep, y)
        states.append((network.context_embedder(context), network.embed(x), c))
    for i, block in enumerate(network.joint_blocks):
        with gathered(block, f"joint_blocks.{i}") as found:
            states = [(*block(context, x, c), c) for context, x, c in states]
        yield found


@torch.no_grad()
def moments_of_controlnet(
    control: ControlNetEmbedder, base: MMDiTX, calls: list[Call], device: torch.device
) -> Iterator[Moments]:
    """The same for a ControlNet on its base."""
    starts = []
    for call in calls:
        x, timestep, y, hint = _on(device, call.x, call.timestep, call.y, call.hint)
        starts.append(control.start(base, x, timestep, y, hint))
    images = [x for x, _ in starts]
    for i, block in enumerate(control.transformer_blocks):
        with gathered(block, f"transformer_blocks.{i}") as found:
            outs = [block(x, c) for x, (_, c) in zip(images, starts)]
        yield found
        images = outs if control.config.kind == "8b" else images


def _on(device: torch.device, *tensors: Tensor | None) -> list[Tensor]:
    assert all(tensor is not None for tensor in tensors), "recorded by this kind of network"
    return [tensor.to(device) for tensor in tensors if tensor is not None]
