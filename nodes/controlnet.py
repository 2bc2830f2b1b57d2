"""SD35ControlNetLoader, SD35ControlNetApply, SD35ControlHint: pictures that steer the picture."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..sd35_core.encoders import hints
from ..sd35_core.errors import SettingError
from ..sd35_core.workflow.own_nodes import NAMES
from .host import files
from .host.controlnet import (
    COMFYUI,
    STABILITY,
    Options,
    check_kind,
    controlnet_from,
    from_loader,
    steered,
)
from .host.loading import read
from .host.memory import enough_memory
from .host.packed import described
from .host.report import told

NEAR = list(hints.NEAR)
FROM_CONTROL_NET = "as the ControlNet"


class SD35ControlNetLoader(io.ComfyNode):
    """Loads an SD3.5 ControlNet from a file."""

    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SD35ControlNetLoader",
            display_name=NAMES["SD35ControlNetLoader"],
            category="SD3.5",
            description="Loads a blur, canny or depth ControlNet for SD3.5 Large or Medium. It "
            "works with every node that applies a ControlNet.",
            inputs=[
                io.Combo.Input(
                    "control_net",
                    options=files.controlnet_files(),
                    tooltip="Stability AI's files for SD3.5, with their own or diffusers' names. "
                    "Those called nano are for the small model that comes with the pack.",
                ),
                io.Combo.Input(
                    "depth_maps",
                    options=NEAR,
                    tooltip="How depth maps come. Depth nodes of ComfyUI and SD3.5 Control Hint "
                    "make near bright; Stability's own samples have near dark.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "reference",
                    options=[STABILITY, COMFYUI],
                    default=STABILITY,
                    optional=True,
                    advanced=True,
                    tooltip="Whose arithmetic to follow where the two disagree (see the help "
                    "page). ComfyUI's repeats pictures made with its own ControlNet loader.",
                ),
            ],
            outputs=[io.ControlNet.Output(tooltip="For SD3.5 ControlNet Apply or any other.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls, control_net: str, depth_maps: str, reference: str = STABILITY
    ) -> str:
        """Changes when the file is replaced, so that it is loaded again."""
        return files.fingerprint(files.controlnet_path(control_net))

    @classmethod
    def execute(
        cls, control_net: str, depth_maps: Any, reference: str = STABILITY
    ) -> io.NodeOutput:
        options = Options(depth_maps, reference)
        with enough_memory(f"loading '{control_net}'", "Close other programs."):
            loaded = controlnet_from(read(files.controlnet_path(control_net)), options)
        config = loaded.config
        said = (
            f"{config.control_type or 'unknown kind of'} ControlNet ({config.kind}), "
            f"{config.layers} {'layer' if config.layers == 1 else 'layers'} of width "
            f"{config.hidden}{described(loaded.control_model)}."
        )
        return io.NodeOutput(loaded, ui=told(said, cls.hidden.unique_id))


class SD35ControlNetApply(io.ComfyNode):
    """Attaches a ControlNet and its picture to both prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SD35ControlNetApply",
            display_name=NAMES["SD35ControlNetApply"],
            category="SD3.5",
            description="Steers both prompts by a picture: blur, canny edges or depth. Several "
            "in a row add up.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.ControlNet.Input("control_net", tooltip="From SD3.5 ControlNet Loader."),
                io.Vae.Input("vae", tooltip="SD3.5's VAE: the ControlNet reads latents."),
                io.Image.Input(
                    "image", tooltip="The hint, from SD3.5 Control Hint or any preprocessor."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="0 is off; Stability recommends 0.6 to 1.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Share of the way from noise to picture at which it begins.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Share of the way at which it ends; an early end leaves the details "
                    "to the prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, steered."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt, steered."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: Any,
        negative: Any,
        control_net: Any,
        vae: Any,
        image: Any,
        strength: float,
        start: float,
        end: float,
    ) -> io.NodeOutput:
        if start > end:
            raise SettingError(
                f"start is {start} and end is {end}: no step lies between. Make end the larger."
            )
        if strength == 0 or start == end:
            return io.NodeOutput(positive, negative)
        check_kind(control_net)
        hint = hints.rgb(image)
        prompts = steered((positive, negative), control_net, vae, hint, strength, (start, end))
        return io.NodeOutput(*prompts)


class SD35ControlHint(io.ComfyNode):
    """Makes the hint that a ControlNet expects from a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SD35ControlHint",
            display_name=NAMES["SD35ControlHint"],
            category="SD3.5",
            description="Makes a ControlNet's hint from a picture: blurs it, finds its edges, or "
            "puts a depth map right. The second output shows what the VAE will see.",
            inputs=[
                io.Image.Input("image", tooltip="A picture; for depth, the map of a depth node."),
                io.ControlNet.Input("control_net", tooltip="Says which kind of hint it needs."),
                io.Combo.Input(
                    "kind",
                    options=[FROM_CONTROL_NET, "blur", "canny", "depth"],
                    tooltip="Leave it; another kind than the ControlNet's is refused. It is "
                    "there for files that don't say what they are.",
                ),
                io.Float.Input(
                    "blur_radius",
                    default=hints.BLUR_RADIUS,
                    min=0.0,
                    max=200.0,
                    step=0.5,
                    tooltip="Blur alone: the Gaussian's radius in pixels of a 1024 pixel picture.",
                ),
                io.Float.Input(
                    "canny_low",
                    default=hints.CANNY_THRESHOLDS[0],
                    min=0.01,
                    max=0.99,
                    step=0.01,
                    tooltip="Canny alone: weaker edges than this are dropped.",
                ),
                io.Float.Input(
                    "canny_high",
                    default=hints.CANNY_THRESHOLDS[1],
                    min=0.01,
                    max=0.99,
                    step=0.01,
                    tooltip="Canny alone: stronger edges than this are always kept.",
                ),
                io.Combo.Input(
                    "depth_map",
                    options=NEAR,
                    tooltip="Depth alone: how the map comes. Most depth nodes make near bright.",
                ),
                io.Boolean.Input(
                    "normalise",
                    default=True,
                    tooltip="Depth alone: stretch each map from black to white.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="hint", tooltip="For SD3.5 ControlNet Apply."),
                io.Image.Output(
                    display_name="seen", tooltip="To look at: what the VAE will see of it."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Any,
        control_net: Any,
        kind: str,
        blur_radius: float,
        canny_low: float,
        canny_high: float,
        depth_map: Any,
        normalise: bool,
    ) -> io.NodeOutput:
        control_net = from_loader(control_net)
        said = control_net.config.control_type
        if kind == FROM_CONTROL_NET:
            kind = said or ""
        elif said is not None and said != kind:
            raise SettingError(
                f"kind is {kind}, but the ControlNet was trained on {said}. Set kind to "
                f"'{FROM_CONTROL_NET}', or load the {kind} ControlNet."
            )
        if kind == "blur":
            hint = hints.blurred(image, blur_radius)
        elif kind == "canny":
            hint = hints.edges(image, canny_low, canny_high)
        elif kind == "depth":
            hint = hints.depth(image, normalise, depth_map != control_net.options.near)
        else:
            raise SettingError(
                "The ControlNet's file does not say what it was trained on. Set kind to blur, "
                "canny or depth."
            )
        seen = control_net.seen_by_vae(hint)
        low, high = control_net.seen_by_vae(torch.tensor([0.0, 1.0])).sort().values
        return io.NodeOutput(hint, ((seen - low) / (high - low)).clamp(0, 1))
