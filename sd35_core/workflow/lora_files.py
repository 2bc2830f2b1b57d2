"""What a LoRA's file is, from its header alone: whose names it has, and for which model it is.

The names are those that ComfyUI's `model_lora_keys_unet` looks for in an SD3 model, and those that
kohya's, diffusers', OneTrainer's, LyCORIS' and SimpleTuner's files have.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.layouts import JOINED_IN_BLOCK, RENAMED, RENAMED_IN_BLOCK
from ..checkpoint.sizes import Weights
from ..checkpoint.tensor_file import TensorFile
from ..errors import CheckpointError
from ..limits import DIGITS
from ..network.config import VARIANTS, Shape
from ..words import printable
from .headers import kept, weights_under
from .setup import Lora, LoraFile, Model

MOST_MISFITS = 3
"""Reasons of which a report tells."""
LONGEST_NAME = 90
"""Letters of a file's own names in a sentence."""
NAMED = {"sd3_medium": "SD3 Medium", "sd3.5_medium": "SD3.5 Medium", "sd3.5_large": "SD3.5 Large"}


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
_INWARD = re.compile(r"lora_down|lora_A|down\.weight|hada_w1_b|lokr_w[12]_b")
"""The factor of rank x inputs."""
_KINDS = {"hada": "LoHa", "lokr": "LoKr", "oft": "OFT", "a1": "GLoRA", "diff": "full difference"}
"""How a change begins -> what it is called; the others are LoRA."""
_TEXT_MODULE = re.compile(r"^(lora_te\d?_|text_encoder|te\d?_|clip_[lg]|t5xxl)")
_MAGNITUDE = ".lora_magnitude_vector"
_SPELLINGS = {
    r"lora_unet_": "kohya",
    r"lora_transformer_": "OneTrainer",
    r"lycoris_": "SimpleTuner (LyCORIS)",
    r"diffusion_model\.": "ComfyUI",
    r"transformer\.": "diffusers",
    r"base_model\.model\.": "peft",
}
"""What names begin with -> whose they are, of those that ComfyUI reads."""
_UNREAD = {
    r"model\.diffusion_model\.": "begin with 'model.' before 'diffusion_model.'",
    r"unet\.": "begin with 'unet.', as those of diffusers' U-Nets",
    r"lora_unet_transformer_blocks": "are diffusers' after kohya's 'lora_unet_'",
    r"transformer_blocks": "lack the 'transformer.' of diffusers' files",
    r"joint_blocks": "lack the 'diffusion_model.' of ComfyUI's files",
}
"""What names of SD3's layers begin with where ComfyUI does not read them -> why."""
_FAMILIES = {
    "Chroma": r"distilled_guidance_layer",
    "HiDream": r"(double|single)_stream_blocks",
    "FLUX or Hunyuan Video": r"(double|single)_blocks|single_transformer_blocks",
    "AuraFlow": r"joint_transformer_blocks|(double|single)_layers",
    "Qwen-Image": r"transformer_blocks[._][0-9]+[._](img|txt)_m(od|lp)",
    "a U-Net (SDXL or Stable Diffusion 1.5)": r"(down|up|input|output|mid|middle)_blocks?[._]",
    "Stable Cascade": r"lora_prior_unet_",
    "Wan or Cosmos": r"blocks[._][0-9]+[._](cross_attn|self_attn|ffn)",
    "Lumina or Z-Image": r"layers[._][0-9]+[._](attention|feed_forward|adaLN)",
    "PixArt or LTX": r"transformer_blocks[._][0-9]+[._]attn1",
}
"""Models of other families -> what stands in their layers' names."""
_UNETS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Width of a U-Net's prompt -> which it is."""


