"""Our MODEL against the host's own SD3 model, and under the host's own nodes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cases import Conds, count_calls, difference, hooked, lora, partially_loaded

EXACT = 1e-5


@pytest.mark.parametrize("scheduler", ["normal", "simple", "karras", "sgm_uniform"])
def test_sampling_equals_the_hosts_own_model(
    ours: Any, stock: Any, ksampler: Any, scheduler: str
) -> None:
    assert (
        difference(ksampler(ours, scheduler=scheduler), ksampler(stock, scheduler=scheduler))
        < EXACT
    )


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (15, 17)])
def test_every_size_equals_the_hosts_own_model(
    ours: Any, stock: Any, ksampler: Any, size: tuple[int, int]
) -> None:
    latent = {"samples": torch.zeros(2, 16, *size)}
    assert difference(ksampler(ours, latent=latent), ksampler(stock, latent=latent)) < EXACT


def test_unequal_prompt_lengths_equal_the_hosts_own_model(
    ours: Any, stock: Any, ksampler: Any, conds: Conds
) -> None:
    settings = {"negative": conds.longer}
    assert difference(ksampler(ours, **settings), ksampler(stock, **settings)) < EXACT


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "onetrainer"])
def test_a_lora_of_each_dialect_acts_as_on_the_hosts_own_model(
    comfy: SimpleNamespace, ours: Any, stock: Any, ksampler: Any, kind: str
) -> None:
    patched = [comfy.sd.load_lora_for_models(m, None, lora(kind), 1.0, 0)[0] for m in (ours, stock)]
    assert len(patched[0].patches) == len(patched[1].patches) == 3
    seen = ksampler(patched[0])
    assert difference(seen, ksampler(patched[1])) < EXACT
    assert difference(seen, ksampler(ours)) > 1e-3


def test_the_three_dialects_are_the_same_change(
    comfy: SimpleNamespace, ours: Any, ksampler: Any
) -> None:
    kinds = ("diffusers", "kohya", "onetrainer")
    out = [ksampler(comfy.sd.load_lora_for_models(ours, None, lora(k), 1.0, 0)[0]) for k in kinds]
    assert difference(out[0], out[1]) < EXACT and difference(out[0], out[2]) < EXACT


def test_a_lora_hook_acts_on_its_prompt_alone_as_on_the_hosts_own_model(
    comfy: SimpleNamespace, ours: Any, stock: Any, ksampler: Any, conds: Conds
) -> None:
    seen = ksampler(ours, positive=hooked(comfy, conds))
    assert difference(seen, ksampler(stock, positive=hooked(comfy, conds))) < EXACT
    assert difference(seen, ksampler(ours)) > 1e-3


@pytest.mark.parametrize("budget", [1, 2_000_000, 10_000_000, 30_000_000])
@pytest.mark.parametrize("with_lora", [False, True])
def test_partial_loads_give_identical_latents(
    comfy: SimpleNamespace, ours: Any, conds: Conds, budget: int, with_lora: bool
) -> None:
    model = ours
    if with_lora:
        model, _ = comfy.sd.load_lora_for_models(ours, None, lora("kohya"), 1.0, 0)
    x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {
        "t": torch.tensor([0.7]),
        "c_crossattn": conds.positive[0][0],
        "y": conds.positive[0][1]["pooled_output"],
    }

    def out(patcher: Any) -> Tensor:
        return patcher.model.apply_model(x, **inputs)

    whole = model.clone()
    whole.patch_model(device_to=torch.device("cpu"))
    expected = out(whole)
    whole.unpatch_model(device_to=torch.device("cpu"))
    part = partially_loaded(model, budget)
    deferred = sum(getattr(m, "comfy_cast_weights", False) for m in part.model.modules())
    seen = out(part)
    part.unpatch_model(device_to=torch.device("cpu"))
    assert deferred > 0 or budget >= 30_000_000
    assert torch.equal(seen, expected) or difference(seen, expected) < 1e-6


def test_merging_equals_merging_the_hosts_own(
    comfy: SimpleNamespace, ours: Any, stock: Any, ksampler: Any, small: Path, tmp_path: Path
) -> None:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    other = tmp_path / "other.safetensors"
    save_file({k: t * 0.9 for k, t in load_file(small).items()}, other)
    second = comfy.loading.load_model(str(other), "default")
    second_stock = comfy.sd.load_diffusion_model(str(other))
    merge = ModelMergeSimple().merge
    seen = ksampler(merge(ours, second, 0.6)[0])
    assert difference(seen, ksampler(merge(stock, second_stock, 0.6)[0])) < EXACT


def test_a_saved_model_reloads_to_the_same_latents_here_and_in_the_stock_loader(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(saved), ours)
    expected = ksampler(ours)
    assert torch.equal(ksampler(comfy.loading.load_model(str(saved), "default")), expected)
    stock = comfy.sd.load_diffusion_model(str(saved))
    assert difference(ksampler(stock), expected) < EXACT


def test_a_lora_is_baked_in_when_the_model_is_saved(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, tmp_path: Path
) -> None:
    saved = tmp_path / "baked.safetensors"
    patched, _ = comfy.sd.load_lora_for_models(ours, None, lora("kohya"), 1.0, 0)
    expected = ksampler(patched)
    comfy.sd.save_checkpoint(str(saved), patched)
    assert difference(ksampler(comfy.loading.load_model(str(saved), "default")), expected) < EXACT


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_weights_give_what_the_hosts_own_model_gives(
    comfy: SimpleNamespace, small: Path, ksampler: Any, ours: Any, dtype: str
) -> None:
    model = comfy.loading.load_model(str(small), dtype)
    stock = comfy.sd.load_diffusion_model(
        str(small), {"dtype": getattr(torch, "float8_" + dtype[4:])}
    )
    assert model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight.dtype.itemsize == 1
    seen = ksampler(model)
    assert difference(seen, ksampler(stock)) < EXACT
    assert 1e-3 < difference(seen, ksampler(ours)) < 1


def test_model_sampling_sd3_moves_the_schedule(ours: Any, stock: Any, ksampler: Any) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    patch = ModelSamplingSD3().patch
    seen = ksampler(patch(ours, 1.5)[0])
    assert difference(seen, ksampler(patch(stock, 1.5)[0])) < EXACT
    assert difference(seen, ksampler(ours)) > 1e-3


def test_easycache_skips_steps(ours: Any, ksampler: Any) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    calls = count_calls(ours)
    plain = ksampler(ours, steps=20)
    assert len(calls) == 20
    calls.clear()
    cached = ksampler(EasyCacheNode.execute(ours, 0.5, 0.1, 0.9, False).result[0], steps=20)
    assert 5 < len(calls) < 20
    assert difference(cached, plain) > 0


def test_perturbed_attention_acts(ours: Any, stock: Any, ksampler: Any) -> None:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    def effect(model: Any) -> float:
        return difference(
            ksampler(PerturbedAttentionGuidance.execute(model, 3.0).result[0]), ksampler(model)
        )

    assert effect(ours) > 1e-2
    assert effect(stock) < 1e-5, "the host's own model has learned it; say so in the README"


def test_a_lora_that_bypasses_the_weights_equals_one_in_them(
    comfy: SimpleNamespace, ours: Any, ksampler: Any
) -> None:
    """The host puts a forward of its own in the place of each layer's; fc1's is called too."""
    change = lora("kohya")
    fc1 = {key: tensor for key, tensor in change.items() if "fc1" in key}
    for each in (change, fc1):
        inside, _ = comfy.sd.load_lora_for_models(ours, None, each, 1.0, 0)
        beside, _ = comfy.sd.load_bypass_lora_for_models(ours, None, each, 1.0, 0)
        plain, seen = ksampler(ours), ksampler(beside)
        assert difference(seen, ksampler(inside)) < 1e-4
        assert difference(seen, plain) > 1e-2


def test_attention_patches_for_unets_are_left_out_and_those_for_transformers_act(
    comfy: SimpleNamespace, ours: Any, ksampler: Any
) -> None:
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel

    plain = ksampler(ours)
    of_a_unet, of_a_transformer = ours.clone(), ours.clone()
    of_a_unet.set_model_attn1_patch(lambda q, k, v, extra_options: (0 * q, k, v))
    of_a_transformer.set_model_attn1_patch(
        lambda q, k, v, pe=None, attn_mask=None, extra_options=None: {"q": 0 * q}
    )
    others = HyperTile.execute(ours, 256, 2, 0, False), TomePatchModel.execute(ours, 0.3)
    nodes = [getattr(other, "result", other)[0] for other in others]
    for model in (of_a_unet, *nodes):
        assert torch.equal(ksampler(model), plain)
    assert not torch.equal(ksampler(of_a_transformer), plain)


def test_the_hosts_own_attention_stays_on_other_devices_than_the_processor(
    comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac it upcasts; torch's own would give black pictures there."""
    import comfy.ldm.modules.attention as attentions
    import comfy.model_management as management

    processor = __import__("sd35_pack.nodes.host.processor", fromlist=["chosen_attention"])
    attention = processor.chosen_attention
    monkeypatch.setattr(attentions, "optimized_attention", attentions.attention_sub_quad)
    assert attention() is attentions.attention_pytorch
    monkeypatch.setattr(management, "cpu_state", management.CPUState.MPS)
    assert attention() is attentions.attention_sub_quad


