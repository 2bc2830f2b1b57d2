"""ControlNetEmbedder: what it computes, which files it reads, which it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd35_core.checkpoint.controlnet import controlnet, controlnet_config, load_controlnet
from sd35_core.errors import CheckpointError
from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from sd35_core.workflow.headers import control_in

from .files import embedder, in_diffusers_keys
from .models import TINY, random_inputs, random_model

KINDS = ("8b", "2b")


def run(model: ControlNetEmbedder) -> list[Tensor]:
    x, timestep, _, y = random_inputs()
    return model(random_model(), x, timestep, y, 0.5 * x[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_same_residuals_in_either_layout(kind: str, tmp_path: Path) -> None:
    model = embedder(kind)
    expected = run(model)
    for name, tensors in (
        ("stability", model.state_dict()),
        ("diffusers", in_diffusers_keys(model.state_dict())),
    ):
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        tensors["control_type"] = torch.tensor([2], dtype=torch.int32)
        save_file(tensors, tmp_path / f"{name}.safetensors")
        loaded = load_controlnet(tmp_path / f"{name}.safetensors")
        assert loaded.config.kind == kind and loaded.config.control_type == "depth"
        assert all(torch.equal(a, b) for a, b in zip(expected, run(loaded)))


def test_8b_chains_its_blocks_and_2b_does_not() -> None:
    for kind, chained in (("8b", True), ("2b", False)):
        model = embedder(kind)
        before = run(model)
        model.transformer_blocks[0].mlp.fc2.bias.add_(1)  # pyright: ignore
        after = run(model)
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1]) != chained


def test_8b_sees_through_the_base_and_2b_with_its_own_eyes() -> None:
    for kind, through_base in (("8b", True), ("2b", False)):
        model, base = embedder(kind), random_model()
        x, timestep, _, y = random_inputs()
        before = model(base, x, timestep, y, x)
        base.x_embedder.proj.weight.data.add_(0.1)
        after = model(base, x, timestep, y, x)
        assert torch.equal(before[0], after[0]) != through_base
        base.y_embedder.mlp[0].bias.data.add_(0.1)  # pyright: ignore
        assert torch.equal(after[0], model(base, x, timestep, y, x)[0]) == through_base


def test_residuals_are_spread_over_the_base() -> None:
    assert ControlNetConfig("8b", 19, 2432, 2048).spread(38) == [i // 2 for i in range(38)]
    assert ControlNetConfig("2b", 12, 1536, 1536).spread(24) == [i // 2 for i in range(24)]
    assert ControlNetConfig("2b", 2, 64, 64).spread(4) == [0, 0, 1, 1]


def test_a_depth_that_the_layers_do_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="3 layers, .* 4 blocks"):
        ControlNetConfig("2b", 3, 64, 64).spread(4)
    with pytest.raises(CheckpointError, match="8 layers, .* 4 blocks"):
        ControlNetConfig("2b", 8, 64, 64).spread(4)


def test_odd_latents_are_padded_with_the_hint() -> None:
    model, base = embedder("2b"), random_model()
    _, timestep, _, y = random_inputs()
    x = torch.randn(len(y), 16, 5, 7)
    assert model(base, x, timestep, y, x)[0].shape[1] == 3 * 4


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"transformer_blocks.0.attn.add_q_proj.weight": 1}, "a ControlNet for SD3 that is not"),
        ({"controlnet_cond_embedding.conv_in.weight": 1}, "for Stable Diffusion 1.5 or SDXL"),
        ({"joint_blocks.0.x_block.attn.qkv.weight": 1}, "an SD3 diffusion model"),
        ({"lora_unet_x.lora_up.weight": 1}, "it holds lora_unet_x.lora_up.weight"),
        ({}, "it holds no tensors"),
    ],
)
def test_other_files_are_named(tensors: dict[str, int], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"'x.safetensors' is .*{words}"):
        controlnet({key: torch.zeros(size) for key, size in tensors.items()}, "'x.safetensors'")


def test_damaged_files_are_refused() -> None:
    tensors = embedder("2b").state_dict()
    lacking = {k: t for k, t in tensors.items() if k != "transformer_blocks.1.mlp.fc1.bias"}
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*blocks\.1\.mlp\.fc1\.bias"):
        controlnet_config(lacking)
    odd = {**tensors, "controlnet_blocks.1.weight": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r"has shape \[3, 3\], expected"):
        controlnet_config(odd)
    nan = {**tensors, "controlnet_blocks.1.bias": torch.full((TINY.hidden,), torch.nan)}
    with pytest.raises(CheckpointError, match="NaN"):
        controlnet_config(nan)
    with pytest.raises(CheckpointError, match="no whole SD3.5 ControlNet"):
        controlnet_config({k: t for k, t in tensors.items() if k != "x_embedder.proj.weight"})


def test_an_unknown_control_type_is_refused() -> None:
    tensors = {**embedder("2b").state_dict(), "control_type": torch.tensor([7])}
    with pytest.raises(CheckpointError, match="control_type 7"):
        controlnet_config(tensors)


def test_an_8b_of_diffusers_without_an_x_embedder_is_read(tmp_path: Path) -> None:
    """diffusers saves none for it, and it uses none."""
    model, path = embedder("8b"), tmp_path / "8b.safetensors"
    tensors = {k: t for k, t in model.state_dict().items() if not k.startswith("x_embedder")}
    save_file({k: t.contiguous() for k, t in in_diffusers_keys(tensors).items()}, path)
    for seen, expected in zip(run(load_controlnet(path)), run(model)):
        assert torch.equal(seen, expected)
    assert control_in(path).hidden == TINY.hidden
