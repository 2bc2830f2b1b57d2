"""Hostile model files through the nodes of a real ComfyUI: an error in words, then a good load."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_core.packing.formats import VQ2, pack

from ..conftest import NANO
from ..unit.files import MANY_DIGITS, entry, of_vectors, write_header
from ..unit.models import random_weights
from .cases import SMALL, embedder_tensors

SECONDS = 5.0
"""Of the processor's time: the host's own part takes a second where a file is read to its end."""
LAYER, CONTROL_LAYER = "joint_blocks.0.x_block.mlp.fc1", "transformer_blocks.0.mlp.fc1"
NAME = "hostile.safetensors"
FROM_FILE, NONE = "from model file", "none"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(SMALL)


@pytest.fixture
def load(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SD35Loader: names of files -> MODEL, CLIP, VAE."""
    node = comfy.loader.SD35Loader
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None))

    def run(model: str = NANO.name, clip_l: str = NONE, t5xxl: str = NONE, vae: str = NONE) -> Any:
        clip_g = FROM_FILE if clip_l == FROM_FILE else NONE
        return node.execute(model, clip_l, clip_g, t5xxl, vae, "default").result

    return run


@pytest.fixture
def load_control(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    node = comfy.controlnet.SD35ControlNetLoader
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None))
    return lambda name: node.execute(name, "near is bright").result[0]


@pytest.fixture(autouse=True)
def recovers(base: Path, load: Any) -> Iterator[None]:
    """After each test the shipped model loads, with all that is in its file."""
    yield
    for path in base.rglob(NAME):
        path.unlink()
    model, clip, vae = load(clip_l=FROM_FILE, vae=FROM_FILE)
    key = "final_layer.linear.weight"
    seen = model.model.diffusion_model.state_dict()[key]
    assert torch.equal(seen, load_file(NANO)[f"model.diffusion_model.{key}"].to(seen.dtype))
    assert clip is not None and vae.first_stage_model is not None


@contextmanager
def refused(words: str) -> Iterator[None]:
    """The pack is imported twice here, so its error is known by its name."""
    started = time.thread_time()
    with pytest.raises(Exception, match=words) as caught:
        yield
    assert caught.type.__name__ == "CheckpointError"
    assert time.thread_time() - started < SECONDS


