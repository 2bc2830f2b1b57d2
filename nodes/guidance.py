"""SkipLayerGuidance: better structure for SD3.5 Medium."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sd35_core.errors import SettingError
from ..sd35_core.sampling.guidance import SkipLayers, parse_layers
from ..sd35_core.sampling.recipes import MEDIUM_LAYERS, layers_text
from ..sd35_core.workflow.own_nodes import NAMES
from .host.guidance import depth_of, with_skip_layers

KEEP, DROP = "keep", "drop"


class SkipLayerGuidance(io.ComfyNode):
    """Guides away from what the model predicts with some layers skipped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkipLayerGuidance",
            display_name=NAMES["SkipLayerGuidance"],
            category="SD3.5",
            description="Guides away from what the model predicts with some layers skipped, which "
            "mends anatomy and structure on SD3.5 Medium. Counts steps, so it acts alike on "
            "every schedule.",
            inputs=[
                io.Model.Input("model", tooltip="A model from SD3.5 Loader."),
                io.String.Input(
                    "layers",
                    default=layers_text(MEDIUM_LAYERS.layers),
                    tooltip="Layers to skip, from 0, such as 7, 8, 9 or 7-9. Made for SD3.5 "
                    "Medium; Large's layers 7 to 9 do almost nothing good.",
                ),
                io.Float.Input(
                    "scale",
                    default=MEDIUM_LAYERS.scale,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Strength; 0 is off. Medium was made for 2.5 with cfg 4.",
                ),
                io.Float.Input(
                    "start",
                    default=MEDIUM_LAYERS.start,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Share of the steps after which it begins.",
                ),
                io.Float.Input(
                    "end",
                    default=MEDIUM_LAYERS.end,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Share of the steps before which it ends. 0.01 to 0.20 of 50 steps is "
                    "9 steps, each half as long again.",
                ),
                io.Combo.Input(
                    "controlnet",
                    options=[KEEP, DROP],
                    default=KEEP,
                    optional=True,
                    advanced=True,
                    tooltip="Whether ControlNets act in the pass with skipped layers too. The "
                    "reference drops them there; kept, the guidance judges the layers alone.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the guidance attached.")],
        )

    @classmethod
    def execute(
        cls, model: Any, layers: str, scale: float, start: float, end: float, controlnet: str = KEEP
    ) -> io.NodeOutput:
        if scale == 0:
            return io.NodeOutput(model)
        if start >= end:
            raise SettingError(
                f"start is {start} and end is {end}: no step lies between. Make end the larger."
            )
        chosen = parse_layers(layers, depth_of(model))
        if not chosen:
            return io.NodeOutput(model)
        skip = SkipLayers(chosen, scale, start, end)
        return io.NodeOutput(with_skip_layers(model, skip, keep_control=controlnet == KEEP))
