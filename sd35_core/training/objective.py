"""What a step of training draws and what it minimizes: rectified flow with logit-normal timesteps.

Esser et al. 2024, arXiv:2403.03206.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint as checkpointing

from ..network.controlnet import ControlNetEmbedder
from ..network.layers import JointBlock, attention
from ..network.mmditx import MMDiTX, run_block
from ..sampling.schedules import DEFAULT_SHIFT, shifted
from .config import TIMESTEPS
from .dataset import Size
from .trained import plain_attention


def draw_timesteps(
    count: int, generator: torch.Generator, shift: float = 1.0, kind: str = TIMESTEPS[0]
) -> Tensor:
    """Noise levels in 0..1, (count,); a larger shift moves them to the noise.

    logit-normal: most at the middle of the way (Esser et al. 2024, 3.1); uniform: all alike;
    shifted: uniform through the shift that SD3.5 samples with, where no other is asked for.
    """
    if kind == TIMESTEPS[0]:
        levels = torch.sigmoid(torch.randn(count, generator=generator))
    else:
        levels = torch.rand(count, generator=generator)
    if kind == TIMESTEPS[2] and shift == 1:
        shift = DEFAULT_SHIFT
    return shifted(levels, shift)


def crops(
    table: Tensor, size: Size, count: int, share: float, generator: torch.Generator
) -> Tensor:
    """Crops of a position table (S, S, C), rows x columns: (count, rows * columns, C).

    A `share` of them lie anywhere, the others at the centre, where sampling looks.
    """
    rows, columns = size
    moved = torch.rand(count, generator=generator) < share
    corners = []
    for side, whole in zip(size, table.shape):
        anywhere = torch.randint(whole - side + 1, (count,), generator=generator)
        corners.append(torch.where(moved, anywhere, (whole - side) // 2))
    top, left = corners
    down = (top[:, None] + torch.arange(rows))[:, :, None]
    across = (left[:, None] + torch.arange(columns))[:, None, :]
    return table[down, across].flatten(1, 2)


def run_again(index: int, block: JointBlock, *inputs: Any) -> tuple[Tensor, Tensor]:
    """A block of which nothing but its inputs is kept."""
    found: Any = checkpointing.checkpoint(run_block, index, block, *inputs, use_reentrant=False)
    return found


def flow_losses(
    model: MMDiTX,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    context: Tensor,
    y: Tensor,
    positions: Tensor | None = None,
    control: ControlNetEmbedder | None = None,
    hint: Tensor | None = None,
    checkpoint: bool = False,
) -> Tensor:
    """Mean squared errors (B,) of the velocity noise - x0; x0 and hint: (B, 16, H, W), sigma: (B,).

    `checkpoint`: blocks are computed once more on the way back, in place of keeping their values.
    """
    share = sigma[:, None, None, None]
    attend = plain_attention if x0.device.type == "cpu" else attention
    x = (1 - share) * x0 + share * noise
    residuals: list[Tensor] = []
    if control is not None and hint is not None:
        layers = control(model, x, 1000 * sigma, y, hint, attend)
        residuals = [layers[i] for i in control.config.spread(model.config.depth)]
    velocity = model(
        x, 1000 * sigma, context, y, attend=attend, residuals=residuals, positions=positions,
        run_block=run_again if checkpoint else run_block,
    )  # fmt: skip
    return (velocity.float() - (noise - x0)).square().mean(dim=(1, 2, 3))
