"""SD35TrainLoRA: pictures with captions -> a LoRA in ComfyUI's folder, and the model with it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..sd35_core.errors import SettingError
from ..sd35_core.sampling.recipes import TURBO
from ..sd35_core.training.config import TIMESTEPS, TrainingConfig
from ..sd35_core.training.lora import SPELLINGS
from ..sd35_core.workflow.headers import model_named
from ..sd35_core.workflow.lora_files import lora_in, lora_words
from ..sd35_core.workflow.own_nodes import NAMES
from ..sd35_core.workflow.setup import Lora
from .host.loading import file_of
from .host.report import told
from .host.training import (
    drawing_with,
    encoded_examples,
    end_if_cancelled,
    pictures_given,
    pictures_in_input,
    train_lora,
    with_lora,
)
from .training_inputs import CHOICES, PRECISIONS, advanced_inputs

SAVES = 10
"""Times that a run is saved on its way, and its best found."""
FILE_NAME = re.compile(r"[\w][\w .+-]{0,99}")
MOST_BYTES = 200
WARNED = (
    "This is Large Turbo by its file's name: training makes it forget how to draw in 4 steps. "
    "Train on Large, and use the LoRA on Turbo."
)
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""Names that Windows keeps for its devices."""


class SD35TrainLoRA(io.ComfyNode):
    """Trains a LoRA for the model that is connected."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SD35TrainLoRA",
            display_name=NAMES["SD35TrainLoRA"],
            category="SD3.5",
            description="Trains a LoRA from pictures with captions, writes it into ComfyUI's loras "
            "folder and gives the model with it. Cancelling leaves what was learned until then; "
            "the same queue again goes on from there.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From SD3.5 Loader, without LoRA. Its file is read again for training; "
                    "8 bit and 2 bit files take less memory.",
                ),
                io.Clip.Input("clip", tooltip="Encodes the captions, once, before training."),
                io.Vae.Input("vae", tooltip="Encodes the pictures, once, before training."),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="The file's name in models/loras. Nothing there is replaced: a second "
                    "one is called NAME_2.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures to learn from, of any size; ten to twenty do. A list, as "
                    "Load Image-Text (from Folder) gives it, or a batch.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="What each picture shows, in the same order; or one text for all.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    optional=True,
                    tooltip="In place of images and captions: a folder in ComfyUI's input folder, "
                    "with a .txt file of the same name beside each picture.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    optional=True,
                    tooltip="The words in the captions that call what is learned. Written into the "
                    "file, where managers show it.",
                ),
                io.Int.Input(
                    "steps",
                    default=500,
                    min=1,
                    max=100_000,
                    tooltip="How often it learns from a batch.",
                ),
                io.Float.Input(
                    "rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    round=False,
                    tooltip="How far each step goes. Higher learns sooner and spoils sooner.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="How much the LoRA can hold; its file grows with it.",
                ),
                io.Int.Input(
                    "side",
                    default=512,
                    min=64,
                    max=1440,
                    step=16,
                    tooltip="Pictures are brought to about side x side pixels, in the shape that "
                    "is nearest to their own. 128 for sd35_nano.",
                ),
                io.Int.Input(
                    "batch", default=1, min=1, max=64, tooltip="Pictures in a step, at once."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    # Said, or the page loses it beside captions; fixed, so that the same queue
                    # goes on where a cancelled one stopped.
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The same seed and settings give the same LoRA on the same machine.",
                ),
                *advanced_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA on, at strength 1."),
                io.String.Output(
                    display_name="report", tooltip="What was trained, its losses, its file."
                ),
                io.Image.Output(
                    display_name="curve",
                    tooltip="The loss over the steps: all in black, and for each part of the "
                    "noise levels.",
                ),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The prompts of samples as they were drawn on the way, a row each "
                    "time; white where there are none.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        images, captions = given.pop("images", None), given.pop("captions", None)
        one: dict[str, Any] = {name: v[0] if v else None for name, v in given.items()}
        model, name, side = one["model"], str(one["name"]), one["side"]
        if not FILE_NAME.fullmatch(name) or len(name.encode()) > MOST_BYTES or RESERVED.match(name):
            raise SettingError(
                f"name is '{name}'. Give the LoRA's file a name of letters, digits, spaces, "
                f"'-', '_', '.' and '+' (without a folder, {MOST_BYTES} bytes at most, none that "
                "Windows keeps for itself)."
            )
        base = file_of(model, "trains on")
        folder = one.get("folder") or ""
        if bool(folder) == bool(images):
            raise SettingError(
                "Connect images and captions, or write a folder's name into folder: one of the "
                "two, not both and not neither."
            )
        if folder:
            pictures = pictures_in_input(folder, side)
        elif captions:
            pictures = pictures_given(images, captions, side)
        else:
            raise SettingError("Connect captions: a text for each image, or one for all.")
        config = config_of(one, str(base), str(model.load_device))
        groups = encoded_examples(pictures, one["clip"], one["vae"])
        prompt = config.class_prompt
        drawing = None
        if prompt or config.samples:
            drawing = drawing_with(one["clip"], one["vae"], config)
        path, run, better = train_lora(config, name, pictures, groups, drawing)
        known = model_named(base.name)
        turbo = known is not None and known.recipe == TURBO
        beside = f" beside {config.class_pictures} of '{prompt}'" if prompt else ""
        how_far = f"step {run.step} of {config.steps}: {run.history.words()}"
        lines = (
            f"Wrote {path}. Press R to see it in the loaders.",
            WARNED if turbo else "",
            f"{len(pictures)} pictures{beside}, {how_far}",
            better,
            lora_words(Lora(path.name, 1.0, lora_in(path))),
        )
        text = "\n".join(filter(None, lines))
        shown = told(text, cls.hidden.unique_id)
        end_if_cancelled()
        pictures = (as_image(each) for each in (run.history.curve(), run.strip))
        trained = with_lora(model, path)
        return io.NodeOutput(trained, text, *pictures, ui={"text": (text,), **shown})


def as_image(picture: Any) -> torch.Tensor:
    """An IMAGE of a picture of Pillow's; a small white one of none."""
    if picture is None:
        return torch.ones(1, 64, 64, 3)
    return torch.from_numpy(np.array(picture, dtype=np.float32))[None] / 255