@kept
def lora_in(path: Path, model: Model | None = None) -> LoraFile:
    """Facts of a LoRA's file, from its header; without a model, as for the one it was made for.

    A file that can't be read has none.
    """
    try:
        file = TensorFile(path)
    except CheckpointError:
        return LoraFile()
    sides: dict[str, dict[str, Shape]] = {}
    text: set[str] = set()
    for key in file:
        change = _CHANGE.search(key)
        if change and _TEXT_MODULE.match(key):
            text.add(key[: change.start()])
        elif change:
            sides.setdefault(key[: change.start()], {})[change[1]] = file.shape(key)
    ranks = [shape[0] for layer in sides.values() for shape in _inward(layer)]
    hidden = _width(sides)
    said = _said_in(file.metadata)
    alphas = any(key.endswith(".alpha") for key in file)
    made_for, variant = _made_for(sides, hidden)
    if model is None:
        shape = VARIANTS.get(variant)
        model = Model(depth=shape and shape.depth, hidden=hidden, variant=variant or None)
    reasons = {name: _misfit(name, shapes, model) for name, shapes in sides.items()}
    counts = Counter(reason for reason in reasons.values() if reason)
    first = {reason: name for name, reason in reversed(list(reasons.items()))}
    return LoraFile(
        layers=len(sides),
        matched=sum(not reason for reason in reasons.values()),
        magnitudes=sum(_MAGNITUDE in key for key in file),
        scale=1.0 if alphas or not said else said[0] / said[1],
        alpha=said[0] if said else None,
        alphas=alphas,
        ranks=(min(ranks), max(ranks)) if ranks else None,
        hidden=hidden,
        made_for=made_for,
        spelling=_spelling(sides, file),
        text=len(text),
        misfits=tuple(
            (reason, count, printable(first[reason], LONGEST_NAME))
            for reason, count in counts.most_common(MOST_MISFITS)
        ),
        weights=(weights_under(path) or Weights()).whole,
    )


def _inward(layer: Mapping[str, Shape]) -> list[Shape]:
    return [shape for part, shape in layer.items() if len(shape) == 2 and _INWARD.match(part)]


def _width(sides: Mapping[str, Mapping[str, Shape]]) -> int | None:
    """What most layers of SD3's names take in: the width of its blocks, but for an MLP's second
    layer."""
    widths = Counter(
        shape[1]
        for name, layer in sides.items()
        if re.search(r"(joint|transformer)_blocks", name)
        and not re.search(r"fc2$|net[._]2$", name)
        and not _family(name)
        for shape in _inward(layer)
        if "lokr" not in next(iter(layer))
    )
    return widths.most_common(1)[0][0] if widths else None


def _family(name: str) -> str:
    """Another family of models, by a layer's name; empty for SD3's and unknown ones."""
    return next((f for f, pattern in _FAMILIES.items() if re.search(pattern, name)), "")


def _made_for(sides: Mapping[str, Mapping[str, Shape]], hidden: int | None) -> tuple[str, str]:
    """The model that a LoRA was made for, in words and as VARIANTS has it; empty where unknown."""
    families = Counter(family for name in sides if (family := _family(name)))
    if families and 2 * families.total() >= len(sides):
        family = families.most_common(1)[0][0]
        prompts = (
            shape[1]
            for name, layer in sides.items()
            if re.search(r"attn2[._]to_[kv]$", name)
            for shape in _inward(layer)
        )
        return _UNETS.get(next(prompts, 0), family) if "U-Net" in family else family, ""
    large, medium = VARIANTS["sd3.5_large"], VARIANTS["sd3.5_medium"]
    if hidden is None:
        beyond = [n for name in sides if (n := _number(name)) is not None and n >= medium.depth]
        return (NAMED["sd3.5_large"], "sd3.5_large") if beyond else ("", "")
    if hidden == large.hidden:
        return NAMED["sd3.5_large"], "sd3.5_large"
    if hidden == medium.hidden:
        dual = any("attn2" in name for name in sides)
        both = f"{NAMED['sd3.5_medium']} or {NAMED['sd3_medium']}"
        return NAMED["sd3.5_medium"] if dual else both, "sd3.5_medium"
    return f"an SD3 model of width {hidden}", ""


def _number(name: str) -> int | None:
    """The block of a layer of SD3's."""
    found = re.search(rf"(?:joint|transformer)_blocks[._]([0-9]{{1,{DIGITS.most}}})[._]", name)
    return int(found[1]) if found else None


