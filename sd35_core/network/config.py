"""What an SD3.5 network looks like, read from the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import CheckpointError
from ..limits import BLOCKS, CHANNELS, CONTEXT, HIDDEN, PATCH, POOLED, POSITIONS, bounded, counted
from .latent import LATENT_CHANNELS

HEAD_WIDTH = 64
TIMESTEP_WIDTH = 256
CONTEXT_WIDTH = 4096
"""Of the published models, which is T5-XXL's."""
AXES = "pos_embed_axes"
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class MMDiTXConfig:
    """Everything that distinguishes one MMDiT-X from another; the constructor's only argument.

    `axes`: the position table is held as its columns and rows, in a 2-bit file and in a host.
    """

    depth: int
    hidden: int
    context_dim: int
    pooled_dim: int
    pos_embed_max_size: int
    qk_norm: bool
    dual_blocks: tuple[int, ...] = ()
    in_channels: int = LATENT_CHANNELS
    patch_size: int = 2
    axes: bool = field(default=False, compare=False)

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_WIDTH

    @property
    def variant(self) -> str:
        """The published model of this shape, else a description of the shape."""
        for name, published in VARIANTS.items():
            if self == published:
                return name
        extras = f", attn2 in {len(self.dual_blocks)}" if self.dual_blocks else ""
        return f"custom MMDiT-X (depth {self.depth}, hidden {self.hidden}{extras})"


def _published(depth: int, positions: int, qk_norm: bool, dual: int = 0) -> MMDiTXConfig:
    return MMDiTXConfig(
        depth, HEAD_WIDTH * depth, CONTEXT_WIDTH, 2048, positions, qk_norm, tuple(range(dual))
    )


VARIANTS = {
    "sd3_medium": _published(24, 192, qk_norm=False),
    "sd3.5_medium": _published(24, 384, qk_norm=True, dual=13),
    "sd3.5_large": _published(38, 192, qk_norm=True),
}
"""Large Turbo has the shapes of Large: no file can tell them apart."""


def config_from_shapes(shapes: Shapes, source: str = "this file") -> MMDiTXConfig:
    """Read the configuration off a state dict's shapes (keys in Stability's layout, no prefix).

    Raises CheckpointError, naming `source`, when a tensor that decides it is missing or odd, or a
    size beyond `limits`.
    """

    def shape_of(key: str, dimensions: int) -> Shape:
        shape = shapes.get(key)
        if shape is None:
            raise CheckpointError(
                f"{source} is not a whole SD3.5 diffusion model: the tensor '{key}' is missing. "
                "Choose a Stable Diffusion 3 or 3.5 file, or download this one again."
            )
        if len(shape) != dimensions:
            raise CheckpointError(
                f"{source}: '{key}' has shape {list(shape)}, expected {dimensions} dimensions. "
                "The file was made by a tool that SD3.5 does not know; use the original."
            )
        return shape

    depth = counted(shapes, "joint_blocks", BLOCKS, source)
    hidden, channels, patch, _ = shape_of("x_embedder.proj.weight", 4)
    axes = AXES in shapes
    positions = shape_of(AXES, 3)[1] ** 2 if axes else shape_of("pos_embed", 3)[1]
    table = math.isqrt(positions)
    if depth == 0 or hidden % HEAD_WIDTH or table * table != positions:
        raise CheckpointError(
            f"{source}: {depth} blocks, width {hidden} and {positions} positions do not make an "
            f"SD3.5 model (at least one block, a width that is a multiple of {HEAD_WIDTH}, a "
            "square number of positions). Choose a Stable Diffusion 3 or 3.5 file."
        )
    return MMDiTXConfig(
        depth=depth,
        hidden=bounded(HIDDEN, hidden, source),
        context_dim=bounded(CONTEXT, shape_of("context_embedder.weight", 2)[1], source),
        pooled_dim=bounded(POOLED, shape_of("y_embedder.mlp.0.weight", 2)[1], source),
        pos_embed_max_size=bounded(POSITIONS, table, source),
        qk_norm="joint_blocks.0.context_block.attn.ln_k.weight" in shapes,
        dual_blocks=tuple(
            i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes
        ),
        in_channels=bounded(CHANNELS, channels, source),
        patch_size=bounded(PATCH, patch, source),
        axes=axes,
    )
