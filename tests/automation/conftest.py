"""A running ComfyUI for the client, and workflows that it draws quickly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from automation import workflow
from automation.workflow import Workflow
from tools import host as hosts

from ..conftest import PACK
from .batches import JOBS


@pytest.fixture(scope="session")
def server(comfyui: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Server]:
    with hosts.Server(comfyui, tmp_path_factory.mktemp("automation"), ["--cpu"]) as running:
        yield running


@pytest.fixture
def quick() -> Workflow:
    """Text to image in four steps."""
    path = PACK / "workflows" / "api" / "text_to_image.json"
    return workflow.overridden(workflow.read(path), {"SD35Sampler.steps": 4})


@pytest.fixture
def table(tmp_path: Path, quick: Workflow) -> Path:
    """A JSONL of jobs and, beside it, the workflow that it names."""
    (tmp_path / "quick.json").write_text(json.dumps(quick), encoding="utf-8")
    rows = [
        {"workflow": "quick.json", "seed": n, "set": {"Prompt.text": f"a big owl {n % 2}"},
         "tags": {"n": n}}
        for n in range(JOBS)
    ]  # fmt: skip
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
