"""The settings that each published model was made for, as its authors use them."""

from __future__ import annotations

from dataclasses import dataclass

from .guidance import SkipLayers


@dataclass(frozen=True)
class Recipe:
    """One model's settings. Source: Stability AI's reference code and model cards."""

    steps: int
    cfg: float
    shift: float = 3.0
    sampler: str = "dpmpp_2m"
    schedule: str = "normal"
    skip_layers: SkipLayers | None = None


RECIPES = {
    "sd3_medium": Recipe(steps=50, cfg=5.0, shift=1.0),
    "sd3.5_medium": Recipe(steps=50, cfg=5.0),
    "sd3.5_medium_slg": Recipe(
        steps=50, cfg=4.0, skip_layers=SkipLayers(frozenset({7, 8, 9}), 2.5, 0.01, 0.20)
    ),
    "sd3.5_large": Recipe(steps=40, cfg=4.5),
    "sd3.5_large_turbo": Recipe(steps=4, cfg=1.0, sampler="euler"),
    "sd3.5_large_controlnet": Recipe(steps=60, cfg=3.5, sampler="euler"),
}
