"""The same workflow gives the same bits: again, after other models, with less memory, elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_core.packing.formats import INT8
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantize_file
from tools import host as hosts

from ..conftest import NANO
from .cases import adaln_lora, difference
from .prompts import Prompt, short, skipping

OTHER, PACKED = "determinism other.safetensors", "determinism int8.safetensors"
KINDS: dict[str, Prompt] = {
    "text to image": short("text_to_image"),
    "another checkpoint": short("text_to_image", model=OTHER),
    "skipped layers": skipping(),
    "a ControlNet": short("controlnet_canny"),
    "8 bits": short("text_to_image", model=PACKED),
    "fp8": short("image_to_image", weight_dtype="fp8_e4m3fn"),
}
SERVERS = {
    "nothing stays loaded or cached": ["--disable-smart-memory", "--cache-none"],
    "two results are cached, with previews": [
        *("--cache-lru", "2"),
        *("--preview-method", "latent2rgb"),
    ],
}


def drawn(url: str, base: Path, prompt: Prompt) -> list[bytes]:
    """The latents and the pixels of a prompt that the host does not take from its cache."""
    samplers = {key for key, node in prompt.items() if node["class_type"] == "SD35Sampler"}
    savers = {
        f"latent {key}": {
            "class_type": "SaveLatent",
            "inputs": {"samples": [key, 0], "filename_prefix": "determinism"},
        }
        for key in samplers
    }
    history = hosts.run_prompt(url, {**prompt, **savers})
    assert not samplers & cached(history)
    found = []
    for _, output in sorted(history["outputs"].items()):
        for file in [*output.get("latents", ()), *output.get("images", ())]:
            path = base / file["type"] / file["subfolder"] / file["filename"]
            if path.suffix == ".latent":
                found.append(load_file(path)["latent_tensor"].numpy().tobytes())
            else:
                found.append(Image.open(path).tobytes())
    assert len(found) > len(samplers)
    return found


def cached(history: dict[str, Any]) -> set[str]:
    """The nodes that the host took from its cache."""
    return set(dict(history["status"]["messages"])["execution_cached"]["nodes"])


def free(url: str) -> None:
    """Have the host unload every model and forget every result, which it may do later."""
    image = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    hosts.run_prompt(url, prompt)
    while cached(hosts.run_prompt(url, prompt)):
        hosts.call(url, "/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.2)


@pytest.fixture(scope="module")
def expected(server: hosts.Server, base: Path) -> dict[str, list[bytes]]:
    """What each kind of prompt draws, one after the other, on the server of all tests."""
    tensors = load_file(NANO)
    tensors["model.diffusion_model.final_layer.linear.bias"] += 0.1
    with safe_open(NANO, framework="pt") as file:
        save_file(tensors, base / "models" / "checkpoints" / OTHER, metadata=file.metadata())
    quantize_file(NANO, Plan(8, INT8), out=base / "models" / "checkpoints" / PACKED)
    found = {kind: drawn(server.url, base, prompt) for kind, prompt in KINDS.items()}
    assert len({bits[-1] for bits in found.values()}) == len(KINDS), "all differ"
    return found


def test_a_repeat_after_other_models_and_without_any_loaded_gives_the_same_bits(
    server: hosts.Server, base: Path, expected: dict[str, list[bytes]]
) -> None:
    for kind in KINDS:
        assert drawn(server.url, base, KINDS[kind]) == expected[kind], kind
        free(server.url)
        assert drawn(server.url, base, KINDS[kind]) == expected[kind], kind


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_modulation_cache_changes_no_bit(
    server: hosts.Server, base: Path, expected: dict[str, list[bytes]], kind: str
) -> None:
    prompt = {**KINDS[kind]}
    prompt["1"] = {**prompt["1"], "inputs": {**prompt["1"]["inputs"], "modulation_cache": "on"}}
    assert drawn(server.url, base, prompt) == expected[kind]


@pytest.mark.parametrize("how", list(SERVERS))
def test_another_server_gives_the_same_bits(
    comfyui: hosts.Host, base: Path, expected: dict[str, list[bytes]], how: str
) -> None:
    with hosts.Server(comfyui, base=base, arguments=["--cpu", *SERVERS[how]]) as other:
        for kind in reversed(KINDS):
            assert drawn(other.url, base, KINDS[kind]) == expected[kind], kind


Limit = Callable[[float | None], None]


@pytest.fixture
def limit(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Sets how many bytes of every model are loaded from now on, as on a card of that size; the
    host brings the others over at each use. None: all of them."""
    import comfy.model_management as management

    load = management.LoadedModel.model_load

    def limit(budget: float | None) -> None:
        monkeypatch.setattr(
            management.LoadedModel,
            "model_load",
            lambda loaded, memory=0, **named: load(loaded, budget or memory, **named),
        )

    return limit


