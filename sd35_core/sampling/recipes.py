"""The settings that each model was made for, as its authors use them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .guidance import SkipLayers
from .schedules import DEFAULT_SHIFT


@dataclass(frozen=True)
class Fits:
    """The lowest and the highest with which a model still draws well; the check speaks beyond.

    sides: in pixels; megapixels: of 2**20; cfg_with_skips: the highest beside Skip Layer Guidance;
    cfg_pp: the highest with samplers of CFG++, which count it on another scale; control_strength:
    the highest of a ControlNet.
    """

    steps: tuple[float, float] = (10, math.inf)
    cfg: tuple[float, float] = (1.5, 7)
    cfg_with_skips: float = math.inf
    cfg_pp: float = 3
    shift: tuple[float, float] = (1.5, 8)
    sides: tuple[float, float] = (0, math.inf)
    megapixels: tuple[float, float] = (0, math.inf)
    control_strength: float = 1.5


@dataclass(frozen=True)
class Enlarging:
    """What a recipe for enlarging sets beside the sampler; tile and overlap in pixels.

    strength, end: of a ControlNet, where there is one.
    """

    factor: float
    denoise: float
    tile: int = 1024
    overlap: int = 128
    strength: float = 0.8
    end: float = 0.8


@dataclass(frozen=True)
class Recipe:
    """One model's settings. Source: Stability AI's reference code and model cards; those for
    enlarging are this pack's own."""

    name: str
    steps: int
    cfg: float
    shift: float = DEFAULT_SHIFT
    sampler: str = "dpmpp_2m"
    schedule: str = "normal"
    skip_layers: SkipLayers | None = None
    enlarging: Enlarging | None = None
    fits: Fits = Fits()


_PUBLISHED = Fits(megapixels=(0.25, 2))
_CONTROLNET = {"steps": 60, "cfg": 3.5, "sampler": "euler", "fits": _PUBLISHED}
_OF_MEDIUM = replace(_PUBLISHED, cfg_with_skips=6)
_OF_TURBO = replace(_PUBLISHED, steps=(1, 12), cfg=(0, 1.5))
_OF_NANO = Fits(shift=(0, 2), sides=(128, 192))
_NANO = {"steps": 28, "cfg": 4.0, "shift": 1.0, "schedule": "simple", "fits": _OF_NANO}
_TURBO = {"steps": 4, "cfg": 1.0, "sampler": "euler", "fits": _OF_TURBO}
NANO_LAYERS = SkipLayers(frozenset({1}), 2.5, 0.01, 0.20)
MEDIUM_LAYERS = SkipLayers(frozenset({7, 8, 9}), 2.5, 0.01, 0.20)

RECIPES = {
    "sd35_nano": Recipe("SD3.5 nano (comes with the pack)", **_NANO),
    "sd35_nano_slg": Recipe("SD3.5 nano + Skip Layer Guidance", skip_layers=NANO_LAYERS, **_NANO),
    "sd3.5_medium": Recipe("SD3.5 Medium", steps=50, cfg=5.0, fits=_OF_MEDIUM),
    "sd3.5_medium_slg": Recipe(
        "SD3.5 Medium + Skip Layer Guidance", steps=50, cfg=4.0, skip_layers=MEDIUM_LAYERS,
        fits=_OF_MEDIUM,
    ),
    "sd3.5_large": Recipe("SD3.5 Large", steps=40, cfg=4.5, fits=_PUBLISHED),
    "sd3.5_large_turbo": Recipe("SD3.5 Large Turbo", **_TURBO),
    "sd3.5_large_blur": Recipe("SD3.5 Large + blur ControlNet", **_CONTROLNET),
    "sd3.5_large_canny": Recipe("SD3.5 Large + canny ControlNet", **_CONTROLNET),
    "sd3.5_large_depth": Recipe("SD3.5 Large + depth ControlNet", **_CONTROLNET),
    "sd3_medium": Recipe("SD3 Medium", steps=50, cfg=5.0, shift=1.0),
}  # fmt: skip
"""By key; `sd35_nano` is the model that comes with the pack. With Skip Layer Guidance: `_slg`."""

_FREELY = ((2, 0.35), (4, 0.3))
_FAITHFULLY = ((2, 0.6), (4, 0.6))
"""With the blur ControlNet: (factor, denoise)."""


def _enlarging(key: str, denoise: tuple[tuple[int, float], ...], **other: Any) -> None:
    for factor, share in denoise:
        RECIPES[f"{key}_{factor}x"] = replace(
            RECIPES[key],
            name=f"{factor} times larger: {RECIPES[key].name}",
            enlarging=Enlarging(factor, share, **other),
        )


_enlarging("sd35_nano", ((2, 0.5), (4, 0.5)), tile=128, overlap=32, strength=1.0, end=1.0)
_enlarging("sd3.5_medium", _FREELY)
_enlarging("sd3.5_medium_slg", _FREELY)
_enlarging("sd3.5_large", _FREELY)
_enlarging("sd3.5_large_blur", _FAITHFULLY)

NANO, TURBO = "sd35_nano", "sd3.5_large_turbo"


def layers_text(layers: frozenset[int]) -> str:
    """As the widget has it: "7, 8, 9"."""
    return ", ".join(map(str, sorted(layers)))


LAYER_PRESETS = {
    "sd3.5_medium": [["Stability AI's", layers_text(MEDIUM_LAYERS.layers)], ["none", ""]],
    "sd35_nano": [["layer 1", layers_text(NANO_LAYERS.layers)], ["none", ""]],
}
"""Recipe -> names and layers that are known to do no harm, to choose from."""


def recipe_of(variant: str, file_name: str) -> str | None:
    """The key of the recipe for a model, by its variant and its file's name; None if unknown.

    Only the name tells Large Turbo from Large.
    """
    name = file_name.replace("\\", "/").rpartition("/")[2].lower()
    if name.startswith(NANO):
        return NANO
    if variant == "sd3.5_large" and "turbo" in name:
        return TURBO
    return variant if variant in RECIPES else None
