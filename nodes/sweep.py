"""SD35SkipLayerSweep: one queue, a labelled sheet over layers or scales."""

from __future__ import annotations

import math
import re
from itertools import product
from typing import Any

import torch
from comfy_api.latest import io

from ..sd35_core.errors import SettingError
from ..sd35_core.sampling.guidance import SkipLayers, parse_layers
from ..sd35_core.sampling.schedules import make_sigmas
from ..sd35_core.workflow.own_nodes import NAMES
from .guidance import SkipLayerGuidance
from .host import sampling
from .host.guidance import depth_of, with_skip_layers
from .host.report import progress, told
from .sampler import SD35Sampler
from .sheet import sheet

LAYERS, SCALES = "layers", "scales"
MOST_PICTURES = 64
LARGEST_SCALE = 10.0


class SD35SkipLayerSweep(io.ComfyNode):
    """Draws one seed without and with Skip Layer Guidance, over layers or scales."""

    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def define_schema(cls) -> io.Schema:
        known = {
            each.id: each
            for node in (SD35Sampler, SkipLayerGuidance)
            for each in node.define_schema().inputs
        }
        widgets = ("seed", "steps", "cfg", "shift", "sampler", "schedule", "denoise")
        return io.Schema(
            node_id="SD35SkipLayerSweep",
            display_name=NAMES["SD35SkipLayerSweep"],
            category="SD3.5",
            description="Draws the same seed without Skip Layer Guidance and with each of several "
            "sets of layers, or scales, and lays the pictures out on one labelled sheet.",
            inputs=[
                *(known[name] for name in ("model", "positive", "negative", "latent")),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                *(known[name] for name in widgets),
                io.Combo.Input(
                    "over",
                    options=[LAYERS, SCALES],
                    tooltip="What differs from picture to picture.",
                ),
                io.String.Input(
                    "layers",
                    default="7; 8; 9; 7, 8, 9",
                    tooltip="Over layers: sets of layers to skip, separated by semicolons. Over "
                    "scales: one set, such as 7, 8, 9 or 7-9.",
                ),
                io.String.Input(
                    "scales",
                    default="2.5",
                    tooltip="Over scales: strengths from 0 to 10, such as 1; 2.5; 4. Over layers: "
                    "one.",
                ),
                known["start"],
                known["end"],
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet",
                    tooltip="All pictures on one, labelled; the one without guidance first.",
                ),
                io.Image.Output(
                    display_name="pictures",
                    tooltip="The same pictures as a batch, without labels and in the same order.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        vae: Any,
        seed: int,
        steps: int,
        cfg: float,
        shift: float,
        sampler: str,
        schedule: str,
        denoise: float,
        over: str,
        layers: str,
        scales: str,
        start: float,
        end: float,
    ) -> io.NodeOutput:
        sigmas = make_sigmas(steps, shift, schedule, denoise)
        skips = skips_of(over, layers, scales, start, end, depth_of(model))
        total, batch, names = len(sigmas) - 1, len(latent["samples"]), ["none", *skips.values()]
        covered = max(len(skip.acting(total)) for skip in skips)
        if not covered:
            raise SettingError(
                f"start is {start} and end is {end}: none of the {total} steps lies between, so "
                "all pictures would be the same. Make end larger, or take more steps."
            )
        count = batch * len(names)
        if count > MOST_PICTURES:
            raise SettingError(
                f"{len(names)} settings and a latent batch of {batch} make {count} pictures; "
                f"{MOST_PICTURES} is the most. Write fewer {over}, or make the batch smaller."
            )
        shifted = sampling.with_shift(model, shift)
        latents = [
            sampling.sample(each, positive, negative, latent, seed, cfg, sampler, sigmas)
            for each in (shifted, *(with_skip_layers(shifted, skip) for skip in skips))
        ]
        show, decoded = progress(), []
        for done, drawn in enumerate(latents, start=1):
            decoded.append(vae.decode(drawn["samples"]))
            show(done, len(latents))
        pictures = torch.cat(decoded)
        labels = [name for name in names for _ in range(batch)]
        said = (
            f"{count} pictures of seed {seed}: {'; '.join(names)}. The guidance covers {covered} "
            f"of {total} steps."
        )
        drawn = sheet(pictures, labels, columns_of(len(names), batch))
        return io.NodeOutput(drawn, pictures, ui=told(said, cls.hidden.unique_id))


def skips_of(
    over: str, layers: str, scales: str, start: float, end: float, depth: int
) -> dict[SkipLayers, str]:
    """The guidances of a sweep with their labels, in order, each once; none that does nothing.

    Raises SettingError for a text that can't be read, or that leaves nothing to compare.
    """
    texts = [" ".join(text.split()) for text in layers.split(";")]
    sets = {parse_layers(text, depth): text for text in texts if text.lower() != "none"}
    sets.pop(frozenset(), None)
    strengths = numbers(scales)
    if over == LAYERS and len(strengths) != 1:
        raise SettingError(
            f"scales is '{scales}', which is {len(strengths)} scales; a sweep over layers takes "
            "one. Write one, such as 2.5, or set over to scales."
        )
    if over == SCALES and len(sets) != 1:
        raise SettingError(
            f"layers is '{layers}', which is {len(sets)} sets of layers; a sweep over scales "
            "takes one. Write one, such as 7, 8, 9, or set over to layers."
        )
    skips: dict[SkipLayers, str] = {}
    for (chosen, text), scale in product(sets.items(), filter(None, strengths)):
        of_layers = f"layer{'s' if len(chosen) > 1 else ''} {text}"
        label = of_layers if over == LAYERS else f"scale {scale:g}"
        skips[SkipLayers(chosen, scale, start, end)] = label
    if not skips:
        raise SettingError(
            f"layers is '{layers}' and scales is '{scales}': only the picture without guidance "
            "would be drawn. Write at least one set of layers, and a scale above 0."
        )
    return skips


def numbers(scales: str) -> list[float]:
    """ "1; 2.5" or "1, 2.5" -> [1.0, 2.5]. Raises SettingError for anything else."""
    found = []
    for part in filter(None, re.split(r"[;,\s]+", scales)):
        if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", part) or float(part) > LARGEST_SCALE:
            raise SettingError(
                f"scales is '{scales}': '{part}' is not a number from 0 to {LARGEST_SCALE:g}. "
                "Write numbers separated by semicolons, such as 1; 2.5; 4."
            )
        found.append(float(part))
    return found


def columns_of(settings: int, batch: int) -> int:
    """A row for each setting's batch; single pictures side by side up to 3, else in a square."""
    if batch > 1:
        return batch
    return settings if settings <= 3 else math.ceil(math.sqrt(settings))
