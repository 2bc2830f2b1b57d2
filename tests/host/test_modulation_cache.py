"""The modulation cache in the host's sampling: the same bits, weights that rest, nothing stale."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35_core.network import modulation_cache

from .cases import Conds, adaln_lora, cases, hooked, partially_loaded, skipping

SETTINGS = cases(Conds())


@pytest.fixture
def models(comfy: SimpleNamespace, small: Path) -> tuple[Any, Any]:
    """The same model with the cache on and off."""

    def load(mode: str) -> Any:
        return comfy.loading.load_model(str(small), "default", mode)

    return load("on"), load("off")


@pytest.mark.parametrize("case", list(SETTINGS))
def test_latents_have_the_same_bits_on_and_off(
    comfy: SimpleNamespace, models: Any, ksampler: Any, case: str
) -> None:
    on, off = (ksampler(skipping(comfy, model), **SETTINGS[case]) for model in models)
    assert torch.equal(on, off)


@pytest.mark.parametrize("sampler", ["heun", "euler_ancestral", "dpmpp_sde", "uni_pc", "lcm"])
def test_every_sampler_gives_the_same_bits(models: Any, ksampler: Any, sampler: str) -> None:
    on, off = (ksampler(model, sampler_name=sampler, scheduler="karras") for model in models)
    assert torch.equal(on, off)


def test_a_lora_of_resting_weights_gives_the_same_bits_and_is_never_stale(
    comfy: SimpleNamespace, models: Any, ksampler: Any
) -> None:
    results = []
    for strength in (1.0, 0.5, 0.0):
        on, off = (
            ksampler(comfy.sd.load_lora_for_models(model, None, adaln_lora(), strength, 0)[0])
            for model in models
        )
        assert torch.equal(on, off)
        results.append(on)
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[2], ksampler(models[0]))


def test_other_prompts_after_each_other_are_never_stale(
    models: Any, ksampler: Any, conds: Conds
) -> None:
    for positive in (conds.positive, conds.longer, conds.negative):
        on, off = (ksampler(model, positive=positive) for model in models)
        assert torch.equal(on, off)


@pytest.mark.parametrize("kind", ["blur 8b", "canny 2b"])
def test_a_controlnet_and_skipped_layers_give_the_same_bits(
    comfy: SimpleNamespace,
    models: Any,
    ksampler: Any,
    controlled: Any,  # noqa: F811
    kind: str,
) -> None:
    steered = controlled(kind)
    on, off = (ksampler(skipping(comfy, model), **steered) for model in models)
    assert torch.equal(on, off)
    assert not torch.equal(on, ksampler(skipping(comfy, models[1])))


def test_what_is_trained_does_without_it(comfy: SimpleNamespace, small: Path, conds: Conds) -> None:
    """A training in the host goes through the same model; the modulations take part in it."""
    patcher = comfy.loading.load_model(str(small), "default", "on")
    model = patcher.model.to(torch.float32)
    model.modulation_cache = modulation_cache.ModulationCache()
    ((context, extra),) = conds.positive
    x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    network = model.diffusion_model.requires_grad_(True)
    with torch.enable_grad():
        out = model.apply_model(
            x, torch.tensor([0.5]), c_crossattn=context, y=extra["pooled_output"]
        )
        out.square().mean().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None]
    assert not [name for name in missing if "adaLN" in name or "embedder" in name]


def test_hooks_that_change_weights_do_without_it(
    comfy: SimpleNamespace, models: Any, ksampler: Any, conds: Conds
) -> None:
    on, off = (ksampler(model, positive=hooked(comfy, conds)) for model in models)
    assert torch.equal(on, off)


def weights_resting(model: Any) -> int:
    """Bytes of the adaLN weights."""
    named = model.model.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in named if "adaLN_modulation" in name)


def test_resting_weights_count_as_not_loaded_and_each_is_used_once(
    models: Any, ksampler: Any
) -> None:
    on, off = models
    calls = []
    layer = on.model.diffusion_model.joint_blocks[0].x_block.adaLN_modulation[1]
    layer.register_forward_hook(lambda *_: calls.append(1))
    ksampler(on, steps=8)
    ksampler(off, steps=8)
    assert len(calls) == 1, "16 pairs of 8 steps and 2 prompts, at once"
    assert on.loaded_size() <= off.loaded_size() - weights_resting(on)
    assert on.loaded_size() / off.loaded_size() < 0.7


def test_auto_lets_them_rest_when_the_model_does_not_fit(
    comfy: SimpleNamespace, small: Path, ksampler: Any
) -> None:
    model = comfy.loading.load_model(str(small), "default")
    whole = ksampler(model)
    assert not model.model.resting
    part = partially_loaded(comfy.loading.load_model(str(small), "default"), 10_000_000)
    assert part.model.resting
    assert torch.equal(ksampler(part), whole)
    part.detach()
    assert not part.model.resting
    assert torch.equal(ksampler(part), whole)


def test_an_interrupted_run_leaves_nothing(models: Any, ksampler: Any) -> None:
    import comfy.model_management as management

    model, _ = models
    expected = ksampler(model)
    network = model.model.diffusion_model
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

    handle = network.register_forward_pre_hook(stop)
    with pytest.raises(management.InterruptProcessingException):
        ksampler(model)
    handle.remove()
    assert model.model.modulation_cache is None
    assert torch.equal(ksampler(model), expected)


def test_a_saved_model_has_the_lora_and_the_whole_position_table(
    comfy: SimpleNamespace, models: Any, tmp_path: Path, ksampler: Any, small: Path
) -> None:
    import comfy.model_management as management

    saved = []
    for number, model in enumerate(models):
        changed, _ = comfy.sd.load_lora_for_models(model, None, adaln_lora(), 1.0, 0)
        management.load_models_gpu([changed], force_patch_weights=True)
        path = tmp_path / f"{number}.safetensors"
        comfy.sd.save_checkpoint(str(path), changed)
        saved.append(load_file(path))
    assert saved[0].keys() == saved[1].keys()
    assert [key for key in saved[0] if not torch.equal(saved[0][key], saved[1][key])] == []
    assert "model.diffusion_model.pos_embed" in saved[0]


def test_a_table_of_columns_and_rows_takes_less_memory_and_is_saved_whole(
    comfy: SimpleNamespace, small: Path, tmp_path: Path, ksampler: Any
) -> None:
    from sd35_core.network.layers import grid_positions

    tensors = load_file(small)
    key = "model.diffusion_model.pos_embed"
    places = torch.arange(32)
    tensors[key] = grid_positions(places, places, 256)
    path = tmp_path / "grid.safetensors"
    save_file(tensors, path)
    model, stock = (
        comfy.loading.load_model(str(path), "default"),
        comfy.sd.load_diffusion_model(str(path)),
    )
    assert model.model.diffusion_model.config.axes
    assert model.model_size() < stock.model_size() - 900_000
    seen, expected = ksampler(model), ksampler(stock)
    assert float((seen - expected).abs().max() / expected.abs().max()) < 1e-5
    comfy.sd.save_checkpoint(str(tmp_path / "again.safetensors"), model)
    assert torch.equal(load_file(tmp_path / "again.safetensors")[key], tensors[key])
