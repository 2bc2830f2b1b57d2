"""Packed layers that are damaged or lie: each is refused in words, before sampling."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sd35_core.checkpoint.controlnet import load_controlnet
from sd35_core.checkpoint.loading import load
from sd35_core.checkpoint.tensor_file import StateDict
from sd35_core.errors import SD35Error
from sd35_core.network.config import MMDiTXConfig
from sd35_core.packing.formats import FP8, INT8, VQ2, pack
from sd35_core.packing.layers import PackedLinear
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantized

from .files import (
    embedder,
    entry,
    of_vectors,
    refused,
    write,
    write_header,
)
from .models import random_inputs, random_weights

PACKABLE = MMDiTXConfig(
    depth=2, hidden=128, context_dim=96, pooled_dim=40, pos_embed_max_size=8, qk_norm=True,
    dual_blocks=(0,),
)  # fmt: skip
LAYER = "joint_blocks.0.x_block.mlp.fc1"
CONTROL_LAYER = "transformer_blocks.0.mlp.fc1"
VECTORS = {
    "entry of int16": ({"comfy_quant": of_vectors().short() + 300}, "how it is packed .*int16"),
    "entry of two dimensions": ({"comfy_quant": of_vectors()[None]}, "with 2 dimensions"),
    "entry of none": ({"comfy_quant": torch.tensor(1, dtype=torch.uint8)}, "with 0 dimensions"),
    "entry without bytes": ({"comfy_quant": entry(b"")}, "comfy_quant in bytes is 0"),
    "long entry": ({"comfy_quant": of_vectors(x="y" * 4096)}, "in bytes is 4,1.*1 to 4,096"),
    "no JSON": ({"comfy_quant": entry(b"sd35_vq2")}, "does not say how it is packed"),
    "no UTF-8": ({"comfy_quant": entry(b"\xff\xfe\xfa")}, "does not say how it is packed"),
    "deep JSON": ({"comfy_quant": entry(b"[" * 4000)}, "does not say how it is packed"),
    "no object": ({"comfy_quant": entry([VQ2])}, "it names no format"),
    "no format": ({"comfy_quant": entry({"version": 1})}, "it names no format"),
    "format of a list": ({"comfy_quant": of_vectors(format=[VQ2])}, "it names no format"),
    "version 0": ({"comfy_quant": of_vectors(version=0)}, "version 0. Known here are"),
    "version 2": ({"comfy_quant": of_vectors(version=2)}, "version 2. Known here are"),
    "version of text": ({"comfy_quant": of_vectors(version="1")}, "version 1. Known here are"),
    "version true": ({"comfy_quant": of_vectors(version=True)}, "version True. Known here are"),
    "other groups": ({"comfy_quant": of_vectors(group_size=64)}, "a scale for 64 weights"),
    "unknown format": ({"comfy_quant": entry({"format": "int3"})}, "packed as int3, version 1"),
    "rotated": ({"comfy_quant": entry({"format": INT8, "params": {"convrot": True}})}, "convrot"),
    "signed codes": ({"weight": torch.zeros(512, 32, dtype=torch.int8)}, "codes of torch.int8"),
    "codes as floats": ({"weight": torch.zeros(512, 32)}, "codes of torch.float32, expected"),
    "one scale": ({"weight_scale": torch.tensor(1.0)}, r"weight_scale of shape \[\], expected"),
    "whole scales": ({"weight_scale": torch.ones(512, 1).int()}, "scales of torch.int32, expected"),
    "scales NaN": ({"weight_scale": torch.full((512, 1), torch.nan)}, "scales that are NaN"),
    "no scales": ({"weight_scale": None}, "weight_scale missing"),
    "codebook NaN": ({"weight_codebook": torch.full((256, 4), torch.nan)}, "entries that are NaN"),
    "codebook inf": ({"weight_codebook": torch.full((256, 4), torch.inf)}, "entries that are NaN"),
    "codebook of bytes": ({"weight_codebook": torch.ones(256, 4).byte()}, "entries of torch.uint8"),
    "short codebook": ({"weight_codebook": torch.ones(16, 4)}, r"codebook of shape \[16, 4\]"),
    "long bias": ({"bias": torch.zeros(513)}, r"bias' has shape \[513\], expected \[512\]"),
    "bias NaN": ({"bias": torch.full((512,), torch.nan)}, "NaN"),
}  # fmt: skip
"""What of a 2-bit layer (512, 128) is replaced, and the words that it is refused with."""

EIGHT = {
    "int8 as bytes": (INT8, {"weight": torch.zeros(512, 128, dtype=torch.uint8)}, "torch.uint8"),
    "int8 without scales": (INT8, {"weight_scale": None}, "weight_scale missing"),
    "int8 with a scale per input": (INT8, {"weight_scale": torch.ones(1, 128)}, r"\[1, 128\]"),
    "int8 with infinite scales": (INT8, {"weight_scale": torch.full((512, 1), torch.inf)}, "NaN"),
    "int8 of a row": (INT8, {"weight": torch.zeros(128).char()}, r"weight of shape \[128\]"),
    "fp8 as bytes": (FP8, {"weight": torch.zeros(512, 128).byte()}, "codes of torch.uint8"),
    "fp8 without a scale": (FP8, {"weight_scale": None}, "weight_scale missing"),
    "fp8 with many scales": (FP8, {"weight_scale": torch.ones(512)}, r"of shape \[512\], expected"),
    "fp8 with a whole scale": (FP8, {"weight_scale": torch.tensor(1)}, "scales of torch.int64"),
}  # fmt: skip

ELSEWHERE = {
    "an unknown layer": ("joint_blocks.0.x_block.nothing", "does not have"),
    "the convolution": ("x_embedder.proj", "can not have packed"),
    "a norm": ("joint_blocks.0.x_block.attn.ln_q", "can not have packed"),
    "no layer": ("", "does not have"),
}


def replaced(tensors: StateDict, layer: str, changes: Mapping[str, Tensor | None]) -> StateDict:
    named = {f"{layer}.{name}": tensor for name, tensor in changes.items()}
    both = {**tensors, **named}
    return {key: tensor for key, tensor in both.items() if tensor is not None}


@pytest.fixture(scope="module")
def packed_model() -> StateDict:
    """At 2 bits, at 8 where that is needed."""
    return quantized(random_weights(PACKABLE), Plan(2))[0]


@pytest.fixture(scope="module")
def packed_control() -> StateDict:
    return quantized(embedder("8b").state_dict(), Plan(2))[0]


@pytest.mark.parametrize("name", VECTORS)
def test_damaged_2_bit_layers_are_refused(
    name: str, packed_model: StateDict, packed_control: StateDict, tmp_path: Path
) -> None:
    changes, words = VECTORS[name]
    with refused(words):
        load(write(tmp_path / "m.safetensors", replaced(packed_model, LAYER, changes)))
    with refused(words):
        tensors = replaced(packed_control, CONTROL_LAYER, changes)
        load_controlnet(write(tmp_path / "c.safetensors", tensors))


@pytest.mark.parametrize("name", EIGHT)
def test_damaged_8_bit_layers_are_refused(
    name: str, packed_model: StateDict, tmp_path: Path
) -> None:
    form, changes, words = EIGHT[name]
    whole = replaced(packed_model, LAYER, {**dict.fromkeys(["weight_codebook"]), **eight(form)})
    load(write(tmp_path / "sound.safetensors", whole))
    with refused(words):
        load(write(tmp_path / "m.safetensors", replaced(whole, LAYER, changes)))


def eight(form: str) -> StateDict:
    return dict(pack(random_weights(PACKABLE)[f"{LAYER}.weight"], form))


@pytest.mark.parametrize("form", [INT8, FP8])
@pytest.mark.parametrize("scale", [torch.tensor(0.01), torch.tensor([0.01])])
def test_8_bits_run_with_one_scale(
    form: str, scale: Tensor, packed_model: StateDict, tmp_path: Path
) -> None:
    """As ComfyUI's own layers do; beside it may stand the input's scale, which is not used."""
    changes = {**eight(form), "weight_scale": scale, "input_scale": 2 * scale}
    tensors = replaced(packed_model, LAYER, {"weight_codebook": None, **changes})
    model = load(write(tmp_path / "m.safetensors", tensors), dtype=torch.float32)
    assert torch.isfinite(model(*random_inputs(PACKABLE))).all()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_only_linear_layers_can_be_packed(
    name: str, packed_model: StateDict, tmp_path: Path
) -> None:
    layer, words = ELSEWHERE[name]
    for said in (of_vectors(), entry({"format": "nvfp4"}), torch.zeros(2, 2).short()):
        tensors = replaced(packed_model, layer, {"comfy_quant": said})
        with refused(f"says that '{layer}.weight' is packed, which a .* {words}"):
            load(write(tmp_path / "m.safetensors", tensors))


def test_a_layer_whose_width_is_no_multiple_of_the_group_is_refused() -> None:
    state = {
        "weight": torch.zeros(64, 24, dtype=torch.uint8),
        "weight_scale": torch.zeros(64, 0),
        "weight_codebook": torch.zeros(256, 4),
        "comfy_quant": of_vectors(),
    }
    with refused("has 96 inputs, expected a multiple of 128"):
        PackedLinear(96, 64, bias=False, device="meta").load_state_dict(state, assign=True)


def test_scales_beside_a_plain_weight_hide_nothing(tmp_path: Path) -> None:
    """Without a comfy_quant entry the weight must be one."""
    changes = {"weight": torch.zeros(3, 3), "weight_scale": torch.tensor(1.0)}
    with refused(r"has shape \[3, 3\], expected \[512, 128\]"):
        load(write(tmp_path / "m.safetensors", replaced(random_weights(), LAYER, changes)))


def test_a_good_file_loads_after_all_of_them(packed_model: StateDict, tmp_path: Path) -> None:
    with suppress(SD35Error):
        load(write_header(tmp_path / "bad.safetensors", {"joint_blocks.999999999.x": [0]}))
    model = load(write(tmp_path / "good.safetensors", packed_model), dtype=torch.float32)
    assert torch.isfinite(model(*random_inputs(PACKABLE))).all()
