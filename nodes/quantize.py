"""SD35Quantize: a model or a ControlNet -> a smaller file beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..sd35_core.errors import SettingError
from ..sd35_core.packing.formats import FP8, INT8, RAW_FP8
from ..sd35_core.quantization.plan import Plan
from ..sd35_core.quantization.quantize import output_path, quantize_file
from ..sd35_core.workflow.own_nodes import NAMES
from .host.calibration import calibration, with_hint
from .host.controlnet import from_loader
from .host.files import PACK_MODELS, first_folder
from .host.loading import file_of
from .host.memory import enough_memory
from .host.report import progress, told

FORMATS = {
    "8 bit (int8)": (8, INT8),
    "8 bit (fp8)": (8, FP8),
    "8 bit (raw fp8)": (8, RAW_FP8),
    "2 bit": (2, INT8),
}
SHIPPED = Path(__file__).parents[1] / "models" / "nano" / "quantization.json"
MODULATION = {"8 bit": 8, "2 bit": 2}
PROMPTS = """\
a portrait of an old fisherman, soft window light
a bowl of ripe apples on a wooden table
a wide mountain valley at sunrise, mist
a red bicycle leaning on a brick wall
a sign that says "open" above a bakery door
two dogs playing in the snow
a watercolour of a harbour with small boats
an isometric drawing of a tiny kitchen"""


class SD35Quantize(io.ComfyNode):
    """Writes a model or a ControlNet with 8 or 2 bits a weight."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SD35Quantize",
            display_name=NAMES["SD35Quantize"],
            category="SD3.5",
            description="Writes a smaller file beside the original, which the loaders take as any "
            "other, and reports what it costs. With a ControlNet connected, the ControlNet is "
            "quantized; otherwise the model.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    tooltip="8 bit is safe: pictures hardly change. 2 bit is a quarter of that "
                    "and changes them; it needs calibration.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="From SD3.5 Loader, without LoRA. For a ControlNet: its base, needed "
                    "to calibrate.",
                ),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="From SD3.5 ControlNet Loader: quantize it, not the model.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Encodes the prompts of the calibration. 2 bit without it is written "
                    "without calibration, and its name says so.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="To calibrate a ControlNet: reads its picture."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="To calibrate a ControlNet: hints, one is used for all prompts.",
                ),
                io.String.Input(
                    "prompts",
                    default=PROMPTS,
                    multiline=True,
                    optional=True,
                    tooltip="Calibration, 2 bit alone: prompts like those you will use, one a "
                    "line.",
                ),
                io.Int.Input(
                    "side",
                    default=512,
                    min=64,
                    max=1440,
                    step=16,
                    optional=True,
                    tooltip="Calibration: width and height of the pictures. 128 for sd35_nano.",
                ),
                io.Int.Input(
                    "steps",
                    default=12,
                    min=1,
                    max=100,
                    optional=True,
                    tooltip="Calibration: steps of each picture.",
                ),
                io.Combo.Input(
                    "modulation",
                    options=list(MODULATION),
                    default="8 bit",
                    optional=True,
                    advanced=True,
                    tooltip="2 bit alone: a third of the weights make the modulation (adaLN), "
                    "which acts on every token. At 2 bit the file is half as large and worse.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        format: str,
        model: Any = None,
        control_net: Any = None,
        clip: Any = None,
        vae: Any = None,
        image: Any = None,
        prompts: str = PROMPTS,
        side: int = 512,
        steps: int = 12,
        modulation: str = "8 bit",
    ) -> io.NodeOutput:
        bits, eight = FORMATS[format]
        plan = Plan(bits, eight, MODULATION[modulation])
        path = from_loader(control_net).path if control_net is not None else file_of(model)
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        moments = None
        if bits == 2 and clip is not None and lines:
            if model is None:
                raise SettingError("To calibrate a ControlNet, connect its base to model too.")
            attach = None
            if control_net is not None:
                attach = control_net, with_hint(control_net, vae, image)
            moments = calibration(model, clip, lines, side, steps, attach)
        with enough_memory(f"quantizing '{path.name}'", "Make side smaller, or close programs."):
            target = None
            if PACK_MODELS in path.parents:  # an update of the pack would take the file away
                folder = "controlnet" if control_net is not None else "diffusion_models"
                name = output_path(path, plan, moments is not None).name
                target = first_folder(folder) / name
            out, report = quantize_file(path, plan, moments, progress(), out=target)
        score = shipped_score(path, output_path(path, plan, report.calibrated).name)
        text = f"Wrote {out}. Press R to see it in the loaders.\n"
        text += f"{score}{report.text()}"
        return io.NodeOutput(ui={"text": (text,), **told(text, cls.hidden.unique_id)})


def shipped_score(path: Path, name: str) -> str:
    """What is known of the shipped model's pictures in the format of the file `name`; empty for
    others.

    Figures of tools/nano/quantization_study.py: 500 captions, 10 steps of euler.
    """
    measured = json.loads(SHIPPED.read_text(encoding="utf-8"))
    if path.resolve() != SHIPPED.resolve().with_name(measured["formats"]["16 bit"]["file"]):
        return ""
    things = {f["file"]: f["score"]["all"]["thing"] for f in measured["formats"].values()}
    if name not in things:
        return ""
    return (
        f"Pictures that show the right thing, of 500 captions, as measured when this model was "
        f"made: {things[path.name]:.1%} before, {things[name]:.1%} after.\n"
    )
