"""SD35Quantize: a model or a ControlNet -> a smaller file beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..sd35_core.checkpoint.tensor_file import TensorFile
from ..sd35_core.errors import SettingError
from ..sd35_core.packing.formats import FP8, INT8, RAW_FP8
from ..sd35_core.packing.kitchen import CONVROT_INT8, CONVROT_W4A4, MXFP8, NVFP4
from ..sd35_core.quantization.fit import check_size
from ..sd35_core.quantization.plan import Fitted, Plan
from ..sd35_core.quantization.quantize import network_of, output_path, quantize_file
from ..sd35_core.workflow.own_nodes import NAMES
from .host import files
from .host.calibration import Calibration, with_hint
from .host.controlnet import from_loader
from .host.files import PACK_MODELS, first_folder
from .host.loading import file_of
from .host.memory import enough_memory
from .host.packed import check_known
from .host.report import progress, tell, told

FORMATS: dict[str, Plan] = {
    "8 bit (int8)": Plan(8, INT8),
    "8 bit (fp8)": Plan(8, FP8),
    "8 bit (raw fp8)": Plan(8, RAW_FP8),
    "2 bit": Plan(2),
    "4 bit": Plan(4),
    "3 bit": Plan(3),
    "8 bit (int8 convrot)": Plan(8, CONVROT_INT8),
    "8 bit (mxfp8)": Plan(8, MXFP8),
    "4 bit (nvfp4)": Plan(4, four=NVFP4),
    "4 bit (convrot w4a4)": Plan(4, four=CONVROT_W4A4),
}
NONE = "none"
FIT = "to fit a size"
CALIBRATED = ("4 bit", "3 bit", "2 bit", FIT)
SHIPPED = Path(__file__).parents[1] / "models" / "nano" / "quantization.json"
MODULATION = {"8 bit": 8, "2 bit": 2, "4 bit": 4, "3 bit": 3}
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
    """Writes a model or a ControlNet with fewer bits a weight."""

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
                    options=[*FORMATS, FIT],
                    tooltip="8 bit is safe: pictures hardly change. The fewer, the smaller the "
                    "file and the more they change; below 8 it needs calibration. To fit a size: "
                    "bits where they matter most, for the model alone.",
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
                    tooltip="Encodes the prompts of the calibration. Without it fewer than 8 bits "
                    "are written without calibration, and the name says so.",
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
                    tooltip="Calibration, below 8 bits: prompts like those you will use, one a "
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
                    tooltip="Below 8 bits: a third of the weights make the modulation (adaLN), "
                    "which acts on every token. With fewer the file is smaller and worse.",
                ),
                io.Float.Input(
                    "size",
                    default=2.0,
                    min=0.01,
                    max=64.0,
                    step=0.01,
                    optional=True,
                    tooltip="To fit a size: what the model may take on the card, in GB, without "
                    "text encoders and VAE.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=[NONE, *files.listed("text_encoders")],
                    default=NONE,
                    optional=True,
                    advanced=True,
                    tooltip="A T5 to quantize in place of the model, in one of ComfyUI's own "
                    "formats: 8 bit, or 4 bit (nvfp4).",
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
        size: float = 2.0,
        text_encoder: str = NONE,
    ) -> io.NodeOutput:
        if text_encoder != NONE:
            path, folder, clip = files.path_in("text_encoders", text_encoder), "text_encoders", None
        elif control_net is not None:
            path, folder = from_loader(control_net).path, "controlnet"
        else:
            path, folder = file_of(model), "diffusion_models"
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        seen = None
        if format in CALIBRATED and clip is not None and lines:
            if model is None:
                raise SettingError("To calibrate a ControlNet, connect its base to model too.")
            attach = None
            if control_net is not None:
                attach = control_net, with_hint(control_net, vae, image)
            seen = Calibration(model, clip, lines, side, steps, attach)
        if format == FIT:
            with enough_memory(f"measuring '{path.name}'", "Make side smaller."):
                plan = plan_for(path, size, seen)
            tell(plan.text(), cls.hidden.unique_id)
        else:
            plan = replace(FORMATS[format], modulation_bits=MODULATION[modulation])
            check_known(plan.eight if plan.bits == 8 else plan.four)
        moments = None if seen is None else seen.moments()
        with enough_memory(f"quantizing '{path.name}'", "Make side smaller, or close programs."):
            target = None
            if PACK_MODELS in path.parents:  # an update of the pack would take the file away
                name = output_path(path, plan, moments is not None).name
                target = first_folder(folder) / name
            out, report = quantize_file(path, plan, moments, progress(), out=target)
        score = shipped_score(path, output_path(path, plan, report.calibrated).name)
        text = (
            f"Wrote {out}: {report.before / 1e6:,.1f} MB -> {report.after / 1e6:,.1f} MB. Press R "
            f"to see it in the loaders.\n{score}{report.text()}"
        )
        return io.NodeOutput(ui={"text": (text,), **told(text, cls.hidden.unique_id)})


def plan_for(path: Path, size: float, seen: Calibration | None) -> Fitted:
    """The plan for the model in a file, of so many GB. Raises SettingError for a ControlNet, and
    where nothing says what its layers see."""
    if seen is None or seen.attach is not None:
        raise SettingError(
            "To fit a size which layers need their bits is measured on the model: connect model "
            "and clip, no ControlNet, and write some prompts."
        )
    tensors, _ = network_of(TensorFile(path), f"'{path.name}'")
    check_size(tensors, round(size * 1e9))
    return seen.fitted(tensors, round(size * 1e9), progress())


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
