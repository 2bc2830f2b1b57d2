"""The layouts of SD3.5's files: where the diffusion model is, and its keys in Stability's names.

Three are read: Stability's (with or without the prefix `model.diffusion_model.`), ComfyUI's (a
single file that also holds text encoders and VAE) and diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, is_out_of_memory
from ..limits import BLOCKS, counted
from .tensor_file import Entry, StateDict, Tensors

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MARK = "joint_blocks.0.x_block.attn.qkv.weight"
DIFFUSERS_MARK = "transformer_blocks.0.attn.add_q_proj.weight"
CONTROLNET_MARKS = ("controlnet_blocks.0.weight", "pos_embed_input.proj.weight")
TEXT_MARKS = {
    "T5": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "CLIP": "text_model.encoder.layers.0.mlp.fc1.weight",
}
"""What a text encoder's own file holds."""
OTHER_MODELS = ("first_stage_model.", "text_encoders.", "cond_stage_model.")
VAE_MARKS = ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")
RENAMED = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
RENAMED_IN_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
JOINED_IN_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


class Place(NamedTuple):
    """Where a tensor of diffusers' is in Stability's layout: the key, and which of the `parts` that
    are joined there it is."""

    key: str
    part: int = 0
    parts: int = 1


_PARTS = {
    theirs: Place(ours, part, len(parts))
    for ours, parts in JOINED_IN_BLOCK.items()
    for part, theirs in enumerate(parts)
}
_IN_BLOCK = {**{theirs: Place(ours) for theirs, ours in RENAMED_IN_BLOCK.items()}, **_PARTS}
_BLOCK = re.compile(r"transformer_blocks\.([0-9]+)\.(.+)\.([^.]+)")


def from_diffusers_key(key: str) -> Place | None:
    """The place of a tensor of diffusers' SD3Transformer2DModel, or of its ControlNet; None for a
    key that neither has."""
    block = _BLOCK.fullmatch(key)
    if block is not None:
        inner = _IN_BLOCK.get(block[2])
        if inner is None or (inner.parts > 1 and block[3] not in ("weight", "bias")):
            return None  # what else lies beside a weight can't be joined
        return inner._replace(key=f"joint_blocks.{block[1]}.{inner.key}.{block[3]}")
    if key in RENAMED:
        return Place(RENAMED[key])
    name, _, suffix = key.rpartition(".")
    return Place(f"{RENAMED[name]}.{suffix}") if name in RENAMED else None


class Part(Tensors):
    """The tensors of a file whose keys begin with a prefix, without it, still unread."""

    def __init__(self, file: Tensors, prefix: str):
        self.path, self.metadata = file.path, file.metadata
        self.file, self.prefix = file, prefix
        self.keys_within = keys_under(file, prefix)

    def __getitem__(self, key: str) -> Tensor:
        return self.file[self.prefix + key]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.file.shape(self.prefix + key)

    def entry(self, key: str) -> Entry:
        return self.file.entry(self.prefix + key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_within)

    def __len__(self) -> int:
        return len(self.keys_within)


def diffusion_model(state_dict: Mapping[str, Tensor], source: str = "this file") -> StateDict:
    """The diffusion model's tensors alone, under Stability's keys without prefix.

    Raises CheckpointError, saying what the file seems to be, when there is none.
    """
    prefix = model_prefix(state_dict)
    if prefix is None:
        what = _looks_like(state_dict)
        raise CheckpointError(f"{source} is not an SD3.5 diffusion model: {what}")
    found = under(state_dict, prefix)
    return found if prefix + MARK in state_dict else from_diffusers(found, source)


def model_prefix(keys: Mapping[str, Tensor]) -> str | None:
    """What the keys of the diffusion model in a file begin with; None where there is none."""
    for prefix in PREFIXES:
        if prefix + MARK in keys:
            return prefix
        if prefix + DIFFUSERS_MARK in keys and not is_controlnet(keys, prefix):
            return prefix
    return None


