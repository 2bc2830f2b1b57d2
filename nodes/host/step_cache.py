"""Step caching and a guidance interval in the host's sampling."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...sd35_core.sampling.guidance import step_of
from ...sd35_core.sampling.step_cache import Pace, StepCache
from .guidance import SKIPS
from .network import TransformerOptions
from .report import tell

KEY = "sd35_step_cache"
POST_CFG = "sampler_post_cfg_function"


def with_step_cache(
    model: Any, name: str, pace: Pace, interval: tuple[float, float], node_id: str | None
) -> Any:
    """A clone of MODEL that leaves out steps, and guides in `interval` of the steps alone."""

    def outer_sample(executor: Any, *arguments: Any, **named: Any) -> Any:
        guider, sigmas = executor.class_obj, arguments[3]
        guider.sd35_step_cache = cache = StepCache(pace, len(sigmas) - 1)
        try:
            result = executor(*arguments, **named)
        finally:
            del guider.sd35_step_cache  # a guider can outlive its run
        tell(cache_report(name, cache), node_id)
        return result

    def predict_noise(
        executor: Any,
        x: Tensor,
        sigma: Tensor,
        options: TransformerOptions | None = None,
        seed: Any = None,
    ) -> Tensor:
        guider, options = executor.class_obj, options or {}
        schedule = options.get("transformer_options", {}).get("sample_sigmas")
        cache = getattr(guider, "sd35_step_cache", None)
        if schedule is None or cache is None:
            return executor(x, sigma, options, seed)
        level, step = float(sigma[0]), step_of(sigma[0], schedule)
        guides = interval[0] * cache.steps <= step < interval[1] * cache.steps

        def compute() -> Tensor:
            cfg = getattr(guider, "cfg", None)
            if guides or cfg is None:
                return executor(x, sigma, options, seed)
            guider.cfg = 1.0
            try:
                return executor(x, sigma, options, seed)
            finally:
                guider.cfg = cfg

        if watched(guider, options):
            return compute()
        acting = (guides, *acting_at(guider, options, level, step, cache.steps))
        return cache.denoised(step, level, acting, compute)

    cached = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
    ):
        cached.remove_wrappers_with_key(kind, KEY)
        cached.add_wrapper_with_key(kind, KEY, wrapper)
    return cached


def watched(guider: Any, options: TransformerOptions) -> bool:
    """Whether the sampler itself listens to every step's guidance (the cfg++ samplers do)."""
    known = guider.model_options.get(POST_CFG, ())
    return len(options.get(POST_CFG, ())) > len(known)


def acting_at(
    guider: Any, options: TransformerOptions, sigma: float, step: int, steps: int
) -> tuple[bool, ...]:
    """Which prompts, ControlNets and skip layer guidances with a window act at a step."""
    acting = [skip.active(step, steps) for skip in options.get(SKIPS, ())]
    for conds in guider.conds.values():
        for cond in conds or ():
            acting.append(sigma <= cond.get("timestep_start", sigma))
            acting.append(sigma >= cond.get("timestep_end", sigma))
            control = cond.get("control")
            while control is not None:
                first, last = control.timestep_range or (sigma, sigma)
                acting.append(last <= sigma <= first)
                control = control.previous_controlnet
    return tuple(acting)


def cache_report(name: str, cache: StepCache) -> str:
    """For people: which steps were left out."""
    left = cache.left_out
    if not left:
        return f"Step cache ({name}): no step of {cache.steps} left out."
    steps = ", ".join(str(step + 1) for step in left)
    return f"Step cache ({name}): {len(left)} of {cache.steps} steps left out: {steps}."
