"""Damaged and hostile files: every reader gives its result or an error for a person, never more.

SD35_FUZZ_INPUTS says how many inputs each reader gets; without it a few, the same every time.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis comes with python tools/test.py")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sd35_core import headers
from sd35_core.checkpoint import DTYPES, TensorFile, checked_config, diffusion_model
from sd35_core.errors import SD35Error
from sd35_core.preflight import Model
from sd35_core.text_encoder import encoder_configs
from sd35_core.training import TrainingConfig, read_config
from sd35_core.workflow import check, files_under

INPUTS = int(os.environ.get("SD35_FUZZ_INPUTS", 0))
SECONDS = 5.0
"""What reading an input of a few kilobytes may take on a busy machine before it counts as hung."""
WRITTEN = settings(
    max_examples=INPUTS or 150,
    derandomize=not INPUTS,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SIZES = st.sampled_from([0, 1, 2, 3, 16, 64, -1, 2**31, 2**63 - 1, 2**64])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | SIZES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
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


def survives(read: Callable[[], Any]) -> Any:
    """What `read` gives; None after one of our errors. Anything else it raises is a finding."""
    started = time.perf_counter()
    try:
        return read()
    except SD35Error as error:
        assert len(str(error)) > 20
        return None
    finally:
        assert time.perf_counter() - started < SECONDS


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
    survives(lambda: headers.matched_keys(path, Model(depth=4, hidden=256)))


@pytest.fixture(scope="module")
def sound_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    gguf = pytest.importorskip("gguf", reason="gguf is optional; python tools/test.py gets it")
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer = gguf.GGUFWriter(path, "sd3")
    writer.add_string("general.name", "fuzzed")
    writer.add_array("comfy.gguf.orig_shape.pos_embed", [1, 4, 8])
    writer.add_tensor("pos_embed", torch.zeros(4, 8).numpy())
    writer.add_tensor("joint_blocks.0.x_block.attn.qkv.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_gguf(tmp_path_factory: pytest.TempPathFactory, sound_gguf: bytes) -> None:
    from sd35_core.gguf_file import GGUFFile

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


TRICKS = ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "\0", "a" * 5000, "CON", "."]
VALUES = JUNK | st.sampled_from(TRICKS) | st.lists(st.sampled_from(["1", "2", 0, 1, 9]), max_size=3)
CLASSES = st.sampled_from(
    [
        "SD35Loader", "SD35Sampler", "SkipLayerGuidance", "SD35ControlNetApply", "LoraLoader",
        "SD35ControlNetLoader", "CLIPTextEncode", "KSampler", "EmptySD3LatentImage", "VAEEncode",
        "CheckpointLoaderSimple", "SD35StepCache", "SD35Sigmas", "SamplerCustom", "SD35Check",
    ]
) | st.text(max_size=6)  # fmt: skip
NAMES = st.sampled_from(
    [
        "model", "positive", "negative", "latent", "steps", "cfg", "shift", "schedule", "denoise",
        "layers", "scale", "start", "end", "control_net", "lora_name", "ckpt_name", "vae", "text",
        "width", "height", "clip", "t5xxl", "sampler", "image", "batch_size", "latent_image",
    ]
)  # fmt: skip
API = st.dictionaries(
    st.sampled_from(["1", "2", "3", "4", "5"]),
    st.fixed_dictionaries(
        {"class_type": CLASSES | JUNK, "inputs": st.dictionaries(NAMES, VALUES, max_size=12)}
    ),
    max_size=5,
)
SLOT = st.fixed_dictionaries(
    {"name": NAMES | JUNK}, optional={"link": st.integers(0, 5) | JUNK, "widget": JUNK}
)
NODE = st.fixed_dictionaries(
    {"id": st.integers(0, 5) | JUNK, "type": CLASSES | JUNK},
    optional={
        "inputs": st.lists(SLOT | JUNK, max_size=6) | JUNK,
        "widgets_values": st.lists(VALUES, max_size=10) | JUNK,
        "mode": st.sampled_from([0, 2, 4]) | JUNK,
        "properties": JUNK,
    },
)
LINK = st.tuples(*[st.integers(0, 5)] * 5, st.just("MODEL")).map(list)
CANVAS = st.fixed_dictionaries(
    {
        "nodes": st.lists(NODE | JUNK, max_size=6) | JUNK,
        "links": st.lists(LINK | JUNK, max_size=6) | JUNK,
    },
    optional={"definitions": JUNK},
)


@WRITTEN
@given(API | CANVAS | st.dictionaries(st.text(max_size=8), JUNK, max_size=4))
def test_workflow(tmp_path_factory: pytest.TempPathFactory, workflow: dict[str, Any]) -> None:
    models = tmp_path_factory.getbasetemp() / "models"
    outside = models.parent.resolve()
    find = files_under(models)

    def inside(folder: str, name: str) -> Path | None:
        path = find(folder, name)
        assert path is None or models.resolve() in path.resolve().parents, (path, outside)
        return path

    survives(lambda: check(workflow, inside))


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
