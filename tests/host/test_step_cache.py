"""SD35StepCache in the host's sampling: what it leaves out, and what it must not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sd35_core.sampling.step_cache import Pace

from .cases import Conds, count_calls, difference, skipping

ALWAYS = Pace(1e9, 1)
"""Leaves out every other step, however large the change (random weights change a lot)."""


@pytest.fixture
def cached(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(model, pace, interval) -> the model with a step cache, and the list its reports go to."""
    import importlib

    module = importlib.import_module("sd35_pack.nodes.host.step_cache")
    told: list[str] = []
    monkeypatch.setattr(module, "tell", lambda text, node_id: told.append(text))

    def make(model: Any, pace: Pace = ALWAYS, interval: tuple[float, float] = (0, 1)) -> Any:
        return module.with_step_cache(model, "safe", pace, interval, None), told

    return make


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc", "lcm"])
@pytest.mark.parametrize("scheduler", ["normal", "simple", "karras", "beta"])
def test_it_leaves_out_steps_with_every_sampler_and_schedule(
    ours: Any, ksampler: Any, cached: Any, sampler: str, scheduler: str
) -> None:
    model, told = cached(ours)
    calls = count_calls(model)
    settings = {"sampler_name": sampler, "scheduler": scheduler, "steps": 12}
    latent = ksampler(model, **settings)
    assert len(calls) <= 8 and torch.isfinite(latent).all()
    assert "of 12 steps left out: 3, 5, 7, 9" in told[-1]


def test_nothing_is_left_out_when_no_change_is_small(ours: Any, ksampler: Any, cached: Any) -> None:
    model, told = cached(ours, Pace(-1, 2))
    assert torch.equal(ksampler(model), ksampler(ours))
    assert "no step of 8 left out" in told[-1]


def test_samplers_that_watch_guidance_get_every_step(ours: Any, ksampler: Any, cached: Any) -> None:
    model, told = cached(ours)
    settings = {"sampler_name": "euler_cfg_pp", "cfg": 1.5}
    assert torch.equal(ksampler(model, **settings), ksampler(ours, **settings))
    assert "no step of 8 left out" in told[-1]


def test_skipped_layers_begin_and_end_on_their_own_steps(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, cached: Any
) -> None:
    for order in ("cache last", "cache first"):
        if order == "cache last":
            model, told = cached(skipping(comfy, ours, start=0.3, end=0.6))
        else:
            before, told = cached(ours)
            model = skipping(comfy, before, start=0.3, end=0.6)
        ksampler(model, steps=20)
        left = {int(word) for word in told[-1].partition("left out: ")[2].strip(".").split(", ")}
        assert not left & {8, 9, 13, 14}, "7 to 11 act, counted from 0; the report counts from 1"
        assert left & {3, 5, 7} and left & {15, 17, 19}


def test_its_difference_to_no_skipped_layers_stays(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, cached: Any
) -> None:
    with_slg, _ = cached(skipping(comfy, ours, start=0.0, end=0.9))
    without, _ = cached(ours)
    whole = difference(ksampler(skipping(comfy, ours, start=0.0, end=0.9)), ksampler(ours))
    assert difference(ksampler(with_slg), ksampler(without)) > 0.3 * whole


def test_outside_the_guidance_interval_the_prompt_runs_alone(
    ours: Any, ksampler: Any, cached: Any
) -> None:
    model, _ = cached(ours, Pace(0, 0), (0.25, 0.5))
    rows: list[int] = []
    network = model.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    ksampler(model, steps=8)
    handle.remove()
    assert rows == [1, 1, 2, 2, 1, 1, 1, 1]
    everywhere, _ = cached(ours, Pace(0, 0), (0.0, 1.0))
    assert torch.equal(ksampler(everywhere), ksampler(ours))


def test_prompts_with_windows_are_computed_where_they_begin(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, cached: Any, conds: Conds
) -> None:
    def window(cond: list[Any], start: float, end: float) -> list[Any]:
        return [[c, {**more, "start_percent": start, "end_percent": end}] for c, more in cond]

    positive = window(conds.positive, 0.0, 0.5) + window(conds.negative, 0.5, 1.0)
    model, told = cached(ours)
    seen: list[str] = []
    ksampler(model, positive=positive, steps=20)
    seen.append(told[-1])
    ksampler(model, steps=20)
    assert seen[0] != told[-1], "the change of prompts starts anew"


def test_two_runs_are_alike_and_interrupting_leaves_nothing(
    ours: Any, ksampler: Any, cached: Any
) -> None:
    import comfy.model_management as management

    model, _ = cached(ours)
    first = ksampler(model)
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda *_: management.interrupt_current_processing()
    )
    with pytest.raises(management.InterruptProcessingException):
        ksampler(model)
    handle.remove()
    assert torch.equal(ksampler(model), first)


def test_a_guider_that_outlives_its_run_keeps_nothing(
    comfy: SimpleNamespace, ours: Any, cached: Any, conds: Conds
) -> None:
    model, told = cached(ours)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conds.positive, conds.negative)
    guider.set_cfg(4.0)
    latent = torch.zeros(1, 16, 16, 16)
    sigmas = torch.linspace(1, 0, 9)
    guider.sample(latent + 1, latent, comfy.samplers.sampler_object("euler"), sigmas)
    assert "of 8 steps left out" in told[-1] and not hasattr(guider, "sd35_step_cache")


def test_settings_that_cannot_work_are_refused(
    comfy: SimpleNamespace, ours: Any, stock: Any
) -> None:
    import importlib

    node = importlib.import_module("sd35_pack.nodes.step_cache").SD35StepCache
    with pytest.raises(Exception, match="no step would be guided"):
        node.execute(ours, "safe", 0.6, 0.5)
    with pytest.raises(Exception, match="needs a model from SD35Loader"):
        node.execute(stock, "safe")
