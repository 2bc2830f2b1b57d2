"""The pack in a running ComfyUI, through its API, as automation uses it."""

from __future__ import annotations

import copy
import io
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tools import host as hosts

from ..conftest import NANO
from ..unit.models import random_weights
from .cases import SMALL
from .prompts import changed, picture


def test_a_picture_comes_with_progress_and_the_same_seed_gives_the_same(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    seen: list[tuple[int, int]] = []
    history = hosts.run_prompt(
        server.url, changed(workflow, seed=41), lambda node, done, total: seen.append((done, total))
    )
    (data,) = hosts.pictures(server.url, history)
    assert np.asarray(Image.open(io.BytesIO(data))).shape == (128, 128, 3)
    assert seen and seen[-1] == (28, 28)
    first = picture(server, changed(workflow, seed=42))
    hosts.call(server.url, "/free", {"unload_models": True, "free_memory": True})
    again = picture(server, changed(workflow, seed=43))
    assert not np.array_equal(first, again)
    assert np.array_equal(first, picture(server, changed(workflow, seed=42)))


def test_nodes_are_listed_with_tooltips_on_every_widget(server: hosts.Server) -> None:
    info = hosts.call(server.url, "/object_info")
    ours = {name: node for name, node in info.items() if node["category"] == "SD3.5"}
    assert set(ours) == {
        "SD35Loader", "SkipLayerGuidance", "SD35Sampler", "SD35Sigmas",
        "SD35ControlNetLoader", "SD35ControlNetApply", "SD35ControlHint", "SD35StepCache",
        "SD35Quantize", "SD35Check", "SD35SkipLayerSweep", "SD35Upscale",
        "SD35TrainLoRA",
    }  # fmt: skip
    for name, node in ours.items():
        assert node["description"]
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        for key, spec in inputs.items():
            assert spec[1].get("tooltip"), f"{name}.{key}"
        assert all(node["output_tooltips"])


def test_every_stock_sampler_node_runs_with_skip_layers(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    prompt = changed(workflow, seed=7)
    prompt["20"] = {
        "class_type": "SkipLayerGuidance",
        "inputs": {"model": ["1", 0], "layers": "1", "scale": 2.0, "start": 0.01, "end": 0.3},
    }
    prompt["5"]["inputs"]["model"] = ["20", 0]
    ours = picture(server, prompt)
    advanced = {k: n for k, n in copy.deepcopy(prompt).items() if k != "5"}
    for key, class_type, inputs in (
        ("30", "RandomNoise", {"noise_seed": 7}),
        ("31", "CFGGuider",
         {"model": ["20", 0], "positive": ["2", 0], "negative": ["3", 0], "cfg": 4.0}),
        ("32", "KSamplerSelect", {"sampler_name": "dpmpp_2m"}),
        ("33", "SD35Sigmas", {"steps": 28, "shift": 1.0, "schedule": "simple", "denoise": 1.0}),
        ("5", "SamplerCustomAdvanced",
         {"noise": ["30", 0], "guider": ["31", 0], "sampler": ["32", 0], "sigmas": ["33", 0],
          "latent_image": ["4", 0]}),
    ):  # fmt: skip
        advanced[key] = {"class_type": class_type, "inputs": inputs}
    seen = picture(server, advanced)
    assert np.abs(seen.astype(int) - ours.astype(int)).max() <= 1


def test_image_to_image_keeps_what_denoise_leaves(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    full = changed(workflow, seed=3)
    prompt = copy.deepcopy(full)
    prompt["8"] = {
        "class_type": "SD35Sampler",
        "inputs": {**full["5"]["inputs"], "latent": ["5", 0], "denoise": 0.3, "seed": 4},
    }
    prompt["6"]["inputs"]["samples"] = ["8", 0]
    first, second = picture(server, full).astype(int), picture(server, prompt).astype(int)
    other = picture(server, changed(workflow, seed=4)).astype(int)
    assert 0 < np.abs(first - second).mean() < np.abs(first - other).mean()


@pytest.mark.parametrize("size", [(136, 120), (128, 256), (144, 144), (192, 128)])
def test_sizes_that_are_no_multiple_of_16_work_too(
    server: hosts.Server, workflow: dict[str, Any], size: tuple[int, int]
) -> None:
    width, height = size
    prompt = changed(workflow, width=width, height=height, steps=2)
    if width % 16 or height % 16:
        prompt["4"] = {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": width, "height": height, "batch_size": 1},
        }
    assert picture(server, prompt).shape == (height, width, 3)


def test_an_interrupted_run_leaves_the_server_ready(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    errors: list[str] = []

    def run() -> None:
        try:
            hosts.run_prompt(server.url, changed(workflow, seed=99, steps=1000), begun)
        except hosts.HostError as error:
            errors.append(str(error))

    started = threading.Event()

    def begun(node: str, done: int, total: int) -> None:
        started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    hosts.call(server.url, "/interrupt", {})
    thread.join(60)
    assert errors == ["The run was interrupted."]
    assert picture(server, changed(workflow, seed=100, steps=2)).shape == (128, 128, 3)


BROKEN = ["truncated", "random bytes", "empty", "wrong shape", "missing tensor", "NaN",
          "controlnet",
          "vae", "lora", "other model", "too large"]  # fmt: skip
WORDS = {
    "truncated": ["can't be read", "download it again"],
    "random bytes": ["can't be read", "download it again"],
    "empty": ["can't be read", "0 bytes"],
    "wrong shape": ["has shape [1024, 255], expected [1024, 256]"],
    "missing tensor": ["lacks 1 of", "joint_blocks.2.x_block.mlp.fc1.weight"],
    "NaN": ["joint_blocks.2.x_block.mlp.fc1.weight", "NaN"],
    "controlnet": ["it is a ControlNet"],
    "vae": ["it is a VAE"],
    "lora": ["it is a LoRA"],
    "other model": ["is not an SD3.5 diffusion model"],
    "too large": ["can't be read"],
}


def broken_file(kind: str, path: Path) -> None:
    key = "joint_blocks.2.x_block.mlp.fc1.weight"
    weights = random_weights(SMALL)
    if kind == "truncated":
        save_file(weights, path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 3])
    elif kind == "random bytes":
        path.write_bytes(np.random.RandomState(0).bytes(5000))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "too large":
        path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    elif kind == "wrong shape":
        save_file({**weights, key: weights[key][:, 1:].contiguous()}, path)
    elif kind == "missing tensor":
        save_file({k: t for k, t in weights.items() if k != key}, path)
    elif kind == "NaN":
        weights[key][0, 0] = float("nan")
        save_file(weights, path)
    else:
        names = {
            "controlnet": "controlnet_blocks.0.weight",
            "vae": "decoder.conv_in.weight",
            "lora": "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight",
            "other model": "double_blocks.0.img_attn.qkv.weight",
        }
        save_file({names[kind]: torch.zeros(4, 4)}, path)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_model_file_gives_an_error_that_names_it_and_the_next_run_works(
    server: hosts.Server, workflow: dict[str, Any], base: Path, kind: str
) -> None:
    name = f"bad {kind}.safetensors"
    path = base / "models" / "checkpoints" / name
    broken_file(kind, path)
    try:
        with pytest.raises(hosts.HostError) as caught:
            hosts.run_prompt(server.url, changed(workflow, model=name))
    finally:
        path.unlink()
    message = str(caught.value)
    assert message.startswith("SD35Loader (1):") and f"'{name}'" in message
    for words in WORDS[kind]:
        assert words in message
    assert server.alive()
    assert picture(server, changed(workflow, steps=2)).shape == (128, 128, 3)


def test_no_text_encoder_at_all_is_an_error_unless_wished(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    with pytest.raises(hosts.HostError, match="No text encoder: 'small.safetensors' holds none"):
        hosts.run_prompt(server.url, changed(workflow, model="small.safetensors", vae="none"))
    nothing = {"clip_l": "none", "clip_g": "none", "t5xxl": "none"}
    with pytest.raises(hosts.HostError, match="CLIPTextEncode.*clip input is invalid"):
        hosts.run_prompt(server.url, changed(workflow, **nothing))


def test_a_missing_or_wrong_vae_is_an_error(
    server: hosts.Server, workflow: dict[str, Any], base: Path
) -> None:
    path = base / "models" / "vae" / "sd15.safetensors"
    save_file({"taesd_decoder.1.weight": torch.zeros(64, 4, 3, 3)}, path)
    with pytest.raises(hosts.HostError, match="'sd15.safetensors' has no VAE.*seen: 4 channels"):
        hosts.run_prompt(server.url, changed(workflow, vae="sd15.safetensors"))
    with pytest.raises(hosts.HostError, match="VAE is invalid"):
        hosts.run_prompt(server.url, changed(workflow, vae="none"))


def test_a_text_encoder_in_the_wrong_widget_is_an_error(
    server: hosts.Server, workflow: dict[str, Any], base: Path
) -> None:
    prefix = "text_encoders.clip_l.transformer."
    tensors = {k[len(prefix) :]: t for k, t in load_file(NANO).items() if k.startswith(prefix)}
    save_file(tensors, base / "models" / "text_encoders" / "clip.safetensors")
    with pytest.raises(hosts.HostError, match="'clip.safetensors' is not the text encoder t5xxl"):
        hosts.run_prompt(server.url, changed(workflow, t5xxl="clip.safetensors"))
    assert picture(server, changed(workflow, clip_l="clip.safetensors", steps=2)).any()


def test_an_empty_prompt_works(server: hosts.Server, workflow: dict[str, Any]) -> None:
    assert picture(server, changed(workflow, text="", steps=2)).shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"steps": 0}, "Value 0 smaller than min of 1: steps"),
        ({"denoise": 0.0}, "smaller than min of 0.01: denoise"),
        ({"sampler": "ddim"}, "sampler: 'ddim' not in"),
        ({"schedule": "cosine"}, "schedule: 'cosine' not in"),
        ({"model": "../nano.safetensors"}, "model: '../nano.safetensors' not in"),
        ({"width": 8192, "steps": 1, "height": 16}, "position table ends at 512x512"),
    ],
)
def test_widget_values_that_cannot_work_are_refused(
    server: hosts.Server, workflow: dict[str, Any], inputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(hosts.HostError, match=words):
        hosts.run_prompt(server.url, changed(workflow, **inputs))
    assert server.alive()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"layers": "7, x"}, "SkipLayerGuidance.*'x' is not a layer number"),
        ({"layers": "7, 8, 9"}, "layers 0 to 3; there is no layer 7, 8, 9"),
        ({"start": 0.5}, "start is 0.5 and end is 0.2"),
    ],
)
def test_skip_layers_that_cannot_work_are_refused(
    server: hosts.Server, workflow: dict[str, Any], inputs: dict[str, Any], words: str
) -> None:
    prompt = copy.deepcopy(workflow)
    prompt["20"] = {
        "class_type": "SkipLayerGuidance",
        "inputs": {"model": ["1", 0], "layers": "1", "scale": 2.0, "start": 0.0, "end": 0.2},
    }
    prompt["20"]["inputs"].update(inputs)
    prompt["5"]["inputs"]["model"] = ["20", 0]
    with pytest.raises(hosts.HostError, match=words):
        hosts.run_prompt(server.url, prompt)
    assert server.alive()


def test_a_scale_of_zero_is_off_whatever_the_layers(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    prompt = changed(workflow, seed=21, steps=4)
    plain = picture(server, prompt)
    prompt["20"] = {
        "class_type": "SkipLayerGuidance",
        "inputs": {"model": ["1", 0], "layers": "7, 8, 9", "scale": 0, "start": 0.5, "end": 0.2},
    }
    prompt["5"]["inputs"]["model"] = ["20", 0]
    assert np.array_equal(picture(server, prompt), plain)


def test_a_replaced_file_is_loaded_again(
    server: hosts.Server, workflow: dict[str, Any], base: Path
) -> None:
    path = base / "models" / "checkpoints" / "changing.safetensors"
    tensors = load_file(NANO)
    with __import__("safetensors").safe_open(NANO, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    prompt = changed(workflow, model="changing.safetensors", steps=4)
    first = picture(server, prompt)
    time.sleep(0.05)
    key = "model.diffusion_model.final_layer.linear.bias"
    save_file({**tensors, key: tensors[key] + 1}, path, metadata=metadata)
    assert not np.array_equal(first, picture(server, prompt))
