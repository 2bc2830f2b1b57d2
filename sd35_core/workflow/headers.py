"""What a workflow's files are, from their headers alone, as facts for the check."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..checkpoint.layouts import (
    CONTROLNET_MARKS,
    DIFFUSERS_MARK,
    JOINED_IN_BLOCK,
    MARK,
    PREFIXES,
    RENAMED,
    RENAMED_IN_BLOCK,
    from_diffusers_key,
    is_controlnet,
    keys_under,
)
from ..checkpoint.loading import QUANTIZATION_SUFFIXES, open_tensors
from ..checkpoint.tensor_file import TensorFile, Tensors
from ..errors import CheckpointError
from ..limits import DIGITS
from ..network.config import VARIANTS, MMDiTXConfig, Shapes, config_from_shapes
from ..sampling.recipes import recipe_of
from .setup import Control, Model

Facts = TypeVar("Facts")

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


def _kept(read: Callable[..., Facts]) -> Callable[..., Facts]:
    """What `read` says of a file, kept while the file is the same: the canvas asks often."""

    @lru_cache(maxsize=64)
    def of_this_version(path: Path, size: int, time: int, *others: Any) -> Facts:
        return read(path, *others)

    @wraps(read)
    def kept(path: Path, *others: Any) -> Facts:
        try:
            stat = path.stat()
        except OSError:  # gone by now, which `read` knows how to say
            return read(path, *others)
        return of_this_version(path, stat.st_size, stat.st_mtime_ns, *others)

    return kept


@_kept
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
    return model_of(config, path.name, packed)


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


def described_config(file: Tensors) -> MMDiTXConfig | None:
    """The shape of the SD3 model in a file, in Stability's or diffusers' layout."""
    for prefix in PREFIXES:
        shapes = {key: file.shape(prefix + key) for key in keys_under(file, prefix)}
        if MARK in shapes:
            return config_from_shapes(shapes, file.path.name)
        if DIFFUSERS_MARK in shapes and not is_controlnet(file, prefix):
            return config_from_shapes(_stability_shapes(shapes), file.path.name)
    return None


def _stability_shapes(shapes: Shapes) -> Shapes:
    """diffusers' under Stability's keys; those of other keys are left out."""
    placed = ((from_diffusers_key(key), shape) for key, shape in shapes.items())
    return {
        place.key: (place.parts * shape[0], *shape[1:]) if shape else shape
        for place, shape in placed
        if place is not None
    }


@_kept
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
    return Control(hidden=width, control_type=found[0] if found else None)


@_kept
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


class _Names(NamedTuple):
    """What a LoRA's keys begin with, and the modules that may follow, in a block and outside."""

    prefix: re.Pattern[str]
    block: re.Pattern[str]
    outside: frozenset[str]
    inside: frozenset[str]


def _names(prefix: str, blocks: str, outside: Iterable[str], inside: Iterable[str]) -> _Names:
    """Of modules as models call them; the position table is none."""

    def flat(names: Iterable[str]) -> frozenset[str]:
        return frozenset(name.replace(".", "_") for name in names)

    block = re.compile(rf"{blocks}_([0-9]{{1,{DIGITS.most}}})_(.+)")
    table = flat(("pos_embed", "pos_embed.pos_embed"))
    return _Names(re.compile(prefix), block, flat(outside) - table, flat(inside))


_STABILITY = _names(
    r"lora_unet_|diffusion_model\.", "joint_blocks",
    RENAMED.values(), [*RENAMED_IN_BLOCK.values(), *JOINED_IN_BLOCK],
)  # fmt: skip
_DIFFUSERS = _names(
    r"transformer\.|base_model\.model\.|lora_transformer_|lycoris_", "transformer_blocks",
    RENAMED, [*RENAMED_IN_BLOCK, *chain(*JOINED_IN_BLOCK.values())],
)  # fmt: skip
_CHANGE = re.compile(
    r"\.(lora_(up|down|mid|[AB](\.default)?)(\.weight)?|lora(_linear_layer)?\.(up|down)\.weight"
    r"|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|[ab][12]\.weight|oft_blocks"
    r"|diff(_b)?|set_weight|[wb]_norm)$"
)
"""What a LoRA of any kind keeps of a layer, after the layer's name. (GLoRA's are a1 to b2.)"""
_TEXT_MODULE = re.compile(r"^(lora_te\d?_|text_encoder|te\d?_|clip_[lg]|t5xxl)")
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's layers of a diffusion model, and how many of them ComfyUI finds in this one.

    magnitudes: DoRA's vectors under diffusers' names, which ComfyUI does not read; scale: alpha
    over rank where it stands in the metadata alone, which it does not read either.
    """

    layers: int | None = None
    matched: int | None = None
    magnitudes: int = 0
    scale: float = 1.0


@_kept
def lora_in(path: Path, model: Model) -> LoraFile:
    """Facts of a LoRA's file, from its header."""
    try:
        file = TensorFile(path)
    except CheckpointError:
        return LoraFile()
    sides: dict[str, list[tuple[int, ...]]] = {}
    for key in file:
        change = _CHANGE.search(key)
        if change and not _TEXT_MODULE.match(key):
            shapes = sides.setdefault(key[: change.start()], [])
            shapes += [] if "lokr" in change[1] else [file.shape(key)]
    matched = sum(_fits(name, shapes, model) for name, shapes in sides.items())
    magnitudes = sum(_MAGNITUDE in key for key in file)
    has_alpha = any(key.endswith(".alpha") for key in file)
    return LoraFile(len(sides), matched, magnitudes, 1.0 if has_alpha else _scale_in(file.metadata))


def _scale_in(metadata: Mapping[str, str]) -> float:
    """alpha over rank as diffusers notes it; 1 where it says nothing that makes sense."""
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        scale = said["transformer.lora_alpha"] / said["transformer.r"]
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        return 1.0
    return float(scale) if math.isfinite(scale) and scale > 0 else 1.0


def _fits(name: str, shapes: list[tuple[int, ...]], model: Model) -> bool:
    """Whether ComfyUI finds a LoRA's layer in the model, and one of its sides has that width."""
    for known in (_STABILITY, _DIFFUSERS):
        found = known.prefix.match(name)
        module = name[found.end() :].replace(".", "_") if found else ""
        block = known.block.fullmatch(module)
        if (block and block[2] in known.inside) or module in known.outside:
            break
    else:
        return False
    if block is None:
        return True
    if model.depth is not None and int(block[1]) >= model.depth:
        return False
    matrices = [shape for shape in shapes if len(shape) == 2]
    if model.hidden is None or not matrices:  # a LoKr's factors have sides of their own
        return True
    return any(side % model.hidden == 0 for shape in matrices for side in shape)
