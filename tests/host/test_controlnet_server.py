"""ControlNets in a running ComfyUI: what can be wrong is said, and the next prompt works."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tools import host as hosts

from .cases import embedder_tensors, small_layers
from .prompts import changed, picture

NANO_CONTROLNET = "a canny for nano.safetensors"


@pytest.fixture(scope="module", autouse=True)
def folder(base: Path) -> Path:
    """The host's folder of ControlNets, with one that fits the small model."""
    folder = base / "models" / "controlnet"
    save_file(embedder_tensors("2b", 1), folder / NANO_CONTROLNET)
    return folder


@pytest.fixture
def steered(workflow: dict[str, Any]) -> dict[str, Any]:
    """Text to image with a random ControlNet of the small model's width on an orange picture."""
    prompt = copy.deepcopy(workflow)
    for key, class_type, inputs in (
        ("20", "SD35ControlNetLoader",
         {"control_net": NANO_CONTROLNET, "depth_maps": "near is bright"}),
        ("21", "EmptyImage", {"width": 128, "height": 128, "batch_size": 1, "color": 0xFF8000}),
        ("22", "SD35ControlNetApply",
         {"positive": ["2", 0], "negative": ["3", 0], "control_net": ["20", 0], "vae": ["1", 2],
          "image": ["21", 0], "strength": 1.0, "start": 0.0, "end": 1.0}),
    ):  # fmt: skip
        prompt[key] = {"class_type": class_type, "inputs": inputs}
    prompt["5"]["inputs"].update(positive=["22", 0], negative=["22", 1], steps=4)
    return prompt


def error_of(server: hosts.Server, prompt: dict[str, Any]) -> str:
    with pytest.raises(hosts.HostError) as error:
        hosts.run_prompt(server.url, prompt)
    return str(error.value)


def test_it_steers_the_picture(
    server: hosts.Server, steered: dict[str, Any], workflow: dict[str, Any]
) -> None:
    plain = picture(server, changed(workflow, steps=4)).astype(int)
    first = picture(server, steered).astype(int)
    assert np.abs(first - plain).mean() > 1
    assert np.array_equal(picture(server, changed(steered, strength=0.0)).astype(int), plain)
    skipping = copy.deepcopy(steered)
    skipping["23"] = {
        "class_type": "SkipLayerGuidance",
        "inputs": {"model": ["1", 0], "layers": "1", "scale": 2.0, "start": 0.01, "end": 0.9,
                   "controlnet": "drop"},
    }  # fmt: skip
    skipping["5"]["inputs"]["model"] = ["23", 0]
    assert np.abs(picture(server, skipping).astype(int) - first).mean() > 0.1


def bad_files() -> dict[str, tuple[dict[str, torch.Tensor] | bytes, str]]:
    whole = embedder_tensors("2b", 1)
    one = torch.zeros(1)
    return {
        "random bytes": (bytes(range(256)) * 9, "can't be read as a safetensors file"),
        "empty": (b"", "can't be read as a safetensors file"),
        "for sdxl": ({"controlnet_cond_embedding.conv_in.weight": one}, "Diffusion 1.5 or SDXL"),
        "a lora": ({"lora_unet_x.lora_up.weight": one}, "not an SD3.5 ControlNet"),
        "a model": ({"joint_blocks.0.x_block.attn.qkv.weight": one}, "an SD3 diffusion model"),
        "lacking": ({k: t for k, t in whole.items() if "fc1.bias" not in k}, "lacks 2 of"),
        "nan": ({k: t * torch.nan if "fc1" in k else t for k, t in whole.items()}, "NaN"),
    }


@pytest.mark.parametrize("name", list(bad_files()))
def test_a_bad_file_is_named_and_the_next_prompt_works(
    server: hosts.Server, steered: dict[str, Any], folder: Path, name: str
) -> None:
    content, words = bad_files()[name]
    path = folder / f"{name}.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    said = error_of(server, changed(steered, control_net=path.name))
    assert words in said and path.name in said
    assert picture(server, steered).shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("kind", "hidden", "words"),
    [("2b", 1536, "SD3.5 Medium), but the model has 256"), ("8b", 2432, "SD3.5 Large), but")],
)
def test_another_models_controlnet_is_refused(
    server: hosts.Server, steered: dict[str, Any], folder: Path, kind: str, hidden: int, words: str
) -> None:
    name = f"for {hidden}.safetensors"
    save_file(small_layers(kind, hidden), folder / name)
    assert words in error_of(server, changed(steered, control_net=name))
    assert picture(server, steered).shape == (128, 128, 3)
    (folder / name).unlink()


def test_without_a_vae_it_says_so(server: hosts.Server, steered: dict[str, Any]) -> None:
    ours = copy.deepcopy(steered)
    del ours["22"]["inputs"]["vae"]
    assert "vae" in error_of(server, ours)
    theirs = copy.deepcopy(ours)
    theirs["22"]["class_type"] = "ControlNetApplyAdvanced"
    inputs = theirs["22"]["inputs"]
    inputs["start_percent"], inputs["end_percent"] = inputs.pop("start"), inputs.pop("end")
    assert "reads its picture through the VAE, and none is connected" in error_of(server, theirs)
    inputs["vae"] = ["1", 2]
    assert np.array_equal(picture(server, theirs), picture(server, steered))


def test_hints_that_are_no_match_for_the_latents(
    server: hosts.Server, steered: dict[str, Any]
) -> None:
    two = changed(steered, color=0x102030)
    two["21"]["inputs"]["batch_size"] = 2
    assert "got 2 pictures for 1 latents" in error_of(server, two)
    assert picture(server, changed(steered, start=0.5, end=0.7)).shape == (128, 128, 3)
    assert "start is 0.8 and end is 0.2" in error_of(server, changed(steered, start=0.8, end=0.2))


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "P"])
def test_hint_files_of_every_depth_steer(
    server: hosts.Server, steered: dict[str, Any], base: Path, mode: str
) -> None:
    """Grey, 16-bit, with alpha and with a palette, of another size than the picture."""
    ramp = np.linspace(0, 65535 if mode == "I;16" else 255, 96 * 64).reshape(64, 96)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16))
    else:
        image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB").convert(mode)
    image.save(base / "input" / "hint.png")
    prompt = copy.deepcopy(steered)
    prompt["21"] = {"class_type": "LoadImage", "inputs": {"image": "hint.png"}}
    seen = picture(server, prompt)
    assert seen.shape == (128, 128, 3) and not np.array_equal(seen, picture(server, steered))


def test_a_hint_is_checked_against_its_controlnet(
    server: hosts.Server, steered: dict[str, Any]
) -> None:
    hint = {
        "image": ["21", 0], "control_net": ["20", 0], "kind": "as the ControlNet",
        "blur_radius": 24.0, "canny_low": 0.1, "canny_high": 0.2, "depth_map": "near is bright",
        "normalise": True,
    }  # fmt: skip
    prompt = copy.deepcopy(steered)
    prompt["24"] = {"class_type": "SD35ControlHint", "inputs": hint}
    prompt["22"]["inputs"]["image"] = ["24", 0]
    assert picture(server, prompt).shape == (128, 128, 3)
    hint["kind"] = "depth"
    said = error_of(server, prompt)
    assert "kind is depth, but the ControlNet was trained on canny" in said
