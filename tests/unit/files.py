"""Files as strangers write them: other layouts, headers that lie."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd35_core.checkpoint.tensor_file import StateDict
from sd35_core.errors import CheckpointError
from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from sd35_core.packing.formats import VQ2

from .models import TINY


def to_diffusers(weights: StateDict) -> StateDict:
    """The inverse of `from_diffusers`, written from diffusers' own module names."""
    top = {
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    inner = {
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
        "x_block.attn.proj": "attn.to_out.0",
        "context_block.attn.proj": "attn.to_add_out",
        "x_block.attn.ln_q": "attn.norm_q",
        "x_block.attn.ln_k": "attn.norm_k",
        "context_block.attn.ln_q": "attn.norm_added_q",
        "context_block.attn.ln_k": "attn.norm_added_k",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.attn2.ln_q": "attn2.norm_q",
        "x_block.attn2.ln_k": "attn2.norm_k",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
    }
    joined = {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    }
    last = f"joint_blocks.{TINY.depth - 1}.context_block.adaLN_modulation"
    out: StateDict = {}
    for key, tensor in weights.items():
        if "final_layer.adaLN" in key or key.startswith(last):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        name, _, suffix = key.rpartition(".")
        if key in top:
            out[top[key]] = tensor
        elif name in top:
            out[f"{top[name]}.{suffix}"] = tensor
        else:
            _, index, rest = name.split(".", 2)
            block = f"transformer_blocks.{index}"
            if rest in joined:
                for part, piece in zip(joined[rest], tensor.chunk(3)):
                    out[f"{block}.{part}.{suffix}"] = piece.clone()
            else:
                out[f"{block}.{inner[rest]}.{suffix}"] = tensor
    return out


def embedder(kind: str, layers: int = 2) -> ControlNetEmbedder:
    torch.manual_seed(3)
    pooled = TINY.hidden if kind == "2b" else TINY.pooled_dim
    model = ControlNetEmbedder(ControlNetConfig(kind, layers, TINY.hidden, pooled))  # pyright: ignore[reportArgumentType]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


def in_diffusers_keys(tensors: StateDict) -> StateDict:
    """What diffusers' SD3ControlNetModel calls them."""
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    }
    parts = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn.to_out.0",
             "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}  # fmt: skip
    found: StateDict = {}
    for key, tensor in tensors.items():
        name, suffix = key.rsplit(".", 1)
        if ".attn.qkv" in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                found[f"{name.replace('qkv', f'to_{letter}')}.{suffix}"] = part
            continue
        for ours, theirs in parts.items():
            name = name.replace(f".{ours}", f".{theirs}") if "transformer_blocks" in name else name
        found[f"{names.get(name, name)}.{suffix}"] = tensor
    return found


MANY_DIGITS = "9" * 5000


def write_header(path: Path, shapes: dict[str, Any]) -> Path:
    """A file of tensors that take no bytes: one of their sides is 0."""
    entry = {"dtype": "F32", "data_offsets": [0, 0]}
    text = json.dumps({key: {**entry, "shape": shape} for key, shape in shapes.items()}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def entry(said: Any) -> Tensor:
    """A `comfy_quant` entry of a JSON value or of bytes."""
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def of_vectors(**said: Any) -> Tensor:
    return entry({"format": VQ2, "version": 1, "group_size": 128, **said})


SECONDS = 5.0
"""Of the processor's time, which other programs don't lengthen."""


@contextmanager
def refused(words: str) -> Iterator[None]:
    started = time.thread_time()
    with pytest.raises(CheckpointError, match=words):
        yield
    assert time.thread_time() - started < SECONDS


def write(path: Path, tensors: StateDict, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path
