"""Damaged and hostile files: every reader gives its result or an error for a person, never more.

SD35_FUZZ_INPUTS says how many inputs each reader gets; without it a few, the same every time.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis comes with python tools/test.py")

from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from sd35_core.checkpoint.controlnet import load_controlnet
from sd35_core.checkpoint.layouts import diffusion_model
from sd35_core.checkpoint.loading import checked_config, load
from sd35_core.checkpoint.tensor_file import DTYPES, StateDict, TensorFile, pieces_of
from sd35_core.encoders.described import SIZES as ENCODER_SIZES
from sd35_core.encoders.described import check_encoder, encoder_configs
from sd35_core.limits import PIECES
from sd35_core.network.config import MMDiTXConfig
from sd35_core.packing.formats import FORMATS, VQ2
from sd35_core.packing.vectors import GROUP
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantized
from sd35_core.training.config import TrainingConfig, read_config
from sd35_core.workflow import headers
from sd35_core.workflow.lora_files import lora_in
from sd35_core.workflow.setup import Model

from ..fuzzing import JUNK, SIZES, WRITTEN, survives
from .files import embedder, to_diffusers
from .models import finish_gguf, random_inputs, random_model, random_weights

KEYS = st.sampled_from(
    [
        "joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.x.context_block.attn.ln_k.weight",
        "x_embedder.proj.weight", "pos_embed", "context_embedder.weight", "y_embedder.mlp.0.weight",
        "transformer_blocks.0.attn.add_q_proj.weight", "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.9.attn2.to_q.weight", "transformer_blocks.0", "transformer_blocks.a.b",
        "proj_out.weight", "pos_embed.proj.weight", "controlnet_blocks.0.weight",
        "pos_embed_input.proj.weight", "pos_embed_input.proj.bias", "decoder.conv_in.weight",
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
        "joint_blocks.0.x_block.attn.qkv.weight_scale", "model.diffusion_model.", "",
    ]
) | st.text(max_size=12)  # fmt: skip
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "", "f32"]) | JUNK,
        "shape": st.lists(SIZES, max_size=5) | JUNK,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JUNK,
    },
)


@st.composite
def whole(draw: st.DrawFn) -> bytes:
    """A sound safetensors file with a model's keys and shapes that fit nothing."""
    shapes = draw(
        st.dictionaries(KEYS, st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=8)
    )
    metadata = draw(st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3))
    return save({key: torch.zeros(shape) for key, shape in shapes.items()}, metadata or None)


@st.composite
def damaged(draw: st.DrawFn, sound: st.SearchStrategy[bytes]) -> bytes:
    """A sound file with bytes changed, cut off or put in."""
    data = bytearray(draw(sound))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["change", "cut", "insert", "number"]))
        if how == "cut":
            del data[place:]
        elif how == "insert":
            data[place:place] = draw(st.binary(max_size=16))
        elif how == "number":
            data[place : place + 8] = struct.pack("<q", draw(st.integers(-(2**63), 2**63 - 1)))
        elif data:
            data[place] = draw(st.integers(0, 255))
    return bytes(data)


@st.composite
def made_up(draw: st.DrawFn) -> bytes:
    """A header of one's own: wrong types, overlaps, absurd shapes, a length that lies."""
    header = draw(st.dictionaries(KEYS | st.just("__metadata__"), ENTRY | JUNK, max_size=6) | JUNK)
    text = json.dumps(header).encode()
    if draw(st.integers(0, 20)) == 0:
        text = b"[" * 20_000 + text
    length = draw(st.just(len(text)) | SIZES | st.integers(0, 2**64 - 1)) % 2**64
    return length.to_bytes(8, "little") + text + draw(st.binary(max_size=64))


SAFETENSORS = made_up() | damaged(whole()) | whole() | st.binary(max_size=64)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sound.safetensors"
    path.write_bytes(save({"a": torch.ones(2, 3)}))
    assert TensorFile(path)["a"].shape == (2, 3)


def read_all(path: Path) -> None:
    """Every tensor alone, none larger than the file."""
    file = survives(lambda: TensorFile(path))
    for key in file or ():
        tensor = survives(lambda key=key: file[key])
        if tensor is not None:
            assert tensor.numel() * tensor.element_size() <= path.stat().st_size
    if file is not None:
        survives(lambda: checked_config(diffusion_model(file)))


