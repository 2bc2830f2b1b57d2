"""A ControlNet's file: its keys in Stability's names, its checks, the network from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..limits import CHANNELS, CONTROLNET_LAYERS, HIDDEN, PATCH, POOLED, bounded, counted
from ..network.config import HEAD_WIDTH
from ..network.controlnet import CONTROL_TYPES, ControlNetConfig, ControlNetEmbedder
from ..network.layers import Operations
from .layouts import in_place
from .loading import check_tensors, operations_for, shapes_of, with_weights
from .tensor_file import StateDict, TensorFile

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
    renamed, others = in_place(state_dict, source, _own_key)
    found = renamed | others
    _complete(found)
    return found


def _own_key(key: str) -> str:
    """Of a diffusion model's key: a ControlNet's blocks have one side alone, that of the image."""
    return re.sub(r"^joint_blocks\.(\d+)\.x_block\.", r"transformer_blocks.\1.", key)


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


def controlnet_config(
    state_dict: Mapping[str, Tensor], source: str = "this file"
) -> ControlNetConfig:
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
    model = ControlNetEmbedder(controlnet_config(tensors, source), operations, device="meta")
    return with_weights(model, tensors, dtype)