@pytest.fixture(scope="module")
def draw(comfy: SimpleNamespace) -> Any:
    """(model, guided and steered) -> a latent of the shipped model, and its pixels."""
    file = comfy.loading.read(NANO)
    clip = comfy.text.clip_from(file, {"clip_l": None, "clip_g": None, "t5xxl": None})
    vae = comfy.loading.vae_from(file)
    host = comfy.host_controlnet
    canny = comfy.loading.read(NANO.parent / "controlnet" / "sd35_nano_canny.safetensors")
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0)).round()

    def draw(model: Any, all_of_it: bool = False) -> tuple[Tensor, Tensor]:
        positive, negative = (
            comfy.calibration.encoded(clip, text) for text in ("an owl, pink background", "")
        )
        if all_of_it:
            model = comfy.guidance.SkipLayerGuidance.execute(model, "1", 2.0, 0.0, 0.6).result[0]
            control = host.controlnet_from(canny, host.Options())
            positive, negative = comfy.controlnet.SD35ControlNetApply.execute(
                positive, negative, control, vae, hint, 1.0, 0.0, 1.0
            ).result
        latent = {"samples": torch.zeros(1, 16, 16, 16)}
        settings = (5, 4, 4.0, 1.0, "dpmpp_2m", "simple", 1.0)
        node = comfy.sampler.SD35Sampler
        out = node.execute(model, positive, negative, latent, *settings).result[0]["samples"]
        return out, vae.decode(out)

    return draw


def with_lora(comfy: SimpleNamespace, model: Any) -> Any:
    return comfy.sd.load_lora_for_models(model, None, adaln_lora(), 1.0, 0)[0]


@pytest.mark.parametrize("weights", ["default", "default, LoRA", "fp8_e4m3fn", "int8, LoRA"])
def test_every_budget_of_memory_gives_the_same_bits(
    comfy: SimpleNamespace, draw: Any, limit: Limit, weights: str, tmp_path: Path
) -> None:
    """Of the model, the text encoders, the VAE and the ControlNet at once."""
    import comfy.model_management as management

    dtype, *lora = weights.split(", ")
    file = comfy.loading.read(NANO)
    if dtype == "int8":
        quantize_file(NANO, Plan(8, INT8), out=tmp_path / "int8.safetensors")
        file, dtype = comfy.loading.read(tmp_path / "int8.safetensors"), "default"
    results, sizes = [], []
    for budget in (None, 10_000_000, 2_000_000, 1):
        management.unload_all_models()
        limit(budget)
        model = comfy.loading.model_from(file, dtype)
        model = with_lora(comfy, model) if lora else model
        results.append(draw(model, all_of_it=True))
        sizes.append(model.loaded_size())
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_a_lora_acts_once_when_memory_is_taken_and_given_back(
    comfy: SimpleNamespace, draw: Any, limit: Limit, mode: str
) -> None:
    import comfy.model_management as management

    management.unload_all_models()
    model = comfy.loading.model_from(comfy.loading.read(NANO), "default", mode)
    model = with_lora(comfy, model)
    expected, _ = draw(model)
    for taken, budget in ((1e6, 1), (8e6, 5e6), (1e6, None)):
        (loaded,) = (m for m in management.current_loaded_models if m.model.is_clone(model))
        loaded.model_unload(taken)
        limit(budget)
        assert torch.equal(draw(model)[0], expected), (taken, budget)


def test_a_lora_of_resting_fp8_weights_is_rounded_as_into_others(
    comfy: SimpleNamespace, draw: Any
) -> None:
    on, off = (
        comfy.loading.model_from(comfy.loading.read(NANO), "fp8_e4m3fn", mode)
        for mode in ("on", "off")
    )
    assert torch.equal(*(draw(with_lora(comfy, model))[0] for model in (on, off)))


def test_too_little_memory_for_a_batch_changes_the_last_digits_alone(
    comfy: SimpleNamespace, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host then runs the prompts one by one; torch's products differ by the batch."""
    import comfy.model_management as management

    model = comfy.loading.model_from(comfy.loading.read(NANO), "default")
    rows: list[int] = []
    network = model.model.diffusion_model
    network.final_layer.register_forward_hook(lambda *call: rows.append(len(call[2])))
    expected, _ = draw(model, all_of_it=True)
    together = set(rows)
    rows.clear()
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **more: (0, 0) if more else 0)
    assert difference(draw(model, all_of_it=True)[0], expected) < 1e-5
    assert set(rows) == {1} and 1 not in together
