"""SD3.5's ControlNets (Stability AI, November 2024): hints that steer the image's stream.

Two kinds: "8b" was made for Large, "2b" for Medium. The names count the base's parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoint import (
    JOINED_IN_BLOCK,
    RENAMED,
    RENAMED_IN_BLOCK,
    StateDict,
    TensorFile,
    check_tensors,
    joined,
    operations_for,
    shapes_of,
    with_weights,
)
from .config import HEAD_WIDTH, TIMESTEP_WIDTH
from .errors import CheckpointError
from .layers import (
    Attend,
    Embedder,
    Operations,
    PatchEmbedder,
    Stream,
    attended_to,
    attention,
    modulate,
    sinusoid,
)
from .limits import CHANNELS, CONTROLNET_LAYERS, HIDDEN, PATCH, POOLED, bounded, counted
from .mmditx import MMDiTX, padded

Kind = Literal["8b", "2b"]

_JOINED = JOINED_IN_BLOCK["x_block.attn.qkv"]
_OTHERS = {
    "transformer_blocks.0.attn.add_q_proj.weight": "a ControlNet for SD3 that is not Stability's "
    "(its blocks read the prompt)",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet for Stable Diffusion 1.5 or SDXL",
    "input_hint_block.0.weight": "a ControlNet for Stable Diffusion 1.5 or SDXL",
    "control_model.input_hint_block.0.weight": "a ControlNet for Stable Diffusion 1.5 or SDXL",
    "controlnet_x_embedder.weight": "a ControlNet for Flux",
    "joint_blocks.0.x_block.attn.qkv.weight": "an SD3 diffusion model",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "an SD3 checkpoint",
}
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
    in_channels: int = 16
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
        heads = self.attn.heads(modulate(self.norm1(x), *modulation[:2]))
        return self.finish(x, attended_to(attend, heads, 0), modulation)


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
            tokens, y = self.x_embedder(padded(x, patch)), base.y_embedder(y)
        tokens = tokens + self.pos_embed_input(padded(hint, patch))
        return tokens, self.t_embedder(sinusoid(timestep).to(x.dtype)) + self.y_embedder(y)


def controlnet(state_dict: Mapping[str, Tensor], source: str = "this file") -> StateDict:
    """A ControlNet's tensors under Stability's keys; diffusers' are renamed, q, k, v joined.

    Raises CheckpointError, saying what the file seems to be, when there is none.
    """
    for mark, what in _OTHERS.items():
        if mark in state_dict:
            raise CheckpointError(f"{source} is {what}, not an SD3.5 ControlNet. {_WANTED}")
    if "controlnet_blocks.0.weight" not in state_dict or (
        "pos_embed_input.proj.weight" not in state_dict
    ):
        first = ", ".join(sorted(state_dict)[:3]) or "no tensors"
        raise CheckpointError(f"{source} is not an SD3.5 ControlNet: it holds {first}. {_WANTED}")
    found: StateDict = {}
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        block = re.fullmatch(r"(transformer_blocks\.[0-9]+)\.(.+)\.(weight|bias)", key)
        if block is None:
            name, _, suffix = key.rpartition(".")
            found[f"{RENAMED[name]}.{suffix}" if name in RENAMED else key] = tensor
        elif block[2] in _JOINED:
            split.setdefault(f"{block[1]}.attn.qkv.{block[3]}", {})[block[2]] = tensor
        else:
            name = RENAMED_IN_BLOCK.get(block[2], block[2]).removeprefix("x_block.")
            found[f"{block[1]}.{name}.{block[3]}"] = tensor
    for key, parts in split.items():
        if len(parts) == len(_JOINED):
            found[key] = joined([parts[name] for name in _JOINED], key, source)
    _complete(found)
    return found


def _complete(tensors: StateDict) -> None:
    """Give an 8b without an x_embedder an empty one: it has none in diffusers, and uses none."""
    y, hint = tensors.get("y_embedder.mlp.0.weight"), tensors["pos_embed_input.proj.weight"]
    if y is None or y.ndim != 2 or hint.ndim != 4 or y.shape[1] == len(hint):
        return
    bias = tensors.get("pos_embed_input.proj.bias")
    for key, like in (("weight", hint), ("bias", bias)):
        if like is not None:
            tensors.setdefault(f"x_embedder.proj.{key}", torch.zeros_like(like))


_WANTED = "Choose one of Stability AI's for SD3.5 (blur, canny or depth), or one made by this pack."


def config_of(state_dict: Mapping[str, Tensor], source: str = "this file") -> ControlNetConfig:
    """The configuration, once every tensor is there, of the right shape and finite.

    Keys are Stability's. Raises CheckpointError.
    """
    shapes = shapes_of(state_dict)
    layers, blocks = (
        counted(shapes, name, CONTROLNET_LAYERS, source)
        for name in ("controlnet_blocks", "transformer_blocks")
    )
    x = shapes.get("x_embedder.proj.weight", ())
    y = shapes.get("y_embedder.mlp.0.weight", ())
    if len(x) != 4 or len(y) != 2 or x[0] % HEAD_WIDTH:
        raise CheckpointError(
            f"{source} is no whole SD3.5 ControlNet: x_embedder.proj.weight has shape {list(x)} "
            f"and y_embedder.mlp.0.weight {list(y)}. {_WANTED}"
        )
    if layers != blocks:
        raise CheckpointError(
            f"{source} is no whole SD3.5 ControlNet: it has {layers} controlnet_blocks and "
            f"{blocks} transformer_blocks, expected as many of each. {_WANTED}"
        )
    hidden, channels, patch, _ = x
    config = ControlNetConfig(
        kind="2b" if y[1] == hidden else "8b",
        layers=layers,
        hidden=bounded(HIDDEN, hidden, source),
        pooled_dim=bounded(POOLED, y[1], source),
        control_type=_control_type(state_dict, source),
        in_channels=bounded(CHANNELS, channels, source),
        patch_size=bounded(PATCH, patch, source),
    )
    expected = shapes_of(ControlNetEmbedder(config, device="meta").state_dict())
    check_tensors(state_dict, expected, f"{config.kind} ControlNet", source)
    return config


def _control_type(state_dict: Mapping[str, Tensor], source: str) -> str | None:
    """What the file says of the hints it was trained with; None if it says nothing."""
    tensor = state_dict.get("control_type")
    if tensor is None or tensor.numel() != 1:
        return None
    number = tensor.item()
    if type(number) not in (int, float) or number not in range(len(CONTROL_TYPES)):
        known = ", ".join(f"{i} ({name})" for i, name in enumerate(CONTROL_TYPES))
        raise CheckpointError(
            f"{source} has control_type {number}; known are {known}. It needs a newer version of "
            "this pack."
        )
    return CONTROL_TYPES[int(number)]


def load_controlnet(
    path: str | Path, operations: Operations | None = None, dtype: Any = None
) -> ControlNetEmbedder:
    """A ControlNetEmbedder with the weights of a file, on the CPU."""
    source = f"'{Path(path).name}'"
    tensors = controlnet(TensorFile(path), source)
    operations = operations or operations_for(tensors)
    model = ControlNetEmbedder(config_of(tensors, source), operations, device="meta")
    return with_weights(model, tensors, dtype)