def put(
    base: Path, folder: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write a file into one of the host's folders; its name."""
    save_file({key: t.contiguous() for key, t in tensors.items()},
              base / "models" / folder / NAME, metadata)  # fmt: skip
    return NAME


@pytest.mark.parametrize("number", ["99999", "999999999", MANY_DIGITS, "150"])
def test_blocks_without_end(
    number: str, base: Path, weights: dict[str, Tensor], load: Any, load_control: Any
) -> None:
    more = {f"joint_blocks.{number}.x": torch.zeros(1)}
    with refused(f"'{NAME}'(: the number of digits of a block's number is|.* lacks 146 of 151)"):
        load(put(base, "diffusion_models", {**weights, **more}))
    more = {f"controlnet_blocks.{number}.x": torch.zeros(1)}
    with refused(f"'{NAME}'.*(digits of a block's number|number of ControlNet layers is 151)"):
        load_control(put(base, "controlnet", {**embedder_tensors("2b", 1), **more}))


def test_sizes_that_a_header_only_names(base: Path, load: Any, weights: dict[str, Tensor]) -> None:
    shapes = {key: [0] * t.ndim for key, t in weights.items()}
    shapes["x_embedder.proj.weight"] = [64 * 10**12, 0, 2, 2]
    write_header(base / "models" / "diffusion_models" / NAME, {**shapes, "pos_embed": [0, 4, 0]})
    with refused("width of the blocks is 64,000,000,000,000; it can be 1 to 16,384"):
        load(NAME)


def packed(**changes: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(4 * SMALL.hidden, SMALL.hidden, generator=torch.Generator().manual_seed(0))
    return {**pack(weight, "int8_tensorwise"), **changes}


ROWS = 4 * SMALL.hidden
OURS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no JSON": (packed(comfy_quant=entry(b"{")), "does not say how it is packed"),
    "int16": (packed(comfy_quant=of_vectors().short()), "does not say how it is packed .*int16"),
    "int8 as bytes": (packed(weight=torch.zeros(ROWS, SMALL.hidden).byte()), "codes of torch.uint"),
    "NaN": (packed(weight_scale=torch.full((ROWS, 1), torch.nan)), "scales that are NaN"),
    "codes that are not there": (packed(comfy_quant=of_vectors()), r"expected \[1024, 64\]"),
    "an unknown format": (packed(comfy_quant=entry({"format": "x"})), "packed as x, version 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_packed_layers_of_our_formats(
    name: str, base: Path, weights: dict[str, Tensor], load: Any, load_control: Any
) -> None:
    changes, words = OURS[name]
    with refused(f"'{LAYER}'.*{words}"):
        new = {f"{LAYER}.{name}": tensor for name, tensor in changes.items()}
        load(put(base, "diffusion_models", {**weights, **new}))
    with refused(f"'{CONTROL_LAYER}'.*{words}"):
        new = {f"{CONTROL_LAYER}.{name}": tensor for name, tensor in changes.items()}
        load_control(put(base, "controlnet", {**embedder_tensors("2b", 1), **new}))


def test_scalar_scales_of_vectors_never_reach_sampling(
    base: Path, weights: dict[str, Tensor], load: Any
) -> None:
    changes = dict(pack(weights[f"{LAYER}.weight"], VQ2)) | {"weight_scale": torch.tensor(1.0)}
    new = {f"{LAYER}.{name}": tensor for name, tensor in changes.items()}
    with refused(r"weight_scale of shape \[\], expected \[1024, 2\]"):
        load(put(base, "diffusion_models", {**weights, **new}))


@pytest.mark.parametrize(
    "layer", ["x_embedder.proj", "joint_blocks.7.x_block.mlp.fc1", "pos_embed"]
)
def test_layers_that_cannot_be_packed(
    layer: str, base: Path, weights: dict[str, Tensor], load: Any
) -> None:
    for said in (of_vectors(), entry({"format": "nvfp4"})):
        with refused(f"'{NAME}' (says that '{layer}.weight' is packed|lacks 3 of 8 blocks)"):
            load(put(base, "diffusion_models", {**weights, f"{layer}.comfy_quant": said}))


@pytest.mark.parametrize(
    "said",
    [
        {"format": "nvfp4"},
        {"format": "mxfp8"},
        {"format": "convrot_w4a4", "convrot_groupsize": "x"},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": [1]},
    ],
    ids=lambda said: said["format"],
)
def test_formats_that_only_the_host_knows_fail_by_the_files_name(
    said: dict[str, Any], base: Path, weights: dict[str, Tensor], load: Any, load_control: Any
) -> None:
    new = packed(comfy_quant=entry(said))
    if said["format"] in ("nvfp4", "mxfp8"):
        del new["weight_scale"]
    with refused(f"ComfyUI can't load '{NAME}': (Value|Type)Error.*Download the original again"):
        of_model = {f"{LAYER}.{name}": tensor for name, tensor in new.items()}
        load(put(base, "diffusion_models", {**weights, **of_model}))
    with refused(f"ComfyUI can't load '{NAME}': (Value|Type)Error"):
        of_control = {f"{CONTROL_LAYER}.{name}": tensor for name, tensor in new.items()}
        load_control(put(base, "controlnet", {**embedder_tensors("2b", 1), **of_control}))


@pytest.mark.parametrize(
    "said",
    ["", "{", "[]", "5", '{"layers": 5}', '{"layer": {}}', "[" * 50_000, '{"layers": {"x": 1}}',
     json.dumps({"layers": {LAYER: {"format": "float8_e4m3fn"}}}),
     json.dumps({"layers": {"x_embedder.proj": {"format": "float8_e4m3fn"}}})],
    ids=range(10),
)  # fmt: skip
def test_quantization_that_the_metadata_describes(
    said: str, base: Path, weights: dict[str, Tensor], load: Any
) -> None:
    with refused(
        f"ComfyUI can't load '{NAME}'|'{NAME}' says that|'{LAYER}' .* codes of torch.float32"
    ):
        load(put(base, "diffusion_models", weights, {"_quantization_metadata": said}))


def test_old_scales_of_many_values(base: Path, weights: dict[str, Tensor], load: Any) -> None:
    new = {"scaled_fp8": torch.zeros(2), f"{LAYER}.scale_input": torch.zeros(3)}
    with refused(f"ComfyUI can't load '{NAME}': RuntimeError"):
        load(put(base, "diffusion_models", {**weights, **new}))


def test_text_encoders_that_are_described_and_not_there(base: Path, load: Any) -> None:
    tensors = load_file(NANO)
    sizes = {"hidden_size": 16384, "num_attention_heads": 256, "num_hidden_layers": 100}
    described = {"sd35_config": json.dumps({"text_encoders": {"clip_l": sizes, "clip_g": sizes}})}
    with refused(f"clip_l for '{NAME}' has 3 layers, the metadata 'sd35_config' describes 100"):
        load(put(base, "checkpoints", tensors, described), FROM_FILE)


@pytest.mark.parametrize(
    "tensors",
    [
        {"encoder.final_layer_norm.weight": torch.zeros(4096)},
        {"encoder.final_layer_norm.weight": torch.zeros(())},
        {"encoder.final_layer_norm.weight": torch.zeros(4096), "scaled_fp8": torch.zeros(2),
         "x.scale_input": torch.zeros(3)},
        {"encoder.final_layer_norm.weight": torch.zeros(4096), "shared.weight": torch.zeros(2, 2),
         "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": torch.zeros(())},
        {"encoder.final_layer_norm.weight": torch.zeros(4096),
         "shared.weight": torch.zeros(10**9, 0)},
    ],
    ids=["nothing else", "no width", "old scales", "odd shapes", "10^9 words"],
)  # fmt: skip
def test_text_encoder_files(tensors: dict[str, Tensor], base: Path, load: Any) -> None:
    with refused(f"'{NAME}'"):
        load(t5xxl=put(base, "text_encoders", tensors))


@pytest.mark.parametrize(
    "tensors",
    [
        {"decoder.conv_in.weight": torch.zeros(())},
        {"taesd_decoder.1.weight": torch.zeros(64)},
        {"first_stage_model.decoder.conv_in.weight": torch.zeros(0, 3)},
        {"decoder.conv_in.weight": torch.zeros(512, 16, 0, 3),
         "post_quant_conv.weight": torch.zeros(16, 10**9, 0, 0)},
        {"decoder.conv_in.weight": torch.zeros(4 * 10**6, 16, 0, 3)},
        {},
    ],
    ids=["a number", "taesd", "prefixed", "10^9 wide", "10^6 channels", "nothing"],
)  # fmt: skip
def test_vae_files(tensors: dict[str, Tensor], base: Path, load: Any) -> None:
    with refused(f"'{NAME}'"):
        load(vae=put(base, "vae", tensors))


def test_cancelling_and_lack_of_memory_stay_what_they_are(
    comfy: SimpleNamespace, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    def raises(error: BaseException) -> Any:
        def convert(*_: Any, **__: Any) -> Any:
            raise error

        return convert

    for error, kind, words in (
        (management.InterruptProcessingException(), management.InterruptProcessingException, ""),
        (MemoryError(), MemoryError, "Out of memory while loading"),
        (RuntimeError("can't allocate memory: 9 bytes"), RuntimeError, "Out of memory while load"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(comfy.utils, "convert_old_quants", raises(error))
            with pytest.raises(kind, match=words):
                load()
