"""What quantizing is to do, and the report of what it did."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint.tensor_file import metadata_of
from ..errors import SettingError
from ..network.config import Shape, Shapes
from ..packing.formats import FORMATS, FP8, INT8, RAW_FP8, VQ2, VQ3, VQ4, packed_bytes
from ..packing.kitchen import CONVROT_INT8, CONVROT_W4A4, MXFP8, NVFP4

PRECISE = {
    r"x_embedder\.": "the only way in for the picture; 0.1 % of the weights",
    r"pos_embed": "places of patches: a table, not a product, and a ControlNet's way in",
    r"t_embedder\.": "noise level; every block depends on it",
    r"y_embedder\.": "pooled text; every block depends on it",
    r"context_embedder\.": "the only way in for the prompt",
    r"final_layer\.": "the only way out",
    r"shared\.|encoder\.embed_tokens\.": "T5's words: a table, not a product",
    r".*relative_attention_bias\.": "T5's distances of words: a table, not a product",
    r"text_model\.embeddings\.": "CLIP's words and places: tables, not products",
    r"text_projection\.": "CLIP's only way out",
}
"""Layers that are never packed, by their names, and why."""
MODULATION = r"adaLN_modulation\."
EIGHT_AT_LEAST = {
    MODULATION: "scales, shifts and gates act on every token",
    r"controlnet_blocks\.": "a ControlNet's last product; at 2 bits a third of it is error",
}
"""Layers that a file of fewer bits keeps at 8, and why."""


WRITTEN = "sd35_quantization"
"""The key of the metadata of files that this writes."""
EIGHT = {
    INT8: "int8", FP8: "fp8", RAW_FP8: "rawfp8", CONVROT_INT8: "int8convrot", MXFP8: "mxfp8",
}  # fmt: skip
"""The 8-bit formats, and what a file in each is called."""
FOUR = {VQ4: "4bit", NVFP4: "nvfp4", CONVROT_W4A4: "convrot_w4a4"}
"""The 4-bit formats: this pack's own, and those that ComfyUI reads by itself."""
FEWER = {2: VQ2, 3: VQ3, 4: VQ4}
"""Bits -> this pack's format."""


def may_be_packed(name: str, shape: Shape) -> bool:
    """Whether the tensor `name` (a key of Stability's) is a weight that is not kept as it is."""
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    return not any(re.match(pattern, name) for pattern in PRECISE)


@dataclass(frozen=True)
class Plan:
    """What the layers of a file become; `eight` is the format of those with 8 bits, `four` of
    those with 4."""

    bits: int = 8
    eight: str = INT8
    modulation_bits: int = 8
    four: str = VQ4

    def __post_init__(self) -> None:
        known = (8, *FEWER)
        if self.bits not in known or self.modulation_bits not in known:
            raise SettingError(
                f"bits is {self.bits} and modulation bits is {self.modulation_bits}; "
                "each can be 8, 4, 3 or 2."
            )
        if self.eight not in EIGHT:
            raise SettingError(f"The 8-bit format is '{self.eight}'; known are {', '.join(EIGHT)}.")
        if self.four not in FOUR:
            raise SettingError(f"The 4-bit format is '{self.four}'; known are {', '.join(FOUR)}.")

    def format_of(self, name: str, shape: Shape) -> str | None:
        """A format for the tensor `name` (a key of Stability's), or None: it stays as it is."""
        if not may_be_packed(name, shape):
            return None
        careful = [pattern for pattern in EIGHT_AT_LEAST if re.search(pattern, name)]
        bits = self.bits
        if MODULATION in careful:
            bits = max(bits, self.modulation_bits)
        elif careful:
            bits = 8
        return self.four if bits == 4 else FEWER.get(bits, self.eight)

    @property
    def title(self) -> str:
        return f"{self.bits} bits"

    def words(self, calibrated: bool) -> str:
        """For the file's name."""
        if self.bits == 8:
            return EIGHT[self.eight]
        name = FOUR[self.four] if self.bits == 4 else f"{self.bits}bit"
        free = "" if calibrated or (self.bits == 4 and self.four != VQ4) else "_datafree"
        return f"{name}_adaln{max(self.bits, self.modulation_bits)}{free}"

    def about(self) -> dict[str, Any]:
        """For the file's metadata."""
        return asdict(self)


