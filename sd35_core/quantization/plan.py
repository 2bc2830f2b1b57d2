"""What quantizing is to do, and the report of what it did."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SettingError
from ..network.config import Shape
from ..packing.formats import FP8, INT8, RAW_FP8, VQ2

PRECISE = {
    r"x_embedder\.": "the only way in for the picture; 0.1 % of the weights",
    r"pos_embed": "places of patches: a table, not a product, and a ControlNet's way in",
    r"t_embedder\.": "noise level; every block depends on it",
    r"y_embedder\.": "pooled text; every block depends on it",
    r"context_embedder\.": "the only way in for the prompt",
    r"final_layer\.": "the only way out",
}
"""Layers that are never packed, by their names, and why."""
MODULATION = r"adaLN_modulation\."
EIGHT_AT_LEAST = {
    MODULATION: "scales, shifts and gates act on every token",
    r"controlnet_blocks\.": "a ControlNet's last product; at 2 bits a third of it is error",
}
"""Layers that a 2-bit file keeps at 8 bits, and why."""


EIGHT = {INT8: "int8", FP8: "fp8", RAW_FP8: "rawfp8"}
"""The 8-bit formats, and what a file in each is called."""


@dataclass(frozen=True)
class Plan:
    """What the layers of a file become; `eight` is the format of those with 8 bits."""

    bits: int = 8
    eight: str = INT8
    modulation_bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (2, 8) or self.modulation_bits not in (2, 8):
            raise SettingError(
                f"bits is {self.bits} and modulation bits is {self.modulation_bits}; "
                "each can be 8 or 2."
            )
        if self.eight not in EIGHT:
            raise SettingError(f"The 8-bit format is '{self.eight}'; known are {', '.join(EIGHT)}.")

    def format_of(self, name: str, shape: Shape) -> str | None:
        """A format for the tensor `name` (a key of Stability's), or None: it stays as it is."""
        if len(shape) != 2 or not name.endswith(".weight"):
            return None
        if any(re.match(pattern, name) for pattern in PRECISE):
            return None
        careful = [pattern for pattern in EIGHT_AT_LEAST if re.search(pattern, name)]
        if self.modulation_bits == 2 and MODULATION in careful:
            careful.remove(MODULATION)
        return self.eight if self.bits == 8 or careful else VQ2


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

    plan: Plan
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
            f"{self.plan.bits} bits ({how}): {self.before / 1e6:,.1f} MB -> "
            f"{self.after / 1e6:,.1f} MB, {self.after / self.before:.1%}."
        ]
        kinds: dict[tuple[str, str], list[float]] = {}
        for layer in self.layers:
            kind = re.sub(r"^.*?\.\d+\.", "", layer.name).removesuffix(".weight")
            kinds.setdefault((kind, layer.form), []).append(layer.error)
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
