"""SD35Sampler and SD35Sigmas: the schedule SD3.5 was made for, and DPM++ 2M along it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sd35_core.sampling.samplers import SAMPLERS
from ..sd35_core.sampling.schedules import DEFAULT_SHIFT, SCHEDULES, make_sigmas
from ..sd35_core.workflow.own_nodes import NAMES
from .host import sampling


def schedule_inputs() -> dict[str, io.Input]:
    """The widgets that make a schedule, by id."""
    return {
        "steps": io.Int.Input(
            "steps",
            default=40,
            min=1,
            max=1000,
            tooltip="Medium: 50. Large: 40. Large Turbo: 4.",
        ),
        "shift": io.Float.Input(
            "shift",
            default=DEFAULT_SHIFT,
            min=0.01,
            max=100.0,
            step=0.01,
            tooltip="How long to stay at high noise, where the layout is made. SD3.5: 3.0; "
            "larger pictures want more, the model that comes with the pack 1.0.",
        ),
        "schedule": io.Combo.Input(
            "schedule",
            options=list(SCHEDULES),
            tooltip="normal is the reference's. simple ends more softly, sgm_uniform with a "
            "longer last step, beta spends steps at both ends, linear_quadratic needs 40 or more.",
        ),
        "denoise": io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="1 makes a new picture; less keeps that much of the latent's own.",
        ),
    }


class SD35Sampler(io.ComfyNode):
    """Sampler, schedule and shift in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schedule = schedule_inputs()
        return io.Schema(
            node_id="SD35Sampler",
            display_name=NAMES["SD35Sampler"],
            category="SD3.5",
            description="Samples SD3.5 with DPM-Solver++(2M), or Euler, on the reference's "
            "shifted schedule. Shift is a widget here: no ModelSamplingSD3 node is needed.",
            inputs=[
                io.Model.Input("model", tooltip="The model, with whatever is attached to it."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="An empty latent gives the size of the picture."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise; the same seed and settings give the same picture.",
                ),
                schedule["steps"],
                io.Float.Input(
                    "cfg",
                    default=4.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How closely to follow the prompt. Medium: 5, or 4 with Skip Layer "
                    "Guidance. Large: 4.5. Large Turbo: 1.",
                ),
                schedule["shift"],
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    tooltip="dpmpp_2m for most; euler for Large Turbo and with ControlNets.",
                ),
                schedule["schedule"],
                schedule["denoise"],
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        shift: float,
        sampler: str,
        schedule: str,
        denoise: float,
    ) -> io.NodeOutput:
        sigmas = make_sigmas(steps, shift, schedule, denoise)
        shifted = sampling.with_shift(model, shift)
        return io.NodeOutput(
            sampling.sample(shifted, positive, negative, latent, seed, cfg, sampler, sigmas)
        )


class SD35Sigmas(io.ComfyNode):
    """The sampler's schedule alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SD35Sigmas",
            display_name=NAMES["SD35Sigmas"],
            category="SD3.5",
            description="The schedule of the DPM++ 2M Shift Sampler, for SamplerCustomAdvanced.",
            inputs=list(schedule_inputs().values()),
            outputs=[io.Sigmas.Output(tooltip="Noise levels, falling to 0.")],
        )

    @classmethod
    def execute(cls, steps: int, shift: float, schedule: str, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(make_sigmas(steps, shift, schedule, denoise))