def planned_bytes(shapes: Shapes, plan: Plan | None) -> int:
    """What tensors of these shapes (Stability's keys) take by a plan, what it leaves and all of
    none in 16 bits."""
    total = 0
    for name, shape in shapes.items():
        form = plan.format_of(name, shape) if plan else None
        total += packed_bytes(form, shape) if form else 2 * prod(shape)
    return total


@dataclass(frozen=True)
class Fitted:
    """A format for each layer, chosen for a size in bytes (see fit.py).

    taken: bytes of the model in it; error: what is expected of the model's output, relative.
    """

    forms: Mapping[str, str]
    size: int
    taken: int
    error: float

    def format_of(self, name: str, shape: Shape) -> str | None:
        """As the Plan's. Raises SettingError for a layer that it was not made for."""
        if not may_be_packed(name, shape):
            return None
        if name not in self.forms:
            raise SettingError(
                f"The plan has no format for the layer '{name}': it was made for a model of "
                "another size. Make one for this model."
            )
        return self.forms[name]

    @property
    def title(self) -> str:
        return f"fitted to {self.size / 1e9:.3g} GB"

    def words(self, calibrated: bool) -> str:
        return f"{self.size / 1e9:.3g}gb" + ("" if calibrated else "_datafree")

    def about(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people: which layers have which bits."""
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        for name, form in self.forms.items():
            kinds[kind_of(name)][form] += 1
        lines = [
            f"{kind}: " + ", ".join(f"{count} {form}" for form, count in sorted(found.items()))
            for kind, found in kinds.items()
        ]
        head = (
            f"Plan for {self.size / 1e9:.3g} GB: {self.taken / 1e9:.3g} GB, expected error of the "
            f"model's output {self.error:.3f}."
        )
        return "\n".join([head, *lines])


def fitted_in(path: Path) -> Fitted:
    """The plan that a file which was written to fit a size keeps. Raises SettingError."""
    try:
        told = json.loads(metadata_of(path).get(WRITTEN, "{}"))
        forms = {str(name): FORMATS[FORMATS.index(form)] for name, form in told["forms"].items()}
        return Fitted(forms, int(told["size"]), int(told["taken"]), float(told["error"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SettingError(
            f"'{path.name}' keeps no plan of a format for each layer. Take a file that SD3.5 "
            "Quantize wrote to fit a size."
        ) from error


def kind_of(name: str) -> str:
    """What layers of all blocks have in common in their names."""
    return re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")


@dataclass(frozen=True)
class Layer:
    """What became of a layer. error: relative root mean square of its output on the calibration's
    inputs; without calibration of its weight."""

    name: str
    form: str
    error: float
    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """What became of a file, in bytes."""

    plan: Plan | Fitted
    calibrated: bool
    layers: list[Layer]
    before: int
    after: int
    note: str = ""
    """Why the file has another name than it would have."""

    def text(self, most: int = 5) -> str:
        """For people: the whole, each kind of layer, and the layers with the largest errors."""
        how = "calibrated" if self.calibrated else "without calibration"
        lines = [
            f"{self.plan.title} ({how}): {self.before / 1e6:,.1f} MB -> "
            f"{self.after / 1e6:,.1f} MB, {self.after / self.before:.1%}."
        ]
        kinds: dict[tuple[str, str], list[float]] = {}
        for layer in self.layers:
            kinds.setdefault((kind_of(layer.name), layer.form), []).append(layer.error)
        what = "output" if self.calibrated else "weights"
        lines += [
            f"{kind} ({form}): error of the {what} {sum(e) / len(e):.4f}, largest {max(e):.4f}"
            for (kind, form), e in kinds.items()
        ]
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:most]
        lines.append(
            "Largest: " + ", ".join(f"{layer.name} {layer.error:.4f}" for layer in worst) + "."
        )
        lines += [self.note] if self.note else []
        return "\n".join(lines)
