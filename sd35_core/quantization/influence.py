"""How far an error of one layer's output moves the output of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..network.mmditx import MMDiTX
from .calibration import Call

SHARE = 0.05
"""The error that is put on a layer's output, of its root mean square; small, so that what follows
is in proportion to it."""
CALLS = 2
"""Early and late in a run."""


@torch.no_grad()
def influence(network: MMDiTX, calls: list[Call], device: torch.device) -> dict[str, float]:
    """A layer's weight key -> square of the relative change of the model's output, over that of the
    layer's, for errors like noise. Runs the model once for each layer from its block on."""
    found: dict[str, float] = {}
    chosen = calls[:: max(1, len(calls) - 1)][:CALLS]
    for call in chosen:
        states, c = _states(network, call, device)
        expected = _finished(network, len(network.joint_blocks), states[-1], c)
        for i, block in enumerate(network.joint_blocks):
            for name, module in block.named_modules():
                if not hasattr(module, "in_features"):
                    continue
                with disturbed(module):
                    seen = _finished(network, i, states[i], c)
                change = (seen - expected).norm() / expected.norm().clamp(min=1e-30)
                key = f"joint_blocks.{i}.{name}.weight"
                found[key] = found.get(key, 0.0) + float(change / SHARE) ** 2 / len(chosen)
    return found


State = tuple[Tensor, Tensor]
"""Text and image before a block."""


def _states(network: MMDiTX, call: Call, device: torch.device) -> tuple[list[State], Tensor]:
    """What goes into each block, and out of the last, and the conditioning; one row."""
    x, timestep, context, y = (
        tensor[:1].to(device) for tensor in (call.x, call.timestep, call.context, call.y)
    )
    c = network.conditioning(timestep, y)
    states = [(network.context_embedder(context), network.embed(x))]
    for block in network.joint_blocks:
        states.append(block(*states[-1], c))
    return states, c


def _finished(network: MMDiTX, start: int, state: State, c: Tensor) -> Tensor:
    """The model's output as patches, fp32, from a block's inputs on."""
    context, x = state
    for block in network.joint_blocks[start:]:
        context, x = block(context, x, c)
    return network.final_layer(x, network.final_layer.modulation(c)).float()


@contextmanager
def disturbed(layer: nn.Module) -> Iterator[None]:
    """With noise of SHARE on the layer's output, the same at every call."""

    def disturb(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
        generator = torch.Generator(output.device).manual_seed(0)
        noise = torch.randn(output.shape, generator=generator, device=output.device)
        level = SHARE * output.float().square().mean().sqrt()
        return output + (level * noise).to(output.dtype)

    handle = layer.register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
