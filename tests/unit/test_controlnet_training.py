"""Training a ControlNet: it begins as nothing, learns what its hints say, and leaves its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd35_core.checkpoint.controlnet import load_controlnet
from sd35_core.encoders.autoencoder import TinyAutoencoder
from sd35_core.errors import SettingError
from sd35_core.training.config import TrainingConfig, read_config
from sd35_core.training.dataset import read_folder
from sd35_core.training.objective import flow_losses
from sd35_core.training.run import Run

from .models import words_as_tokens


@pytest.fixture
def control_config(config: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    """A base after a few steps; examples whose hints are the pictures, whose captions are not."""
    base = Run(replace(config, steps=30))
    for _ in range(30):
        base.advance()
    base.write_model(tmp_path / "base.safetensors")
    tensors = load_file(config.examples[0])
    tensors["hints"] = tensors["latents"].clone()
    for name in ("tokens_l", "tokens_g"):
        tensors[name] = tensors[f"{name}_empty"].repeat(len(tensors["latents"]), 1)
    save_file(tensors, tmp_path / "hints.safetensors")
    return replace(
        config,
        examples=(str(tmp_path / "hints.safetensors"),),
        output=str(tmp_path / "run"),
        start=str(tmp_path / "base.safetensors"),
        text_encoders=str(tmp_path / "base.safetensors"),
        controlnet="canny",
    )


def test_at_first_it_changes_nothing(control_config: TrainingConfig) -> None:
    run = Run(control_config)
    model, control = run.model.diffusion_model, run.model.controlnet
    x0, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    context, y = torch.randn(2, 7, 64), torch.randn(2, 32)
    inputs = (model, x0, noise, torch.tensor([0.3, 0.6]), context, y)
    assert torch.equal(flow_losses(*inputs), flow_losses(*inputs, control=control, hint=x0))


def test_it_learns_from_hints_and_leaves_the_base(control_config: TrainingConfig) -> None:
    run = Run(control_config)
    assert all(name.startswith("controlnet.") for name in run.learning)
    base = {k: t.clone() for k, t in run.model.diffusion_model.state_dict().items()}
    losses = [run.advance() for _ in range(150)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    after = run.model.diffusion_model.state_dict()
    assert all(torch.equal(base[key], after[key]) for key in base)
    run.save()
    resumed = Run(control_config)
    resumed.resume()
    assert resumed.advance() == run.advance()


def test_it_is_written_as_a_controlnet_file(control_config: TrainingConfig, tmp_path: Path) -> None:
    run = Run(control_config)
    run.advance()
    run.write_model(tmp_path / "control.safetensors")
    loaded = load_controlnet(tmp_path / "control.safetensors", dtype=torch.float32)
    assert (loaded.config.kind, loaded.config.layers, loaded.config.control_type) == (
        "2b", 1, "canny",
    )  # fmt: skip
    with run.averaged() as model:
        assert model.controlnet is not None
        for key, tensor in model.controlnet.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor.half().float())


def test_without_hints_it_does_not_start(
    control_config: TrainingConfig,
    config: TrainingConfig,
) -> None:
    with pytest.raises(SettingError, match="no hints to train a ControlNet with"):
        Run(replace(control_config, examples=config.examples))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("controlnet = 'pose'\n", "controlnet is 'pose'; known are blur, canny, depth"),
        ("controlnet = 'canny'\n", "a ControlNet is trained on a model; it needs 'start'"),
        ("controlnet = 'canny'\nstart = 'b'\n", "it needs 'text_encoders'"),
    ],
)
def test_settings_that_cannot_work_are_refused(more: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "control.toml"
    file.write_text(f"output = 'o'\nexamples = 'e'\n{more}", encoding="utf-8")
    with pytest.raises(SettingError, match=words):
        read_config(file)


@pytest.mark.parametrize("kind", ["blur", "canny", "depth"])
def test_a_folder_gives_hints(kind: str, folder: Path) -> None:
    if kind == "depth":
        with pytest.raises(SettingError, match=r"has no depth map; expected '.*\.depth\.png'"):
            read_folder(folder, [(32, 32)], TinyAutoencoder(), words_as_tokens, kind)
        for path in list(folder.glob("*.png")):
            Image.new("L", (64, 64), 120).save(path.with_suffix(".depth.png"))
    (group,) = read_folder(folder, [(32, 32)], TinyAutoencoder(), words_as_tokens, kind)
    assert group["hints"].shape == group["latents"].shape == (8, 16, 4, 4)
    same = torch.allclose(group["hints"].float(), group["latents"].float(), atol=2e-3)
    assert same == (kind == "blur"), "a picture of one colour, blurred, is itself"