def config_of(widgets: dict[str, Any], base: str, device: str) -> TrainingConfig:
    """What the widgets say; those that an older workflow lacks are at their defaults."""
    known = {each.id: getattr(each, "default", None) for each in _inputs()}
    first = {"targets": next(iter(CHOICES)), "timesteps": TIMESTEPS[0],
             "precision": PRECISIONS[0], "keys": SPELLINGS[0]}  # fmt: skip
    said = {**known, **first, **{k: v for k, v in widgets.items() if v is not None}}
    steps = said["steps"]
    return TrainingConfig(
        output="",
        start=base,
        lora_rank=said["rank"],
        lora_alpha=said["alpha"],
        lora_targets=CHOICES[said["targets"]],
        lora_blocks=said["blocks"].strip(),
        lora_stabilised=said["rank_stabilised"],
        lora_keys=said["keys"],
        trigger=said["trigger"],
        checkpoint=said["checkpointing"],
        steps=steps,
        batch=said["batch"],
        accumulate=said["accumulate"],
        rate=said["rate"],
        warm_up=min(100, steps // 10),
        ema=0.99,
        caption_dropout=said["caption_dropout"],
        encoder_dropout=said["encoder_dropout"],
        timesteps=said["timesteps"],
        bf16=said["precision"] == PRECISIONS[0],
        seed=said["seed"],
        held_out=said["held_out"],
        class_prompt=said["class_prompt"].strip(),
        class_pictures=said["class_pictures"],
        class_weight=said["class_weight"],
        samples=tuple(filter(None, map(str.strip, said["samples"].splitlines()))),
        save_every=max(1, steps // SAVES),
        device=device,
        metadata={"title": said["name"]},
    )


def _inputs() -> list[Any]:
    return SD35TrainLoRA.define_schema().inputs
