"""Files: three layouts, damaged and wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd35_core.checkpoint.layouts import diffusion_model, from_diffusers
from sd35_core.checkpoint.loading import checked_config, load
from sd35_core.checkpoint.tensor_file import read_file, write_file
from sd35_core.errors import CheckpointError
from sd35_core.network.config import VARIANTS, config_from_shapes
from sd35_core.network.mmditx import MMDiTX
from sd35_core.workflow.headers import model_in

from .files import to_diffusers
from .models import TINY, random_inputs, random_model, random_weights

StateDict = dict[str, Tensor]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_model_is_found_under_any_prefix_and_beside_other_models(prefix: str) -> None:
    weights = random_weights()
    file = {prefix + key: tensor for key, tensor in weights.items()}
    file["first_stage_model.decoder.conv_in.weight"] = torch.zeros(1)
    assert diffusion_model(file).keys() == weights.keys()


def test_diffusers_layout_gives_the_same_weights() -> None:
    weights = random_weights()
    found = from_diffusers(to_diffusers(weights))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert diffusion_model(to_diffusers(weights)).keys() == weights.keys()


def test_a_file_is_loaded_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "Modell für 猫.safetensors"
    write_file(path, random_weights(), {"title": "tiny"})
    assert read_file(path)[1] == {"title": "tiny"}
    inputs = random_inputs()
    assert torch.equal(load(path)(*inputs), random_model()(*inputs))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants_are_recognised_by_shape(name: str) -> None:
    model = MMDiTX(VARIANTS[name], device="meta")
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    config = config_from_shapes(shapes)
    assert config == VARIANTS[name]
    assert config.variant == name


def test_parameter_counts_are_the_published_ones() -> None:
    counts = {
        name: sum(t.numel() for t in MMDiTX(config, device="meta").parameters()) / 1e9
        for name, config in VARIANTS.items()
    }
    assert counts == pytest.approx(
        {"sd3_medium": 2.03, "sd3.5_medium": 2.24, "sd3.5_large": 8.06}, abs=0.01
    )


def test_truncated_and_empty_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(random_weights(), whole)
    data = whole.read_bytes()
    for cut in (0, 5, 100, len(data) // 2, len(data) - 1):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="'broken.safetensors' can't be read.*download"):
            load(broken)
    with pytest.raises(CheckpointError, match="not there"):
        load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["controlnet_blocks.0.weight"], "it is a ControlNet"),
        (["decoder.conv_in.weight"], "it is a VAE"),
        (["taesd_decoder.1.weight"], "it is a VAE"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "it is a text encoder"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"], "it is a LoRA"),
        (["some.other.weight"], "1 tensors and no"),
        ([], "0 tensors"),
    ],
)
def test_other_kinds_of_file_are_told_apart(keys: list[str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        diffusion_model({key: torch.zeros(1) for key in keys}, "'other.safetensors'")


def test_missing_wrong_and_broken_tensors_are_named() -> None:
    key = "joint_blocks.2.x_block.mlp.fc1.weight"
    whole = random_weights()
    with pytest.raises(CheckpointError, match=f"lacks 1 of .*'{key}'"):
        checked_config({k: t for k, t in whole.items() if k != key})
    with pytest.raises(CheckpointError, match=r"shape \[512, 127\], expected \[512, 128\]"):
        checked_config({**whole, key: whole[key][:, 1:]})
    for value in (float("nan"), float("inf")):
        broken = whole[key].clone()
        broken[3, 4] = value
        with pytest.raises(CheckpointError, match=f"'{key}' holds NaN or infinite"):
            checked_config({**whole, key: broken})
    with pytest.raises(CheckpointError, match="'pos_embed' is missing"):
        checked_config({k: t for k, t in whole.items() if k != "pos_embed"})


def in_pieces(folder: Path, tensors: StateDict) -> list[Path]:
    """A model in two files, as diffusers saves a large one."""
    keys = sorted(tensors)
    paths = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for path, half in zip(paths, (keys[:20], keys[20:])):
        save_file({key: tensors[key].contiguous() for key in half}, path, {"half": path.name})
    return paths


def test_any_file_of_several_stands_for_the_model(tmp_path: Path) -> None:
    weights, inputs = random_weights(), random_inputs()
    expected = random_model()(*inputs)
    for path in in_pieces(tmp_path, to_diffusers(weights)):
        assert torch.equal(load(path)(*inputs), expected)
    model = model_in(path)
    assert model is not None and model.depth == TINY.depth


def test_a_file_that_is_missing_among_several_is_named(tmp_path: Path) -> None:
    first, second = in_pieces(tmp_path, random_weights())
    first.unlink()
    with pytest.raises(CheckpointError, match=f"one of 2 files.* 1 of them .*'{first.name}'"):
        load(second)
    endless = tmp_path / "model-00001-of-99999.safetensors"
    endless.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="the number of its files is 99,999"):
        load(endless)


def test_a_folder_is_said_to_be_one_and_its_files_are_named(tmp_path: Path) -> None:
    inside = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    inside.parent.mkdir()
    save_file(random_weights(), inside)
    with pytest.raises(CheckpointError, match="is a folder.*diffusion_pytorch_model.safetensors"):
        load(tmp_path)


def test_large_weights_can_be_left_to_the_one_who_reads_them(tmp_path: Path) -> None:
    weights = random_weights()
    weights["joint_blocks.0.x_block.mlp.fc1.weight"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        checked_config(weights)
    assert checked_config(weights, largest=1000) == TINY
    weights["joint_blocks.0.x_block.mlp.fc1.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        checked_config(weights, largest=1000)
