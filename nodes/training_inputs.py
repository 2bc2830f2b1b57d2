"""How SD35TrainLoRA trains, for those who want to say it: its advanced widgets."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sd35_core.training.config import TIMESTEPS
from ..sd35_core.training.lora import SPELLINGS, TARGETS

CHOICES = {" + ".join(list(TARGETS)[:count]): tuple(TARGETS)[:count] for count in (1, 2, 3)}
"""Layers to change, as the widget names them."""
PRECISIONS = ("bf16", "fp32")


def advanced_inputs() -> list[Any]:
    """In the order in which they came; all can be left out."""
    return [
        io.Combo.Input(
            "targets",
            options=list(CHOICES),
            optional=True,
            advanced=True,
            tooltip="The layers that change. attention keeps anatomy best; modulation "
            "(adaLN) changes most.",
        ),
        io.String.Input(
            "blocks",
            default="",
            optional=True,
            advanced=True,
            tooltip="The blocks that change, such as 0-11; empty for all. For Large also "
            "composition (12-24) or detail (30-37), after Stability AI's guide.",
        ),
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=1024.0,
            optional=True,
            advanced=True,
            tooltip="The change is multiplied by alpha / rank; 0 takes the rank.",
        ),
        io.Boolean.Input(
            "rank_stabilised",
            default=False,
            optional=True,
            advanced=True,
            tooltip="alpha / sqrt(rank) instead (rsLoRA): as strong at every rank.",
        ),
        io.Combo.Input(
            "timesteps",
            options=list(TIMESTEPS),
            optional=True,
            advanced=True,
            tooltip="How noisy the pictures of a step are. logit-normal: most at the "
            "middle, as SD3 was trained; shifted: more noise, for composition.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="The share of pictures without caption: guidance (cfg) needs some.",
        ),
        io.Float.Input(
            "encoder_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="The share that goes without each text encoder, as SD3 was trained "
            "(0.46), so that it draws without T5 too.",
        ),
        io.Int.Input(
            "accumulate",
            default=1,
            min=1,
            max=1024,
            optional=True,
            advanced=True,
            tooltip="Batches in a step, one after the other: as a larger batch, in the "
            "memory of one.",
        ),
        io.Boolean.Input(
            "checkpointing",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Blocks are computed twice in place of being kept: slower, in a "
            "fraction of the memory.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            optional=True,
            advanced=True,
            tooltip="Of the sums; the LoRA itself learns in fp32. There is no fp16: "
            "gradients of a mean over a picture are too small for it.",
        ),
        io.Combo.Input(
            "keys",
            options=list(SPELLINGS),
            optional=True,
            advanced=True,
            tooltip="Whose names the file has. ComfyUI reads all three.",
        ),
        io.Float.Input(
            "held_out",
            default=0.0,
            min=0.0,
            max=0.9,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="The share of pictures that are not learned from: by their loss the "
            "best LoRA on the way is found. At 0 it is found by those that are.",
        ),
        io.String.Input(
            "class_prompt",
            default="",
            optional=True,
            advanced=True,
            tooltip="What the subject is one of, such as 'a dog': the model draws pictures of it "
            "first and learns from them too, so that not every dog becomes yours. Empty: none; a "
            "step takes twice as long with it.",
        ),
        io.Int.Input(
            "class_pictures",
            default=50,
            min=1,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="How many pictures of class_prompt are drawn, once, before training.",
        ),
        io.Float.Input(
            "class_weight",
            default=1.0,
            min=0.01,
            max=10.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="How much pictures of the class count, against 1 of the subject's.",
        ),
        io.String.Input(
            "samples",
            default="",
            multiline=True,
            optional=True,
            advanced=True,
            tooltip="Prompts, one a line, that are drawn ten times on the way, each time from the "
            "same noise; the strip of them grows on this node.",
        ),
    ]
