"""Skip Layer Guidance against the host's own, and what it costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sd35_core.network.config import MMDiTXConfig

from ..unit.models import random_weights
from .cases import Conds, cases, difference, hooked, skipping, stock_skipping

EXACT = 1e-5


@pytest.mark.parametrize("case", list(cases(Conds())))
def test_it_equals_the_hosts_own_on_the_normal_schedule(
    comfy: SimpleNamespace, ours: Any, stock: Any, ksampler: Any, conds: Conds, case: str
) -> None:
    settings = {"steps": 12, **cases(conds)[case]}
    seen = ksampler(skipping(comfy, ours), **settings)
    assert difference(seen, ksampler(stock_skipping(stock), **settings)) < EXACT
    assert difference(seen, ksampler(ours, **settings)) > 1e-2


def test_lora_hooks_are_kept_in_the_skipped_pass(
    comfy: SimpleNamespace, ours: Any, stock: Any, ksampler: Any, conds: Conds
) -> None:
    positive = hooked(comfy, conds)
    seen = ksampler(skipping(comfy, ours), positive=positive, steps=12)
    assert difference(seen, ksampler(stock_skipping(stock), positive=positive, steps=12)) < EXACT


def test_two_of_them_chain_as_the_hosts_own_do(
    comfy: SimpleNamespace, ours: Any, stock: Any, ksampler: Any
) -> None:
    seen = ksampler(skipping(comfy, skipping(comfy, ours), "0, 3"), steps=12)
    expected = ksampler(stock_skipping(stock_skipping(stock), "0, 3"), steps=12)
    assert difference(seen, expected) < EXACT


@pytest.mark.parametrize("guider", ["perp-neg", "dual cfg"])
def test_other_guiders_equal_the_hosts_own(
    comfy: SimpleNamespace, ours: Any, stock: Any, conds: Conds, guider: str
) -> None:
    from comfy_extras.nodes_custom_sampler import DualCFGGuider, Noise_RandomNoise
    from comfy_extras.nodes_perpneg import PerpNegGuider

    def run(model: Any) -> torch.Tensor:
        if guider == "perp-neg":
            made = PerpNegGuider.execute(
                model, conds.positive, conds.negative, conds.longer, 4.0, 0.8
            )
        else:
            made = DualCFGGuider.execute(
                model, conds.positive, conds.longer, conds.negative, 3.0, 5.0, "regular"
            )
        latent = torch.zeros(1, 16, 16, 16)
        return made.result[0].sample(
            Noise_RandomNoise(3).generate_noise({"samples": latent}),
            latent,
            comfy.samplers.sampler_object("dpmpp_2m"),
            comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 12),
            seed=3,
        )

    assert difference(run(skipping(comfy, ours)), run(stock_skipping(stock))) < EXACT


def test_another_nodes_patch_beside_it_equals_the_hosts_way(
    comfy: SimpleNamespace, ours: Any, stock: Any, ksampler: Any
) -> None:
    def with_patch(model: Any) -> Any:
        patched = model.clone()
        patched.set_model_patch_replace(
            lambda state, extra: {**extra["original_block"](state), "img": state["img"] * 0.9},
            "dit",
            "double_block",
            3,
        )
        return patched

    seen = ksampler(skipping(comfy, with_patch(ours)), steps=12)
    assert difference(seen, ksampler(stock_skipping(with_patch(stock)), steps=12)) < EXACT


@pytest.mark.parametrize(
    "scheduler",
    ["normal", "simple", "karras", "exponential", "sgm_uniform", "ddim_uniform", "beta",
     "linear_quadratic", "kl_optimal"],
)  # fmt: skip
def test_nine_steps_of_fifty_on_every_scheduler(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, scheduler: str
) -> None:
    rows: list[int] = []
    model = skipping(comfy, ours, end=0.20)
    handle = model.model.diffusion_model.final_layer.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    latent = {"samples": torch.zeros(1, 16, 2, 2)}
    ksampler(model, steps=50, scheduler=scheduler, latent=latent)
    handle.remove()
    assert rows.count(3) == 9
    assert rows[:11] == [2] + [3] * 9 + [2]


def test_at_depth_24_an_active_step_takes_62_block_passes_in_one_call(
    comfy: SimpleNamespace, ksampler: Any, tmp_path: Path
) -> None:
    config = MMDiTXConfig(24, 128, 4096, 2048, 16, qk_norm=True, dual_blocks=tuple(range(13)))
    path = tmp_path / "deep.safetensors"
    save_file(random_weights(config), path)

    model = skipping(comfy, comfy.loading.load_model(str(path), "default"), "7, 8, 9", end=0.2)
    network = model.model.diffusion_model
    calls: list[list[int]] = []
    network.x_embedder.register_forward_hook(lambda *_: calls.append([]))
    for block in network.joint_blocks:
        block.register_forward_hook(lambda module, inputs, out: calls[-1].append(len(out[1])))
    ksampler(model, steps=10, latent={"samples": torch.zeros(1, 16, 4, 4)})
    assert [sum(call) for call in calls] == [48, 62] + [48] * 8


def test_it_works_in_the_advanced_sampler_and_ours(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, conds: Conds
) -> None:
    from comfy_extras.nodes_custom_sampler import CFGGuider, Noise_RandomNoise

    model = skipping(comfy, ours)
    expected = ksampler(model, steps=12)
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    settings = (5, 12, 4.0, 3.0, "dpmpp_2m", "normal", 1.0)
    own = comfy.sampler.SD35Sampler.execute(
        model, conds.positive, conds.negative, latent, *settings
    )
    assert difference(own.result[0]["samples"], expected) < EXACT
    guider = CFGGuider.execute(model, conds.positive, conds.negative, 4.0).result[0]
    advanced = guider.sample(
        Noise_RandomNoise(5).generate_noise(latent),
        latent["samples"],
        comfy.samplers.sampler_object("dpmpp_2m"),
        comfy.sampler.SD35Sigmas.execute(12, 3.0, "normal", 1.0).result[0],
        seed=5,
    )
    assert difference(advanced, expected) < EXACT


def test_it_does_nothing_at_scale_0_without_layers_or_in_an_empty_window(
    comfy: SimpleNamespace, ours: Any, ksampler: Any
) -> None:
    plain = ksampler(ours)
    assert torch.equal(ksampler(skipping(comfy, ours, scale=0.0)), plain)
    assert torch.equal(ksampler(skipping(comfy, ours, layers="")), plain)
    assert torch.equal(ksampler(skipping(comfy, ours, start=0.99, end=1.0)), plain)


@pytest.mark.parametrize(
    ("layers", "settings", "words"),
    [
        ("7, x", {}, "'x' is not a layer number"),
        ("4", {}, "layers 0 to 3; there is no layer 4"),
        ("1", {"start": 0.5, "end": 0.5}, "no step lies between"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    comfy: SimpleNamespace, ours: Any, layers: str, settings: dict[str, float], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        skipping(comfy, ours, layers, **settings)


def test_a_foreign_model_is_refused(comfy: SimpleNamespace, stock: Any) -> None:
    with pytest.raises(Exception, match="needs a model from SD35Loader"):
        skipping(comfy, stock)
