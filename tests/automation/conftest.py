"""A running ComfyUI for the client, and workflows that it draws quickly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from automation import workflow
from automation.workflow import Workflow
from tools import host as hosts

from ..conftest import PACK


@pytest.fixture(scope="session")
def server(comfyui: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Server]:
    with hosts.Server(comfyui, tmp_path_factory.mktemp("automation"), ["--cpu"]) as running:
        yield running


@pytest.fixture
def quick() -> Workflow:
    """Text to image in four steps."""
    path = PACK / "workflows" / "api" / "text_to_image.json"
    return workflow.overridden(workflow.read(path), {"SD35Sampler.steps": 4})
