"""Calibration in the host: a model draws prompts, and what its layers see is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch

from ...sd35_core.encoders.hints import rgb
from ...sd35_core.errors import SettingError
from ...sd35_core.network.latent import LATENT_CHANNELS, PIXELS
from ...sd35_core.quantization.calibration import (
    Moments,
    moments_of,
    moments_of_controlnet,
    recorded,
)
from ...sd35_core.sampling.schedules import make_sigmas
from .controlnet import SD35ControlNet, steered
from .network import HostMMDiTX, network_in
from .sampling import sample

CFG = 4.0


def calibration(
    model: Any, clip: Any, prompts: list[str], side: int, steps: int, attach: Any = None
) -> Iterator[Moments]:
    """The moments of a MODEL's layers, or of a ControlNet's, while it draws square pictures; it
    draws when the first are asked for.

    attach: (ControlNet object, positive, negative -> both with it), to calibrate a ControlNet.
    """
    network = network_in(model.model)
    if not isinstance(network, HostMMDiTX):
        raise SettingError(
            f"Calibration needs a model from SD35Loader; this one is a {type(network).__name__}."
        )
    control = attach[0].control_model if attach else None
    negative = encoded(clip, "")
    latent = {"samples": torch.zeros(1, LATENT_CHANNELS, side // PIXELS, side // PIXELS)}
    sigmas = make_sigmas(steps, model.get_model_object("model_sampling").shift, "simple")
    with recorded(network if control is None else control) as calls:
        for seed, prompt in enumerate(prompts):
            pair = encoded(clip, prompt), negative
            positive, negated = attach[1](*pair) if attach else pair
            sample(model, positive, negated, latent, seed, CFG, "euler", sigmas)
    chosen, device = calls.chosen(), model.load_device
    if control is None:
        comfy.model_management.load_models_gpu([model])
        yield from moments_of(network, chosen, device)
    else:
        comfy.model_management.load_models_gpu([model, attach[0].control_model_wrapped])
        yield from moments_of_controlnet(control, calls.base, chosen, device)


def encoded(clip: Any, text: str) -> Any:
    """A CONDITIONING."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def with_hint(control_net: SD35ControlNet, vae: Any, image: Any) -> Any:
    """(positive, negative) -> both with the ControlNet and its first picture."""
    if image is None:
        raise SettingError("To calibrate a ControlNet, connect its hint to image, and a VAE.")

    def attach(positive: Any, negative: Any) -> Any:
        prompts = positive, negative
        return steered(prompts, control_net, vae, rgb(image[:1]), 1.0, (0.0, 1.0))

    return attach
