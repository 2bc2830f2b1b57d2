"""What a ControlNet reads of the model that it steers: ours, or the host's own SD3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.diffusionmodules.mmdit
import torch
from torch import Tensor

from ...sd35_core.errors import SettingError
from ...sd35_core.network.controlnet import ControlNetConfig
from .network import HostMMDiTX

StockMMDiT = comfy.ldm.modules.diffusionmodules.mmdit.MMDiT


@dataclass(frozen=True)
class Base:
    """What a ControlNet needs of the model that it steers."""

    x_embedder: Callable[[Tensor], Tensor]
    embed: Callable[..., Tensor]
    """Patches of a latent by the `x_embedder`, with positions, or with those given."""
    y_embedder: Callable[[Tensor], Tensor]
    depth: int
    hidden: int
    pooled_dim: int


def base_of(network: Any, dtype: torch.dtype) -> Base:
    """Of our model or the host's own, which computes in `dtype`, whatever the ControlNet does.

    Raises SettingError for one that isn't SD3.
    """

    def own(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, **more: layer(x.to(dtype), **more).to(x.dtype)

    if isinstance(network, HostMMDiTX):
        config = network.config
        return Base(
            own(network.x_embedder),
            own(network.embed),
            own(network.y_embedder),
            config.depth,
            config.hidden,
            config.pooled_dim,
        )
    if not isinstance(network, StockMMDiT):
        raise SettingError(
            f"This ControlNet is for Stable Diffusion 3.5, but the model is a "
            f"{type(network).__name__}. Use a ControlNet made for that model, or load SD3.5."
        )

    def embed(x: Tensor) -> Tensor:
        positions = network.cropped_pos_embed(x.shape[-2:], device=x.device)
        return network.x_embedder(x) + positions.to(x)

    hidden, pooled_dim = network.y_embedder.mlp[0].weight.shape
    depth = len(network.joint_blocks)
    return Base(
        own(network.x_embedder), own(embed), own(network.y_embedder), depth, hidden, pooled_dim
    )


def check_fit(config: ControlNetConfig, base: Base) -> None:
    """Raise SettingError or CheckpointError unless the ControlNet was made for a base like this."""
    names = {2432: "SD3.5 Large", 1536: "SD3.5 Medium"}
    if config.hidden != base.hidden:
        raise SettingError(
            f"The ControlNet is for a model of width {config.hidden} "
            f"({names.get(config.hidden, 'not published')}), but the model has "
            f"{base.hidden} ({names.get(base.hidden, 'not published')}). Choose the ControlNet "
            "made for this model."
        )
    if config.kind == "8b" and config.pooled_dim != base.pooled_dim:
        raise SettingError(
            f"The ControlNet takes a pooled text {config.pooled_dim} wide, the model's is "
            f"{base.pooled_dim}. Choose the ControlNet made for this model."
        )
    config.spread(base.depth)