@WRITTEN
@given(SAFETENSORS)
def test_safetensors(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    read_all(path)
    survives(lambda: headers.model_in(path))
    survives(lambda: headers.control_in(path))
    survives(lambda: headers.vae_channels(path))
    survives(lambda: lora_in(path, Model(depth=4, hidden=256)))


@WRITTEN
@given(
    st.text(max_size=12).map(lambda text: text.replace("/", "").replace("\0", "")),
    st.integers(-1, 10**6),
    st.integers(-1, 10**6),
    st.booleans(),
)
def test_names_of_a_models_files(name: str, number: int, count: int, last: bool) -> None:
    ending = "-00002-of-00002" if last else ""
    found = survives(
        lambda: pieces_of(Path(f"{name}-{number:05}-of-{count:05}{ending}.safetensors"))
    )
    assert found is None or 1 <= len(found) <= PIECES.most


GGUF_TENSORS = {
    "pos_embed": torch.zeros(4, 8),
    "joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(4, 32),
}


@pytest.fixture(scope="module")
def sound_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    gguf = pytest.importorskip("gguf", reason="gguf is optional; python tools/test.py gets it")
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer = gguf.GGUFWriter(path, "sd3")
    writer.add_string("general.name", "fuzzed")
    writer.add_array("comfy.gguf.orig_shape.pos_embed", [1, 4, 8])
    finish_gguf(writer, GGUF_TENSORS)
    return path.read_bytes()


def test_gguf(tmp_path_factory: pytest.TempPathFactory, sound_gguf: bytes) -> None:
    from sd35_core.checkpoint.gguf_file import GGUFFile

    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(sound_gguf)
    assert GGUFFile(path)["pos_embed"].shape == (1, 4, 8)

    @WRITTEN
    @given(damaged(st.just(sound_gguf)) | st.binary(max_size=64).map(lambda b: b"GGUF" + b))
    def read(data: bytes) -> None:
        path.write_bytes(data)
        file = survives(lambda: GGUFFile(path))
        for key in file or ():
            tensor = survives(lambda key=key: file[key])
            assert tensor is None or tensor.numel() <= 8 * len(data)
        survives(lambda: headers.model_in(path))

    read()


@WRITTEN
@given(
    JUNK.map(json.dumps) | st.text(max_size=30) | st.just("[" * 50_000),
    st.sampled_from(["{}", '{"text_encoders": %s}', "%s"]),
    st.sampled_from(["%s", '{"clip_l": %s, "clip_g": %s}', '{"clip_l": %s}']),
)
def test_metadata(text: str, outer: str, inner: str) -> None:
    described = inner.replace("%s", text)
    survives(lambda: encoder_configs({"sd35_config": outer.replace("%s", described)}, "a file"))


A_SIZE = st.sampled_from([1, 2, 48, 100, 101, 16384, 10**6]) | SIZES | JUNK
ENCODER = st.fixed_dictionaries(dict.fromkeys(ENCODER_SIZES["clip_l"], A_SIZE))
ENCODER_T5 = st.fixed_dictionaries(dict.fromkeys(ENCODER_SIZES["t5xxl"], A_SIZE))


@WRITTEN
@given(ENCODER, ENCODER, st.none() | ENCODER_T5, st.sets(st.integers(0, 10**6), max_size=3))
def test_sizes_of_text_encoders(first: Any, second: Any, third: Any, layers: set[int]) -> None:
    described = {"clip_l": first, "clip_g": second, **({"t5xxl": third} if third else {})}
    metadata = {"sd35_config": json.dumps({"text_encoders": described})}
    configs = survives(lambda: encoder_configs(metadata, "a file"))
    names = ("text_model.encoder.layers.{}.mlp.fc1.bias", "encoder.block.{}.layer.0.q.weight")
    tensors = {name.format(i): torch.zeros(4) for i in layers for name in names}
    for config in (configs or {}).values():
        width, heads, depth = config.size
        assert width <= 16384 and depth <= 100 and width % heads == 0
        survives(lambda config=config: check_encoder(tensors, config, "a file"))


PACKABLE = MMDiTXConfig(1, 128, 64, 40, 4, qk_norm=True, dual_blocks=(0,))
"""The smallest model whose layers can have 2 bits."""


@pytest.fixture(scope="module")
def packed() -> dict[str, StateDict]:
    """A model and a ControlNet with layers of every format."""
    model = quantized(random_weights(PACKABLE), Plan(2))[0]
    control = quantized(embedder("8b", 1).state_dict(), Plan(2))[0]
    for tensors, layer in ((model, "joint_blocks.0.x_block"), (control, "transformer_blocks.0")):
        fp8 = {"weight": torch.zeros(384, 128).to(torch.float8_e4m3fn)}
        fp8 |= {"weight_scale": torch.tensor(1.0), "comfy_quant": as_entry({"format": FORMATS[1]})}
        del tensors[f"{layer}.attn.qkv.weight_codebook"]
        tensors |= {f"{layer}.attn.qkv.{name}": tensor for name, tensor in fp8.items()}
    return {"model": model, "control": control}


def as_entry(said: Any) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


QUANT = st.fixed_dictionaries(
    {"format": st.sampled_from([*FORMATS, "nvfp4", "float8_e5m2"]) | JUNK},
    optional={
        "version": st.sampled_from([0, 1, 2, True, "1"]) | JUNK,
        "group_size": st.sampled_from([GROUP, 64, 0]) | JUNK,
        "convrot": JUNK,
        "params": st.fixed_dictionaries({}, optional={"convrot": JUNK}) | JUNK,
    },
)
TYPES = st.sampled_from(sorted({*DTYPES.values()}, key=str))
SIDES = st.sampled_from([0, 1, 4, 32, 40, 64, 128, 256, 384, 512])
ENTRY_TENSORS = st.one_of(
    st.none(),
    QUANT.map(as_entry),
    JUNK.map(as_entry),
    st.tuples(QUANT.map(as_entry), TYPES).map(lambda both: both[0].to(both[1])),
    QUANT.map(lambda said: as_entry(said)[None]),
    st.binary(max_size=5).map(lambda text: torch.tensor(list(text), dtype=torch.uint8)),
    st.just(5000).map(lambda length: torch.zeros(length, dtype=torch.uint8)),
    st.tuples(
        st.lists(SIDES, max_size=2), TYPES, st.sampled_from([0.0, 1.0, 300.0, torch.nan])
    ).map(lambda each: torch.full(each[0], each[2]).to(each[1])),
)
LAYERS = {
    "model": ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.mlp.fc1",
              "joint_blocks.0.x_block.attn2.proj", "context_embedder", "x_embedder.proj",
              "joint_blocks.0.x_block.attn.ln_q", "final_layer.linear", "y_embedder.mlp.0",
              "joint_blocks.0.x_block.odd", ""],
    "control": ["transformer_blocks.0.attn.qkv", "transformer_blocks.0.mlp.fc2", "x_embedder.proj",
                "controlnet_blocks.0", "pos_embed_input.proj", "t_embedder.mlp.0", "odd", ""],
}  # fmt: skip
SUFFIXES = ["comfy_quant", "weight", "weight_scale", "weight_codebook", "bias", "input_scale", "x"]


