"""Fifty prompts with everything on, one after the other in a running host: memory stays flat."""

from __future__ import annotations

import copy
import json
from typing import Any

import psutil
import pytest

from tools import host as hosts

from ..conftest import PACK

PROMPTS, SETTLED = 50, 15
ALLOWED_MB = 60
"""Growth after the first prompts; a leaked copy of the small model would be 39 MB a time."""


@pytest.fixture
def everything() -> dict[str, Any]:
    """Canny ControlNet, Skip Layer Guidance, step cache and modulation cache together."""
    path = PACK / "workflows" / "api" / "controlnet_canny.json"
    prompt = copy.deepcopy(json.loads(path.read_text(encoding="utf-8")))
    prompt["1"]["inputs"]["modulation_cache"] = "on"
    prompt["20"] = {
        "class_type": "SkipLayerGuidance",
        "inputs": {"model": ["1", 0], "layers": "1, 2", "scale": 1.0, "start": 0.01, "end": 0.5},
    }
    prompt["21"] = {
        "class_type": "SD35StepCache",
        "inputs": {"model": ["20", 0], "pace": "fast"},
    }
    prompt["5"]["inputs"]["steps"] = 1
    prompt["12"]["inputs"].update(model=["21", 0], steps=10)
    return prompt


def test_fifty_prompts_leave_memory_flat(server: hosts.Server, everything: dict[str, Any]) -> None:
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    held = []
    for seed in range(PROMPTS):
        everything["12"]["inputs"]["seed"] = seed
        if seed % 5 == 4:
            everything["7"]["inputs"]["text"] = f"{1 + seed // 5} owls on a blue background"
        hosts.run_prompt(server.url, everything)
        held.append(process.memory_info().rss / 1e6)
    settled, last = max(held[:SETTLED]), min(held[-5:])
    assert last - settled < ALLOWED_MB, held
