"""Calibration in the host: a model draws prompts, and what its layers see is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...sd35_core.encoders.hints import rgb
from ...sd35_core.errors import SettingError
from ...sd35_core.network.latent import LATENT_CHANNELS, PIXELS
from ...sd35_core.quantization.calibration import (
    Calls,
    Moments,
    moments_of,
    moments_of_controlnet,
    recorded,
)
from ...sd35_core.quantization.fit import fitted_plan, halves
from ...sd35_core.quantization.influence import influence
from ...sd35_core.quantization.plan import Fitted
from ...sd35_core.sampling.schedules import make_sigmas
from .controlnet import SD35ControlNet, steered
from .network import HostMMDiTX, network_in
from .sampling import sample

CFG = 4.0


class Calibration:
    """What a MODEL's layers see, or a ControlNet's, while it draws square pictures; it draws when
    that is first asked for.

    attach: (ControlNet object, positive, negative -> both with it), to calibrate a ControlNet.
    """

    def __init__(
        self, model: Any, clip: Any, prompts: list[str], side: int, steps: int, attach: Any = None
    ):
        network = network_in(model.model)
        if not isinstance(network, HostMMDiTX):
            raise SettingError(
                f"Calibration needs a model from SD35Loader; this one is a "
                f"{type(network).__name__}."
            )
        self.model, self.clip, self.attach = model, clip, attach
        self.network, self.prompts = network, prompts
        self.side, self.steps = side, steps

    @cached_property
    def calls(self) -> Calls:
        """Recorded while it draws."""
        model = self.model
        negative = encoded(self.clip, "")
        side = self.side // PIXELS
        latent = {"samples": torch.zeros(1, LATENT_CHANNELS, side, side)}
        sigmas = make_sigmas(self.steps, model.get_model_object("model_sampling").shift, "simple")
        with recorded(self.attach[0].control_model if self.attach else self.network) as calls:
            for seed, prompt in enumerate(self.prompts):
                pair = encoded(self.clip, prompt), negative
                positive, negated = self.attach[1](*pair) if self.attach else pair
                sample(model, positive, negated, latent, seed, CFG, "euler", sigmas)
        return calls

    def moments(self) -> Iterator[Moments]:
        """Of one block after the other."""
        chosen, device = self.calls.chosen(), self.model.load_device
        if self.attach is None:
            comfy.model_management.load_models_gpu([self.model])
            yield from moments_of(self.network, chosen, device)
        else:
            control = self.attach[0]
            comfy.model_management.load_models_gpu([self.model, control.control_model_wrapped])
            yield from moments_of_controlnet(control.control_model, self.calls.base, chosen, device)

    def fitted(self, tensors: Mapping[str, Tensor], size: int, on_layer: Any) -> Fitted:
        """The plan of at most so many bytes for the model's own tensors."""
        chosen, device = self.calls.chosen(), self.model.load_device
        comfy.model_management.load_models_gpu([self.model])
        moved = influence(self.network, chosen, device)
        return fitted_plan(tensors, size, moved, halves(self.network, chosen, device), on_layer)


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
