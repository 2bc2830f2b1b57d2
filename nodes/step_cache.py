"""SD35StepCache: fewer model calls, approximately."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sd35_core.errors import SettingError
from ..sd35_core.sampling.step_cache import PACES
from ..sd35_core.workflow.own_nodes import NAMES
from .host.guidance import depth_of
from .host.step_cache import with_step_cache


class SD35StepCache(io.ComfyNode):
    """Leaves out steps in which the picture would hardly change."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SD35StepCache",
            display_name=NAMES["SD35StepCache"],
            category="SD3.5",
            description="Leaves out steps in which the picture would hardly change: faster, and "
            "the picture changes a little. Keeps Skip Layer Guidance, ControlNets and LoRAs, and "
            "says which steps it left out.",
            inputs=[
                io.Model.Input("model", tooltip="A model from SD3.5 Loader."),
                io.Combo.Input(
                    "pace",
                    options=list(PACES),
                    tooltip="safe: at most every other step is left out, and none while the "
                    "picture changes wholly. fast: two of three. fastest: four of five, for "
                    "drafts.",
                ),
                io.Float.Input(
                    "guidance_start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the steps before which cfg is 1: such a step takes half the "
                    "time. 0 guides from the first step on.",
                ),
                io.Float.Input(
                    "guidance_end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the steps from which on cfg is 1. 1 guides to the end.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the cache attached.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, pace: str, guidance_start: float = 0.0, guidance_end: float = 1.0
    ) -> io.NodeOutput:
        depth_of(model)
        if guidance_start >= guidance_end:
            raise SettingError(
                f"guidance_start is {guidance_start} and guidance_end is {guidance_end}: no step "
                "would be guided. Make guidance_end the larger."
            )
        interval = guidance_start, guidance_end
        cached = with_step_cache(model, pace, PACES[pace], interval, cls.hidden.unique_id)
        return io.NodeOutput(cached)