def _spelling(sides: Mapping[str, Mapping[str, Shape]], keys: Iterable[str]) -> str:
    """Whose names, and what kind of change."""
    whose = Counter(
        next((who for start, who in _SPELLINGS.items() if re.match(start, name)), "unknown")
        for name in sides
    )
    kinds = Counter(
        next((kind for start, kind in _KINDS.items() if part.startswith(start)), "LoRA")
        for layer in sides.values()
        for part in list(layer)[:1]
    )
    if not kinds:
        return ""
    kind = kinds.most_common(1)[0][0]
    if any(key.endswith(".dora_scale") or _MAGNITUDE in key for key in keys):
        kind = f"DoRA ({kind})" if kind != "LoRA" else "DoRA"
    return f"{kind} in names of {whose.most_common(1)[0][0]}"


def _said_in(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    """alpha and rank as diffusers notes them, or as kohya does; None where that makes no sense."""
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        alpha, rank = said["transformer.lora_alpha"], said["transformer.r"]
    except (LookupError, RecursionError, TypeError, ValueError):
        alpha, rank = metadata.get("ss_network_alpha"), metadata.get("ss_network_dim")
    try:
        alpha, rank = float(alpha), float(rank)  # pyright: ignore[reportArgumentType]
        scale = alpha / rank
    except (ArithmeticError, TypeError, ValueError):
        return None
    return (alpha, rank) if math.isfinite(scale) and scale > 0 else None


def _misfit(name: str, shapes: Mapping[str, Shape], model: Model) -> str:
    """Why ComfyUI finds a LoRA's layer not in the model; empty where it does, and one of its sides
    has the model's width."""
    family = _family(name)
    if family:
        return f"a layer of {family}"
    block = None
    for known in (_STABILITY, _DIFFUSERS):
        found = known.prefix.match(name)
        module = name[found.end() :].replace(".", "_") if found else ""
        block = known.block.fullmatch(module)
        if (block and block[2] in known.inside) or module in known.outside:
            break
    else:
        unread = (why for start, why in _UNREAD.items() if re.match(start, name))
        return next((f"names that {why}" for why in unread), "no layer of SD3's")
    if block is None:
        return ""
    number = int(block[1])
    if model.depth is not None and number >= model.depth:
        return f"a block beyond {model.depth - 1}, this model's last"
    shape = VARIANTS.get(model.variant or "")
    if shape is not None and "attn2" in block[2] and number not in shape.dual_blocks:
        return "a second attention (attn2), which that block of this model does not have"
    matrices = [s for part, s in shapes.items() if len(s) == 2 and "lokr" not in part]
    if not model.hidden or not matrices:  # a LoKr's factors have sides of their own
        return ""
    if any(side % model.hidden == 0 for sides in matrices for side in sides):
        return ""
    return f"of another width than this model's {model.hidden}"


def lora_words(lora: Lora) -> str:
    """One line for the person: what the file is, how much of it acts, and its strengths."""
    name, file = printable(lora.name, LONGEST_NAME), lora.file
    if file.layers is None:
        return f"LoRA '{name}': its file is not at hand or can't be read."
    if not file.layers:
        only = f": it changes {file.text} layers of text encoders alone" if file.text else ""
        return f"LoRA '{name}' has no layer of a diffusion model{only}."
    facts = [file.spelling]
    if file.ranks:
        low, high = file.ranks
        facts.append(f"rank {low}" if low == high else f"rank {low} to {high}")
    if file.alpha is not None:
        facts.append(f"alpha {file.alpha:g}")
    elif file.alphas:
        facts.append("alpha among its values")
    facts.append(f"made for {file.made_for or 'a model that is not known here'}")
    facts.append(f"{file.matched} of {file.layers} layers match")
    if file.text:
        facts.append(f"{file.text} layers of text encoders")
    misfits = "".join(
        f" Not: {count} ({why}), such as '{key}'." for why, count, key in file.misfits
    )
    yours = f", here {lora.strength:g}" if lora.strength is not None else ""
    return (
        f"LoRA '{name}': {', '.join(facts)}.{misfits} Strengths go from 0, the model alone, to "
        f"{file.scale:g}, as it was trained{yours}."
    )