@st.composite
def damaged_layers(draw: st.DrawFn, layers: list[str]) -> dict[str, Tensor | None]:
    """Entries to put in place of a packed file's own; None takes one away."""
    keys = st.tuples(st.sampled_from(layers), st.sampled_from(SUFFIXES)).map(".".join)
    return draw(st.dictionaries(keys, ENTRY_TENSORS, min_size=1, max_size=3))


@pytest.mark.parametrize("kind", ["model", "control"])
def test_packed_layers(
    kind: str, packed: dict[str, StateDict], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is loaded also runs: nothing is left to fail, bare, while a picture is drawn."""
    path = tmp_path_factory.getbasetemp() / f"packed {kind}.safetensors"
    x, timestep, _, y = random_inputs(PACKABLE, batch=1, size=(4, 4))
    base = random_model(PACKABLE)

    def read_and_run() -> Tensor:
        if kind == "model":
            model = load(path, dtype=torch.float32)
            return model(*random_inputs(model.config, batch=1, size=(4, 4)))
        return load_controlnet(path, dtype=torch.float32)(base, x, timestep, y, x)[0]

    @WRITTEN
    @given(damaged_layers(LAYERS[kind]))
    def read(changes: dict[str, Tensor | None]) -> None:
        whole = {**packed[kind], **changes}
        path.write_bytes(save({key: tensor for key, tensor in whole.items() if tensor is not None}))
        with torch.no_grad():
            survives(read_and_run)
        survives(lambda: headers.model_in(path))

    path.write_bytes(save(packed[kind]))
    assert VQ2.encode() in path.read_bytes() and read_and_run().shape[0] == 1
    read()


NUMBERS = st.sampled_from(
    ["0", "1", "2", "00", "99", "200", "9999", "10000", "999999999", "9" * 5000, "-1", "1e3", "²",
     "٣"]
) | st.text("0123456789.-_ x", max_size=6)  # fmt: skip
FAMILIES = st.sampled_from(
    ["joint_blocks", "transformer_blocks", "controlnet_blocks", "lora_unet_joint_blocks"]
)


@pytest.fixture(scope="module")
def sound() -> list[StateDict]:
    """A model in both layouts and a ControlNet, of zeros."""
    weights = random_weights(MMDiTXConfig(2, 64, 32, 40, 4, qk_norm=True))
    control = embedder("2b", 1).state_dict()
    layouts = weights, to_diffusers(weights), control
    return [{key: torch.zeros_like(tensor) for key, tensor in each.items()} for each in layouts]


def test_block_numbers(sound: list[StateDict], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.safetensors"
    keys = st.tuples(
        FAMILIES,
        st.sampled_from([".", "_"]),
        NUMBERS,
        st.sampled_from([".weight", ".x_block.mlp.fc1.bias", ".attn.to_q.weight", "_x", "."]),
    ).map("".join)

    @WRITTEN
    @given(st.integers(0, 2), st.sets(keys, min_size=1, max_size=3))
    def read(which: int, more: set[str]) -> None:
        path.write_bytes(save({**sound[which], **{key: torch.zeros(2) for key in more}}))
        survives(lambda: load(path))
        survives(lambda: load_controlnet(path))
        survives(lambda: headers.model_in(path))
        survives(lambda: headers.control_in(path))
        survives(lambda: lora_in(path, Model(depth=4, hidden=128)))

    read()


def test_gguf_metadata(tmp_path_factory: pytest.TempPathFactory) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is optional; python tools/test.py gets it")
    from sd35_core.checkpoint.gguf_file import SHAPE, GGUFFile

    path = tmp_path_factory.getbasetemp() / "metadata.gguf"
    types = gguf.GGUFValueType
    whole = st.integers(0, 2**31 - 1)
    value = st.one_of(
        st.tuples(st.text(max_size=6), st.just(types.STRING)),
        st.tuples(whole, st.just(types.UINT32)),
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.just(types.INT64)),
        st.tuples(st.floats(width=32), st.just(types.FLOAT32)),
        st.tuples(st.booleans(), st.just(types.BOOL)),
        st.tuples(
            st.lists(st.sampled_from([1, 4, 8, 32, 0, -1, 2**31 - 1]), min_size=1, max_size=4)
            | st.lists(st.text(max_size=4), min_size=1, max_size=3)
            | st.lists(st.floats(width=32), min_size=1, max_size=3)
            | st.lists(st.booleans(), min_size=1, max_size=3),
            st.just(types.ARRAY),
        ),
    )
    key = st.sampled_from(
        ["general.architecture", "general.name", "general.alignment", SHAPE + "pos_embed",
         SHAPE + "joint_blocks.0.x_block.attn.qkv.weight", SHAPE, "x"]
    )  # fmt: skip

    @WRITTEN
    @given(st.dictionaries(key, value, max_size=4))
    def read(about: dict[str, tuple[Any, Any]]) -> None:
        writer = gguf.GGUFWriter(path, "sd3")
        for name, (said, kind) in about.items():
            writer.kv_data[0].pop(name, None)
            writer.add_key_value(name, said, kind)
        finish_gguf(writer, GGUF_TENSORS)
        file = survives(lambda: GGUFFile(path))
        for tensor in file or ():
            survives(lambda tensor=tensor: file[tensor])
        survives(lambda: headers.model_in(path))

    read()


SETTINGS = list(TrainingConfig.__dataclass_fields__)
ENTRIES = st.integers(-16, 64) | st.text("~/a\0", max_size=4)


@WRITTEN
@given(
    st.dictionaries(
        st.sampled_from(SETTINGS),
        st.integers()
        | st.floats(allow_nan=False)
        | st.booleans()
        | st.text("ab/.\\", max_size=6)
        | st.lists(ENTRIES | st.lists(ENTRIES, max_size=3), max_size=3),
        max_size=8,
    ).map(lambda d: "\n".join(f"{key} = {json.dumps(value)}" for key, value in d.items()))
    | st.text(max_size=60)
    | st.just("a=" + "[" * 20_000)
)
def test_toml(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    survives(lambda: read_config(path))