def is_controlnet(state_dict: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Whether a file is a ControlNet of some kind, by its keys."""
    return any(prefix + mark in state_dict for mark in CONTROLNET_MARKS)


def under(state_dict: Mapping[str, Tensor], prefix: str) -> StateDict:
    """The tensors whose keys begin with `prefix`, without it; without the other models' if empty.

    Of a TensorFile only these are read.
    """
    return {key: state_dict[prefix + key] for key in keys_under(state_dict, prefix)}


def keys_under(state_dict: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The keys of `under`."""
    keys = [k for k in state_dict if k.startswith(prefix)]
    if not prefix:
        keys = [k for k in keys if not k.startswith(OTHER_MODELS)]
    return [key[len(prefix) :] for key in keys]


def _looks_like(state_dict: Mapping[str, Tensor]) -> str:
    if is_controlnet(state_dict):
        return "it is a ControlNet. Load it with a ControlNet loader and choose a model here."
    if any(mark in state_dict for mark in VAE_MARKS) or any("taesd_" in k for k in state_dict):
        return "it is a VAE. Choose it in the vae widget and a diffusion model here."
    if any(".lora_" in key or key.startswith("lora_") for key in state_dict):
        return "it is a LoRA. Choose the model here and add a LoRA loader after this node."
    if any("text_model.encoder" in k or "SelfAttention.q" in k for k in state_dict):
        return "it is a text encoder. Choose it in a text encoder widget and a model here."
    first = next(iter(state_dict), "none at all")
    return (
        f"it has {len(state_dict)} tensors and no '{MARK}' among them (the first is '{first}'). "
        "Choose a Stable Diffusion 3 or 3.5 model."
    )


def from_diffusers(state_dict: Mapping[str, Tensor], source: str = "this file") -> StateDict:
    """diffusers' SD3Transformer2DModel keys -> Stability's. q, k, v are joined.

    diffusers keeps (scale, shift) where Stability has (shift, scale) in the final layer and in
    the last text block; they change places. Raises CheckpointError for keys it does not know.
    """
    last = counted(state_dict, "transformer_blocks", BLOCKS, source) - 1
    found, others = in_place(state_dict, source)
    if others:
        raise CheckpointError(
            f"{source} has a tensor '{next(iter(others))}', which diffusers' SD3 transformer does "
            "not have. The file is damaged or of another model; download the original."
        )
    swapped = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
    for name in ("final_layer.adaLN_modulation.1", swapped):
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in found:
                halves = found[key].chunk(2) if found[key].ndim else [found[key]]
                found[key] = joined_parts(halves[::-1], key, source)
    return found


def in_place(
    state_dict: Mapping[str, Tensor], source: str, renamed: Callable[[str], str] = str
) -> tuple[StateDict, StateDict]:
    """diffusers' tensors under Stability's keys, and those that are none of diffusers'.

    Of tensors that are joined and not all there, none is among either. renamed: a diffusion model's
    key -> the one that is wanted.
    """
    found, others = {}, {}
    split: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state_dict.items():
        place = from_diffusers_key(key)
        if place is None:
            others[key] = tensor
            continue
        wanted = renamed(place.key)
        parts = split.setdefault(wanted, {})
        parts[place.part] = tensor
        if len(parts) == place.parts:
            del split[wanted]
            whole = [parts[i] for i in range(place.parts)]
            found[wanted] = joined_parts(whole, wanted, source) if place.parts > 1 else tensor
    return found, others


def joined_parts(parts: Sequence[Tensor], key: str, source: str) -> Tensor:
    """The parts of the tensor `key`, (n, ...) each, one after another. Raises CheckpointError when
    they don't fit together."""
    try:
        return torch.cat(list(parts))
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        seen = " and ".join(f"{list(part.shape)} ({dtype_name(part.dtype)})" for part in parts)
        raise CheckpointError(
            f"{source}: '{key}' can't be put together from parts of shape {seen}. The file is "
            "damaged or mixes two models; download the original."
        ) from error


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
