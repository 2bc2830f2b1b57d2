"""What a workflow's files are, from their headers alone, as facts for the check."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.layouts import (
    CONTROLNET_MARKS,
    is_controlnet,
    model_prefix,
)
from ..checkpoint.loading import QUANTIZATION_SUFFIXES, described_config, open_tensors
from ..checkpoint.sizes import Weights, weights_in
from ..checkpoint.tensor_file import TensorFile
from ..errors import CheckpointError
from ..limits import CONTROLNET_LAYERS, counted
from ..network.config import CONTEXT_WIDTH, VARIANTS, MMDiTXConfig
from ..sampling.recipes import recipe_of
from .setup import Control, Model, Vae

Facts = TypeVar("Facts")
ENCODER_MARKS = {
    "clip_l": ("text_model.final_layer_norm.weight", 768),
    "clip_g": ("text_model.final_layer_norm.weight", 1280),
    "t5xxl": ("encoder.final_layer_norm.weight", CONTEXT_WIDTH),
}
"""Encoder -> a tensor that it has, and the width of the published one."""

OTHER_FAMILIES = {
    "FLUX": r"flux|kontext",
    "SDXL": r"sd_?xl|pony|illustrious|noobai",
    "Stable Diffusion 1.5": r"v1_?5|sd_?1_?5|sd15",
    "Wan": r"wan_?2",
    "Qwen-Image": r"qwen",
    "HiDream": r"hidream",
    "Hunyuan": r"hunyuan",
    "LTX": r"ltx",
    "Chroma": r"chroma",
    "Cosmos": r"cosmos",
    "Lumina": r"lumina|z_image",
    "AuraFlow": r"aura_?flow",
    "Stable Cascade": r"stable_?cascade",
    "PixArt": r"pixart",
    "Lotus": r"lotus",
}
"""Other models, by what their files are called."""


def kept(read: Callable[..., Facts]) -> Callable[..., Facts]:
    """What `read` says of a file, kept while the file is the same: the canvas asks often."""

    @lru_cache(maxsize=64)
    def of_this_version(path: Path, size: int, time: int, *others: Any) -> Facts:
        return read(path, *others)

    @wraps(read)
    def looked_up(path: Path, *others: Any) -> Facts:
        try:
            stat = path.stat()
        except OSError:  # gone by now, which `read` knows how to say
            return read(path, *others)
        return of_this_version(path, stat.st_size, stat.st_mtime_ns, *others)

    return looked_up


@kept
def model_in(path: Path) -> Model | None:
    """Facts of a diffusion model's file, from its header; None for a damaged one."""
    try:
        file = open_tensors(path)
        config = described_config(file)
    except CheckpointError:
        return None
    if config is None:
        kind = "ControlNet" if is_controlnet(file) else "file of another model"
        return Model(kind=f"{kind} ('{path.name}')")
    packed = any(key.endswith(QUANTIZATION_SUFFIXES) for key in file)
    try:
        weights = weights_in(file, model_prefix(file) or "")
    except CheckpointError:  # a type of numbers that is not known
        weights = None
    return replace(model_of(config, path.name, packed), weights=weights)


def model_of(config: MMDiTXConfig, name: str, packed: bool) -> Model:
    """Facts of a known shape; `name` is the file's."""
    variant = config.variant if config.variant in VARIANTS else None
    return Model(
        recipe=recipe_of(config.variant, name),
        variant=variant,
        depth=config.depth,
        hidden=config.hidden,
        context_dim=config.context_dim,
        pooled_dim=config.pooled_dim,
        positions=config.pos_embed_max_size,
        packed=packed,
        dual=bool(config.dual_blocks),
    )


def model_named(name: str) -> Model | None:
    """Facts of a published model, or of one of another family, by its file's name, where the file
    is not at hand."""
    plain = name.lower().replace("-", "_").replace("sd35", "sd3.5")
    for variant, config in VARIANTS.items():
        if variant in plain.replace("stable_diffusion_3.5", "sd3.5"):
            return model_of(config, name, packed=False)
    families = (f for f, pattern in OTHER_FAMILIES.items() if re.search(pattern, plain))
    family = None if "sd3" in plain else next(families, None)
    return None if family is None else Model(kind=f"{family} model, by its name ('{name}')")


@kept
def control_in(path: Path) -> Control:
    """Facts of a ControlNet's file, from its header."""
    try:
        file = TensorFile(path)
    except CheckpointError:
        return Control()
    if (
        not all(mark in file for mark in CONTROLNET_MARKS)
        or "pos_embed_input.proj.bias" not in file
    ):
        return Control(foreign="of another model")
    width = next(iter(file.shape("pos_embed_input.proj.weight")), None)
    found = re.search(r"blur|canny|depth", path.name.lower())
    known = Control(hidden=width, control_type=found[0] if found else None)
    try:
        layers = counted(file, "controlnet_blocks", CONTROLNET_LAYERS, "")
        return replace(known, weights=weights_in(file).whole, layers=layers)
    except CheckpointError:
        return known


@kept
def weights_under(path: Path, prefix: str = "") -> Weights | None:
    """Of a file's tensors under a prefix; None for a damaged file, and where there are none."""
    try:
        found = weights_in(open_tensors(path), prefix)
    except CheckpointError:
        return None
    return found if found.whole else None


@kept
def vae_in(path: Path, prefix: str = "") -> Vae | None:
    """Facts of a VAE's file, or of a checkpoint's part, in any of the three layouts."""
    try:
        file = open_tensors(path)
        found = weights_in(file, prefix)
    except CheckpointError:
        return None
    marks = ("decoder.up.0.block.0.conv1.weight", "decoder.up_blocks.3.resnets.0.conv1.weight",
             "taesd_decoder.1.weight")  # fmt: skip
    shapes = {mark: file.shape(prefix + mark) for mark in marks if prefix + mark in file}
    wide = next((s[0 if "taesd" in m else 1] for m, s in shapes.items() if len(s) == 4), None)
    return Vae(found.whole, wide) if found.whole else None


def control_named(name: str) -> Control:
    """Facts of a published ControlNet, by its file's name, where the file is not at hand."""
    plain = name.lower().replace("-", "_").replace("sd35", "sd3.5")
    found = re.search(r"sd3\.5_(large|medium)\w*_(blur|canny|depth)", plain)
    if found is None:
        return Control()
    return Control(hidden=VARIANTS[f"sd3.5_{found[1]}"].hidden, control_type=found[2])


@kept
def encoder_in(path: Path) -> str | None:
    """Which of SD3's text encoders a file is, as SD3.5 Loader calls it; None for another."""
    try:
        file = TensorFile(path)
    except CheckpointError:
        return None
    marks = ENCODER_MARKS.items()
    fitting = (
        name for name, (mark, width) in marks if mark in file and file.shape(mark) == (width,)
    )
    return next(fitting, None)


@kept
def vae_channels(path: Path) -> int | None:
    """Of a VAE's file, from the first layer of its decoder."""
    try:
        file = TensorFile(path)
    except CheckpointError:
        return None
    marks = ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight",
             "taesd_decoder.1.weight", "decoder.layers.0.weight")  # fmt: skip
    shapes = (file.shape(mark) for mark in marks if mark in file)
    return next((shape[1] for shape in shapes if len(shape) == 4), None)
