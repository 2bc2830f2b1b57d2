"""SD3.5's ControlNets (Stability AI, November 2024): hints that steer the image's stream.

Two kinds: "8b" was made for Large, "2b" for Medium. The names count the base's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import CheckpointError
from .config import TIMESTEP_WIDTH
from .latent import LATENT_CHANNELS
from .layers import (
    Attend,
    Embedder,
    Operations,
    PatchEmbedder,
    Stream,
    attended_to,
    attention,
    sinusoid,
)
from .mmditx import MMDiTX, padded_latent

Kind = Literal["8b", "2b"]
CONTROL_TYPES = ("blur", "canny", "depth")
"""By the number in a file's `control_type`."""


@dataclass(frozen=True)
class ControlNetConfig:
    """What a ControlNet file's shapes say; `pooled_dim` is the width that its y MLP takes."""

    kind: Kind
    layers: int
    hidden: int
    pooled_dim: int
    control_type: str | None = None
    in_channels: int = LATENT_CHANNELS
    patch_size: int = 2

    def spread(self, depth: int) -> list[int]:
        """For each of the base's blocks, which of the layers' residuals it gets.

        Raises CheckpointError when they can't be shared out evenly.
        """
        if self.layers == 0 or depth % self.layers:
            raise CheckpointError(
                f"The ControlNet has {self.layers} layers, which can't be shared out evenly among "
                f"the model's {depth} blocks. It was made for another model."
            )
        return [index // (depth // self.layers) for index in range(depth)]


class ControlNetBlock(Stream):
    """A block of the image's stream alone, without norms on q and k."""

    def __init__(self, hidden: int, operations: Operations, **factory: Any):
        super().__init__(hidden, qk_norm=False, operations=operations, **factory)

    def forward(self, x: Tensor, c: Tensor, attend: Attend = attention) -> Tensor:
        """x: (B, N, hidden), c: (B, hidden) -> the next x."""
        modulation = self.parts(self.modulation(c))
        normed = modulation.attn.on(self.norm1(x))
        return self.finish(x, attended_to(attend, self.attn.heads(normed), 0), modulation)


class ControlNetEmbedder(nn.Module):
    """Noisy latent, timestep, pooled text and hint -> residuals for the base's blocks.

    8b sees through the base's x_embedder and positions and chains its blocks; 2b has its own
    x_embedder, takes the pooled text through the base's y_embedder, and all its blocks read the
    same input. The base is given to each call and none of its weights are kept.
    """

    def __init__(
        self,
        config: ControlNetConfig,
        operations: Operations = nn,
        dtype: Any = None,
        device: Any = None,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        hidden, patches = config.hidden, (config.in_channels, config.patch_size)
        self.config = config
        self.x_embedder = PatchEmbedder(*patches, hidden, operations, **factory)
        self.t_embedder = Embedder(TIMESTEP_WIDTH, hidden, operations, **factory)
        self.y_embedder = Embedder(config.pooled_dim, hidden, operations, **factory)
        self.pos_embed_input = PatchEmbedder(*patches, hidden, operations, **factory)
        self.transformer_blocks = nn.ModuleList(
            ControlNetBlock(hidden, operations, **factory) for _ in range(config.layers)
        )
        self.controlnet_blocks = nn.ModuleList(
            operations.Linear(hidden, hidden, **factory) for _ in range(config.layers)
        )

    def forward(
        self,
        base: MMDiTX,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        hint: Tensor,
        attend: Attend = attention,
    ) -> list[Tensor]:
        """One residual (B, N, hidden) per layer.

        x: (B, 16, H, W), timestep: (B,) in 0..1000, y: (B, base's pooled_dim), hint: (B or 1, 16,
        H, W), on the model's scale.
        """
        start, c = self.start(base, x, timestep, y, hint)
        x, residuals = start, []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks):
            x = block(start if self.config.kind == "2b" else x, c, attend)
            residuals.append(out(x))
        return residuals

    def start(
        self, base: MMDiTX, x: Tensor, timestep: Tensor, y: Tensor, hint: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the first block reads: image (B, N, hidden) and c (B, hidden)."""
        patch = self.config.patch_size
        if self.config.kind == "8b":
            tokens = base.embed(x)
        else:
            tokens, y = self.x_embedder(padded_latent(x, patch)), base.y_embedder(y)
        tokens = tokens + self.pos_embed_input(padded_latent(hint, patch))
        return tokens, self.t_embedder(sinusoid(timestep).to(x.dtype)) + self.y_embedder(y)
