"""What a step of training draws and what it minimizes: rectified flow with logit-normal timesteps.

Esser et al. 2024, arXiv:2403.03206.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..network.controlnet import ControlNetEmbedder
from ..network.layers import attention
from ..network.mmditx import MMDiTX
from ..sampling.schedules import shifted
from .dataset import Size
from .trained import plain_attention


def draw_timesteps(count: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Logit-normal in 0..1, most at the middle of the way; a larger shift moves it to the noise."""
    return shifted(torch.sigmoid(torch.randn(count, generator=generator)), shift)


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


def flow_loss(
    model: MMDiTX,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    context: Tensor,
    y: Tensor,
    positions: Tensor | None = None,
    control: ControlNetEmbedder | None = None,
    hint: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the velocity noise - x0; x0 and hint: (B, 16, H, W), sigma: (B,)."""
    share = sigma[:, None, None, None]
    attend = plain_attention if x0.device.type == "cpu" else attention
    x = (1 - share) * x0 + share * noise
    residuals: list[Tensor] = []
    if control is not None and hint is not None:
        layers = control(model, x, 1000 * sigma, y, hint, attend)
        residuals = [layers[i] for i in control.config.spread(model.config.depth)]
    velocity = model(
        x, 1000 * sigma, context, y, attend=attend, residuals=residuals, positions=positions
    )
    return (velocity.float() - (noise - x0)).square().mean()
