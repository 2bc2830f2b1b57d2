"""Sampling through the host: its noise, guider, previews, progress and cancel; our sampler."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...sd35_core.errors import SettingError
from ...sd35_core.network.latent import PIXELS
from ...sd35_core.sampling.samplers import SAMPLERS
from .memory import enough_memory
from .report import log

HostLatent = dict[str, Any]


class _ShiftedFlow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The host's rectified flow with a shift of its own."""


def with_shift(model: Any, shift: float) -> Any:
    """A clone of MODEL whose percentages of the schedule (ControlNet windows) follow `shift`."""
    sampling = _ShiftedFlow(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    shifted = model.clone()
    shifted.add_object_patch("model_sampling", sampling)
    shifted.add_callback_with_key(CallbacksMP.ON_CLEANUP, "sd35_shift", _forget_levels)
    return shifted


def _forget_levels(patcher: Any) -> None:
    """With dynamic weights the host would put the shifted noise levels into the model itself, as
    a buffer that it took away, when it loads it again."""
    getattr(patcher, "backup_buffers", {}).pop("model_sampling.sigmas", None)


def sample(
    model: Any,
    positive: list[Any],
    negative: list[Any],
    latent: HostLatent,
    seed: int,
    cfg: float,
    sampler: Any,
    sigmas: Tensor,
) -> HostLatent:
    """A LATENT denoised along `sigmas`; noise on the CPU from `seed`, as the host makes it.

    sampler: the name of one of ours, or the host's SAMPLER.

    Raises SettingError when the latent, or every picture of the result, is not finite; pictures
    that are broken beside whole ones are a warning.
    """
    latent = dict(latent)
    ratio = latent.pop("downscale_ratio_spacial", None)
    latent.pop("downscale_ratio_temporal", None)
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"], ratio)
    if bad := int((~torch.isfinite(start)).sum()):
        raise SettingError(
            f"{bad:,} of {start.numel():,} values of the latent are not numbers, so the picture "
            "would be black. Look for the node that made it; a VAE in fp16 can do that (start "
            "ComfyUI with --fp32-vae)."
        )
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    count, height, width = start.shape[0], *(PIXELS * side for side in start.shape[-2:])
    with enough_memory(
        f"sampling {count} picture{'s' if count > 1 else ''} of {width}x{height}",
        "Make the picture or the batch smaller, or the model: SD35Loader has fp8 in weight_dtype "
        "and a modulation_cache.",
    ):
        out = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            comfy.samplers.KSAMPLER(SAMPLERS[sampler]) if isinstance(sampler, str) else sampler,
            sigmas,
            positive,
            negative,
            start,
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    check_finite(out, f"cfg {cfg}, dtype {model.model_dtype()}")
    return {**latent, "samples": out}


def check_finite(out: Tensor, settings: str) -> None:
    """Raise SettingError when no picture of a batch is whole; warn when some are not."""
    broken = (~torch.isfinite(out)).flatten(1).sum(dim=1)
    count, pictures = int((broken > 0).sum()), len(out)
    if not count:
        return
    text = (
        f"{count} of {pictures} pictures would be black: {int(broken.sum()):,} of {out.numel():,} "
        f"values that the model gave are not numbers ({settings}). Use another weight_dtype in "
        "SD35Loader or a lower cfg; if it stays, a prompt's encoding, a ControlNet's picture or "
        "the model file is damaged."
    )
    if count == pictures:
        raise SettingError(text)
    log.warning(text)
