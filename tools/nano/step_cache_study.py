"""What the step cache costs and saves: python -m tools.nano.step_cache_study

The picture score on the same unseen scenes, model calls and time with each pace and with as many
plain steps, for two samplers; the canny ControlNet's edge F1; and how far apart pictures with and
without skipped layers stay. Writes models/nano/step_cache.json. About ten minutes on two cores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from sd35_core.pipeline import BATCH, Pipeline, Settings
from sd35_core.sampling.guidance import SkipLayers
from sd35_core.sampling.step_cache import PACES
from sd35_core.whole_file import write_text

from .control_study import FOLDER, Scenes, figures
from .prepare import clip_tokenizer
from .scoring import MODEL, MODEL_FILE, draw, figures_of, judge_all, unseen

FILE = MODEL / "step_cache.json"
COUNT = 200
PLAIN = (15, 12)
"""Numbers of plain steps beside which the paces are put."""


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """One entry for each call of a network."""
    calls: list[int] = []
    handle = network.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def scored(pipeline: Pipeline, settings: Settings) -> dict[str, Any]:
    scenes = unseen(COUNT)
    started = time.perf_counter()
    with counted(pipeline.network) as calls:
        pictures = draw(pipeline, scenes, settings)
    seconds = time.perf_counter() - started
    right = figures_of(scenes, judge_all(pictures, scenes))["all"]
    return {"calls": len(calls) / -(-COUNT // BATCH), "seconds": seconds, **right}


def apart(pipeline: Pipeline, settings: Settings, slg: SkipLayers) -> float:
    """Mean difference of the pictures with and without skipped layers, 0..255."""
    scenes = unseen(32)

    def pixels(settings: Settings) -> Any:
        pictures: list[Image.Image] = draw(pipeline, scenes, settings)
        return np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])

    return float(np.abs(pixels(replace(settings, slg=slg)) - pixels(settings)).mean())


def main() -> None:
    pipeline = Pipeline.load(MODEL_FILE, clip_tokenizer())
    found: dict[str, Any] = {"score": {}, "edge F1": {}, "skipped layers": {}}
    for sampler in ("dpmpp_2m", "euler"):
        plain = Settings(sampler=sampler)
        rows = {"28 steps": plain}
        rows |= {pace: replace(plain, pace=pace) for pace in PACES}
        rows |= {f"{steps} steps": replace(plain, steps=steps) for steps in PLAIN}
        for name, settings in rows.items():
            row = found["score"][f"{sampler}, {name}"] = scored(pipeline, settings)
            print(sampler, name, row, flush=True)
    scenes = Scenes(100)
    slg = SkipLayers(frozenset({1, 2}), 2.5, 0.01, 0.5)
    for pace in ("", "safe"):
        settings = Settings(sampler="euler", pace=pace)
        drawn = scenes.draw(pipeline, "canny", FOLDER / "sd35_nano_canny.safetensors", settings)
        name = pace or "28 steps"
        found["edge F1"][name] = figures(drawn, scenes.shown)["edge F1"]
        found["skipped layers"][name] = apart(pipeline, settings, slg)
    write_text(FILE, json.dumps(found, indent=1) + "\n", replace=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
