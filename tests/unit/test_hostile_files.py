"""Model files made to do harm: each is refused in words and at once."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sd35_core.checkpoint.controlnet import controlnet, load_controlnet
from sd35_core.checkpoint.layouts import diffusion_model, from_diffusers
from sd35_core.checkpoint.loading import checked_config, load, shapes_of
from sd35_core.checkpoint.tensor_file import StateDict, TensorFile
from sd35_core.encoders.described import encoder_configs, load_encoders
from sd35_core.encoders.text_encoder import ClipTextModel, clip_g, clip_l
from sd35_core.errors import CheckpointError
from sd35_core.network.config import MMDiTXConfig, Shape, config_from_shapes
from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from sd35_core.network.mmditx import MMDiTX
from sd35_core.workflow import headers
from sd35_core.workflow.lora_files import lora_in
from sd35_core.workflow.setup import Model

from .files import (
    MANY_DIGITS,
    SECONDS,
    embedder,
    in_diffusers_keys,
    refused,
    to_diffusers,
    write,
    write_header,
)
from .models import TINY, finish_gguf, random_weights

WIDE = 2**63


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """torch takes a second to prepare the first tensor without memory."""
    nn.init.kaiming_uniform_(torch.empty(2, 2, device="meta"))


# Sizes


def tiny_shapes() -> dict[str, Shape]:
    return dict(shapes_of(MMDiTX(TINY, device="meta").state_dict()))


BLOCKS: dict[str, tuple[list[str], str]] = {
    "a number of nine digits": (["joint_blocks.999999999.x"], "digits of a block's number is 9;"),
    "5,000 digits": ([f"joint_blocks.{MANY_DIGITS}.x"], "digits of a block's number is 5,000;"),
    "201 blocks": ([f"joint_blocks.{i}.x" for i in range(201)], "blocks is 201; it can be 1 to 20"),
    "a gap": (["joint_blocks.99.x"], r"lacks 95 of 100 blocks: .*99' and no 'joint_blocks\.4'"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_beyond_the_limit_and_gaps_are_refused(name: str, tmp_path: Path) -> None:
    keys, words = BLOCKS[name]
    more = {key: torch.zeros(0) for key in keys}
    path = write(tmp_path / "model.safetensors", {**random_weights(), **more})
    with refused(words):
        load(path)
    started = time.thread_time()
    assert headers.model_in(path) is None
    assert time.thread_time() - started < SECONDS


@pytest.mark.parametrize("name", BLOCKS)
def test_so_are_those_of_the_diffusers_layout(name: str, tmp_path: Path) -> None:
    keys, words = (BLOCKS[name][0], BLOCKS[name][1].replace("joint", "transformer"))
    inner = "attn.norm_q.weight"
    more = {f"{k[:-1]}{inner}".replace("joint", "transformer"): torch.zeros(0) for k in keys}
    path = write(tmp_path / "model.safetensors", {**to_diffusers(random_weights()), **more})
    with refused(words):
        load(path)
    assert headers.model_in(path) is None


@pytest.mark.parametrize("family", ["controlnet_blocks", "transformer_blocks"])
@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([999999999], "digits of a block's number is 9"),
        ([MANY_DIGITS], "digits of a block's number is 5,000"),
        (range(101), "number of ControlNet layers is 101; it can be 1 to 100"),
        ([7], "lacks 5 of 8 blocks"),
        ([2], "3 (controlnet|transformer)_blocks and 2 |2 controlnet_blocks and 3 "),
    ],
)
def test_so_are_a_controlnets_layers(
    family: str, numbers: list[Any], words: str, tmp_path: Path
) -> None:
    more = {f"{family}.{number}.weight": torch.zeros(0) for number in numbers}
    path = write(tmp_path / "control.safetensors", {**embedder("2b").state_dict(), **more})
    with refused(words):
        load_controlnet(path)


SIZES: dict[str, tuple[dict[str, Shape], str]] = {
    "hidden": ({"x_embedder.proj.weight": (64 * 257, 16, 2, 2)}, "width of the blocks is 16,448"),
    "no width": ({"x_embedder.proj.weight": (0, 16, 2, 2)}, "width of the blocks is 0"),
    "2^63 wide": ({"x_embedder.proj.weight": (WIDE, 16, 2, 2)}, "width of the blocks is 9,223"),
    "channels": ({"x_embedder.proj.weight": (128, WIDE, 2, 2)}, "latent channels is 9,223"),
    "patch": ({"x_embedder.proj.weight": (128, 16, 17, 2)}, "side of a patch is 17; it can be"),
    "context": ({"context_embedder.weight": (128, 10**12)}, "encoding is 1,000,000,000,000;"),
    "pooled": ({"y_embedder.mlp.0.weight": (128, 65537)}, "pooled text is 65,537; it can be"),
    "positions": ({"pos_embed": (1, 4097**2, 128)}, "position table is 4,097; it can be 1 to 4,0"),
    "axes": ({"pos_embed_axes": (2, WIDE, 64)}, "position table is 9,223,372,036,854,775,808"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_the_limits_are_refused(name: str) -> None:
    shapes, words = SIZES[name]
    with refused(f"'m.safetensors': .*{words}"):
        config_from_shapes({**tiny_shapes(), **shapes}, "'m.safetensors'")


@pytest.mark.parametrize("layout", ["stability", "diffusers"])
def test_a_header_of_a_few_bytes_asks_for_nothing(layout: str, tmp_path: Path) -> None:
    """Tensors of no values, a side of which is 10^12."""
    weights = random_weights() if layout == "stability" else to_diffusers(random_weights())
    shapes = {key: [64 * 10**12, *[0] * (t.ndim - 1)] for key, t in weights.items() if t.ndim > 1}
    shapes |= {key: [0] for key, t in weights.items() if t.ndim == 1}
    shapes |= {key: [0, 16, 10**12] for key in shapes if key.endswith("pos_embed")}
    path = write_header(tmp_path / "model.safetensors", shapes)
    with refused("width of the blocks is 64,000,000,000,000"):
        load(path)
    assert headers.model_in(path) is None


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("x_embedder.proj.weight", [0, 0, 0, 0], "width of the blocks is 0"),
        ("x_embedder.proj.weight", [10**12, 0, 2, 2], "width of the blocks is 1,000,000,000,000"),
        ("x_embedder.proj.weight", [128, 0, 2, 2], "latent channels is 0"),
        ("y_embedder.mlp.0.weight", [0, 10**12], "pooled text is 1,000,000,000,000"),
    ],
)
def test_a_controlnets_sizes_are_bounded(
    key: str, shape: list[int], words: str, tmp_path: Path
) -> None:
    shapes = {k: [0, *s[1:]] for k, s in shapes_of(embedder("8b").state_dict()).items()}
    shapes["x_embedder.proj.weight"] = [128, 16, 2, 0]
    path = write_header(tmp_path / "control.safetensors", {**shapes, key: shape})
    with refused(words):
        load_controlnet(path)
    headers.control_in(path)


def test_the_largest_network_is_built_at_once() -> None:
    """So a load can be cancelled between tensors and needs no other place."""
    largest = MMDiTXConfig(200, 16384, 65536, 65536, 4096, True, dual_blocks=tuple(range(200)))
    for build in (
        lambda: MMDiTX(largest),
        lambda: ControlNetEmbedder(ControlNetConfig("8b", 100, 16384, 65536)),
        lambda: ClipTextModel(clip_l(16384, 256, 100)),
    ):
        started = time.thread_time()
        with torch.device("meta"):
            build()
        assert time.thread_time() - started < SECONDS


# Headers


@pytest.mark.parametrize("length", [8_000_001, 10**9, 10**12, 2**64 - 1])
def test_a_long_header_is_not_parsed(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + b"{")
        file.truncate(min(length + 8, 2**33))  # takes no room on the disk
    words = f"length of its header in bytes is {length:,}; it can be 0 to 8,000,000"
    with refused(words if length < 2**33 else "can't be read as a safetensors file"):
        TensorFile(path)


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.safetensors", {f"t{i}": [0] for i in range(100_001)})
    with pytest.raises(CheckpointError, match="number of its tensors is 100,001; it can be 0 to"):
        TensorFile(path)


def test_a_file_of_no_tensors_is_read(tmp_path: Path) -> None:
    assert not TensorFile(write_header(tmp_path / "m.safetensors", {}))


LORA_KEYS = (
    f"lora_unet_joint_blocks_{MANY_DIGITS}_x_block_mlp_fc1.lora_up.weight",
    f"transformer_blocks.{MANY_DIGITS}.attn.to_q.lora_A.weight",
)


@pytest.mark.parametrize("key", LORA_KEYS, ids=["Stability's", "diffusers'"])
def test_a_loras_block_of_5000_digits_fits_no_model(key: str, tmp_path: Path) -> None:
    path = write_header(tmp_path / "lora.safetensors", {key: [0]})
    found = lora_in(path, Model(depth=4, hidden=256))
    assert (found.layers, found.matched) == (1, 0)


# Tensors


def test_parts_that_cannot_be_joined_are_named() -> None:
    whole = to_diffusers(random_weights())
    key = "transformer_blocks.1.attn.to_k.weight"
    for odd in (torch.zeros(()), torch.zeros(3, 3), torch.zeros(5, 128, 1)):
        with refused(r"'joint_blocks\.1\.x_block\.attn\.qkv\.weight' can't be put together from"):
            from_diffusers({**whole, key: odd})
    for odd in (torch.zeros(()), torch.zeros(1), torch.zeros(3)):
        with refused("norm_out|final_layer.adaLN_modulation.1.bias"):
            checked_config(from_diffusers({**whole, "norm_out.linear.bias": odd}))
    with refused("blocks is 0|0 blocks|is missing"):
        checked_config(from_diffusers({"proj_out.weight": torch.zeros(2, 2)}))


@pytest.mark.parametrize(
    "module",
    ["lora_unet_pos_embed", "transformer.pos_embed.pos_embed",
     "transformer.joint_blocks.0.attn.to_q",
     "lora_unet_transformer_blocks_0_x_block_attn_qkv"],
)  # fmt: skip
def test_a_lora_of_what_is_no_layer_fits_no_model(module: str, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", {f"{module}.lora_up.weight": torch.zeros(256, 4)})
    found = lora_in(path, Model(depth=4, hidden=256))
    assert (found.layers, found.matched) == (1, 0)


def test_what_lies_beside_a_quantized_part_is_never_joined() -> None:
    """Three marks after one another would be no mark of anything."""
    mark = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    whole = to_diffusers(random_weights(TINY))
    for name in ("comfy_quant", "weight_scale"):
        odd = {f"transformer_blocks.0.attn.to_{part}.{name}": mark for part in "qkv"}
        with refused(f"a tensor 'transformer_blocks.0.attn.to_q.{name}', which diffusers'"):
            from_diffusers({**whole, **odd})


def test_a_controlnets_parts_that_cannot_be_joined_are_named() -> None:
    whole = in_diffusers_keys(embedder("2b").state_dict())
    with refused(r"'transformer_blocks\.0\.attn\.qkv\.weight' can't be put together"):
        controlnet({**whole, "transformer_blocks.0.attn.to_v.weight": torch.zeros(())})


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([torch.nan]),
        torch.tensor([torch.inf]),
        torch.tensor(0.5),
        torch.tensor([True]),
        torch.tensor([-1]),
        torch.tensor([300.0]).to(torch.float8_e5m2),
    ],
    ids=["nan", "inf", "fraction", "bool", "negative", "fp8"],
)
def test_a_control_type_that_is_no_type_is_refused(value: Tensor, tmp_path: Path) -> None:
    tensors = {**embedder("2b").state_dict(), "control_type": value}
    with refused("has control_type .*; known are 0 .blur., 1 .canny., 2 .depth."):
        load_controlnet(write(tmp_path / "control.safetensors", tensors))


def test_weights_that_are_no_fractions_are_refused(tmp_path: Path) -> None:
    key = "joint_blocks.1.x_block.mlp.fc1.bias"
    for dtype in (torch.int64, torch.int8, torch.bool):
        tensors = {**random_weights(), key: torch.zeros(512, dtype=dtype)}
        with refused(f"'{key}' holds {dtype!s:.11}".replace("torch.", "")):
            load(write(tmp_path / "model.safetensors", tensors))


class Counted(TensorFile):
    """A file that counts how often its tensors are read."""

    reads = 0

    def __getitem__(self, key: str) -> Tensor:
        self.reads += 1
        return super().__getitem__(key)


def test_a_check_reads_each_tensor_once(tmp_path: Path) -> None:
    file = Counted(write(tmp_path / "model.safetensors", random_weights()))
    checked_config(file)
    assert file.reads == len(file)


def test_a_check_reads_nothing_of_a_file_that_lacks_something(tmp_path: Path) -> None:
    weights = random_weights()
    del weights["final_layer.linear.bias"]
    weights["joint_blocks.0.x_block.mlp.fc1.weight"] = torch.zeros(2, 2)
    file = Counted(write(tmp_path / "model.safetensors", weights))
    with refused("lacks 1 of"):
        checked_config(file)
    assert file.reads == 0


# Text encoders


def described(**sizes: Any) -> dict[str, str]:
    whole = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, **sizes}
    return {"sd35_config": json.dumps({"text_encoders": {"clip_l": whole, "clip_g": whole}})}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_hidden_layers": 10**6}, "text encoder layers is 1,000,000; it can be 1 to 100"),
        ({"num_hidden_layers": 0}, "text encoder layers is 0"),
        ({"num_hidden_layers": True}, r"text encoder layers is no whole number \(bool\)"),
        ({"hidden_size": 2**63}, "width of the text encoder is 9,223"),
        ({"hidden_size": 48.0}, r"width of the text encoder is no whole number \(float\)"),
        ({"hidden_size": [48]}, r"width of the text encoder is no whole number \(list\)"),
        ({"num_attention_heads": 257}, "encoder's heads is 257; it can be 1 to 256"),
        ({"num_attention_heads": 5}, "5 heads can't share a width of 48 evenly"),
        ({"hidden_size": None}, "no whole number"),
    ],
)
def test_sizes_in_the_metadata_are_bounded(sizes: dict[str, Any], words: str) -> None:
    with refused(f"'m.safetensors'.*clip_l.*{words}"):
        encoder_configs(described(**sizes), "m.safetensors")


def encoder_file(path: Path, metadata: dict[str, str], change: Callable[[StateDict], Any]) -> Path:
    tensors = {}
    for name, config in (("clip_l", clip_l(48, 3, 2)), ("clip_g", clip_g(48, 3, 2))):
        state = ClipTextModel(config).state_dict()
        tensors |= {f"text_encoders.{name}.transformer.{key}": t for key, t in state.items()}
    change(tensors)
    return write(path, tensors, metadata)


FC1 = "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1."


@pytest.mark.parametrize(
    ("sizes", "change", "words"),
    [
        ({"num_hidden_layers": 100, "hidden_size": 16384, "num_attention_heads": 256}, None,
         "has 2 layers, the metadata 'sd35_config' describes 100"),
        ({"hidden_size": 16384, "num_attention_heads": 256}, None, r"expected \[49408, 16384\]"),
        ({}, {FC1 + "bias": None}, "lacks 1 of .*fc1.bias"),
        ({}, {FC1 + "weight": torch.zeros(1)}, r"has shape \[1\], expected \[192, 48\]"),
        ({}, {FC1 + "bias": torch.full((192,), torch.nan)}, "NaN"),
        ({}, {FC1.replace(".1.", f".{MANY_DIGITS}.") + "bias": torch.zeros(1)}, "is 5,000; it can"),
        ({}, {FC1.replace(".1.", ".50.") + "bias": torch.zeros(1)}, "lacks 48 of 51 blocks"),
    ],
)  # fmt: skip
def test_text_encoders_are_built_for_what_the_file_holds(
    sizes: dict[str, int], change: StateDict | None, words: str, tmp_path: Path
) -> None:
    def changed(tensors: StateDict) -> None:
        for key, tensor in (change or {}).items():
            tensors.pop(key, None)
            tensors |= {} if tensor is None else {key: tensor}

    path = encoder_file(tmp_path / "m.safetensors", described(**sizes), changed)
    with refused(words):
        load_encoders(TensorFile(path))


def test_text_encoders_that_are_described_and_not_there_are_never_built(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 100, "hidden_size": 16384, "num_attention_heads": 256}
    path = encoder_file(tmp_path / "m.safetensors", described(**sizes), StateDict.clear)
    with refused("The text encoder clip_l in 'm.safetensors' has 0 layers, .* describes 100"):
        load_encoders(TensorFile(path))


def test_sound_text_encoders_load_without_a_projection_that_is_not_used(tmp_path: Path) -> None:
    path = encoder_file(tmp_path / "m.safetensors", described(), len)
    assert len(load_encoders(TensorFile(path))) == 2


# GGUF


def gguf_file(path: Path, about: Callable[[Any], Any]) -> Path:
    gguf = pytest.importorskip("gguf", reason="gguf is optional; python tools/test.py gets it")
    writer = gguf.GGUFWriter(path, "sd3")
    about(writer)
    weight = "joint_blocks.0.x_block.attn.qkv.weight"
    finish_gguf(writer, {"pos_embed": torch.zeros(16, 128), weight: torch.zeros(4, 32)})
    return path


ORIGINAL = "comfy.gguf.orig_shape.pos_embed"


@pytest.mark.parametrize(
    "about",
    [
        lambda writer: writer.add_uint32(ORIGINAL, 7),
        lambda writer: writer.add_string(ORIGINAL, "1, 16, 128"),
        lambda writer: writer.add_array(ORIGINAL, ["1", "16", "128"]),
        lambda writer: writer.add_array(ORIGINAL, [1, 16, 127]),
        lambda writer: writer.add_array(ORIGINAL, [-1, -16, 128]),
        lambda writer: writer.add_array(ORIGINAL, [1.0, 16.0, 128.0]),
        lambda writer: writer.add_bool(ORIGINAL, True),
    ],
    ids=["number", "text", "texts", "product", "negative", "fractions", "switch"],
)
def test_a_gguf_shape_that_is_none_is_refused(about: Callable[[Any], Any], tmp_path: Path) -> None:
    from sd35_core.checkpoint.gguf_file import GGUFFile

    path = gguf_file(tmp_path / "model.gguf", about)
    for read in (GGUFFile.shape, GGUFFile.__getitem__):
        with refused("'model.gguf': the shape of 'pos_embed' is given as .* 2,048 values"):
            read(GGUFFile(path), "pos_embed")
    assert headers.model_in(path) is None


def test_a_gguf_of_more_values_than_any_model_has_is_refused(tmp_path: Path) -> None:
    from sd35_core.checkpoint.gguf_file import GGUFFile

    path = gguf_file(tmp_path / "m.gguf", lambda writer: writer.add_array("x", [1] * 250_000))
    with pytest.raises(CheckpointError, match="values in its header is 200,001; it can be 1 to"):
        GGUFFile(path)


def test_a_gguf_of_a_block_without_end_is_refused(tmp_path: Path) -> None:
    from sd35_core.checkpoint.gguf_file import GGUFFile

    def more(writer: Any) -> None:
        writer.add_tensor("joint_blocks.999999999.x", torch.zeros(1).numpy())

    path = gguf_file(tmp_path / "model.gguf", more)
    with refused("digits of a block's number is 9"):
        checked_config(diffusion_model(GGUFFile(path)))
    assert headers.model_in(path) is None