def test_normalized_attention_guidance_acts(ours: Any, ksampler: Any) -> None:
    from comfy_extras.nodes_nag import NAGuidance

    guided = NAGuidance.execute(ours, 5.0, 0.5, 1.5).result[0]
    assert difference(ksampler(guided), ksampler(ours)) > 1e-2


def test_torch_compile_gives_the_same_latents(ours: Any, ksampler: Any) -> None:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    compiled = TorchCompileModel.execute(ours, "eager").result[0]
    assert difference(ksampler(compiled, steps=2), ksampler(ours, steps=2)) < EXACT


def test_the_prompt_of_another_model_is_refused_with_both_widths(ours: Any, ksampler: Any) -> None:
    wrong = Conds(width=768, pooled=1280).positive
    with pytest.raises(Exception, match="768 wide.*1280.*takes 4096 and 2048"):
        ksampler(ours, positive=wrong, negative=wrong)


def test_the_latent_of_another_model_is_refused_with_both_numbers(
    comfy: SimpleNamespace, ours: Any, conds: Conds
) -> None:
    """An empty one becomes SD3.5's; a picture's of another VAE can't."""
    node, settings = comfy.sampler.SD35Sampler, (1, 2, 4.0, 3.0, "euler", "simple", 1.0)
    latent = {"samples": torch.ones(1, 4, 8, 8)}
    with pytest.raises(Exception, match=r"\[2, 4, 8, 8\], expected 16 channels"):
        node.execute(ours, conds.positive, conds.negative, latent, *settings)


def test_nothing_is_registered_in_the_host(comfy: SimpleNamespace) -> None:
    import comfy.supported_models as supported

    assert not any(m.__module__.startswith("sd35_pack") for m in supported.models)
