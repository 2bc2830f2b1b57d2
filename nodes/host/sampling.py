"""Sampling through the host: its noise, guider, previews, progress and cancel; our sampler."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...sd35_core.errors import SettingError
from ...sd35_core.sampling import SAMPLERS

Latent = dict[str, Any]


class _ShiftedFlow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The host's rectified flow with a shift of its own."""


def with_shift(model: Any, shift: float) -> Any:
    """A clone of MODEL whose percentages of the schedule (ControlNet windows) follow `shift`."""
    sampling = _ShiftedFlow(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    shifted = model.clone()
    shifted.add_object_patch("model_sampling", sampling)
    return shifted


def sample(
    model: Any,
    positive: list[Any],
    negative: list[Any],
    latent: Latent,
    seed: int,
    cfg: float,
    sampler: str,
    sigmas: Tensor,
) -> Latent:
    """A LATENT denoised along `sigmas`; noise on the CPU from `seed`, as the host makes it.

    Raises SettingError when the result is not finite.
    """
    latent = dict(latent)
    ratios = [latent.pop(f"downscale_ratio_{kind}", None) for kind in ("spacial", "temporal")]
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    out = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.KSAMPLER(SAMPLERS[sampler]),
        sigmas,
        positive,
        negative,
        start,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    if not torch.isfinite(out).all():
        raise SettingError(
            f"The model gave values that are not numbers, so the picture would be black (cfg "
            f"{cfg}, dtype {model.model_dtype()}). Use another weight_dtype in SD35Loader or a "
            "lower cfg; if it stays, the model file is damaged."
        )
    return {**latent, "samples": out}
