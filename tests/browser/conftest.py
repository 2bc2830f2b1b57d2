"""A running ComfyUI for the tests of the canvas, which need a Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools import browser, chromium
from tools import host as hosts

SHOTS = Path(__file__).parent / "screenshots"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(comfyui: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Server]:
    if chromium.find_browser() is None:
        pytest.skip("no Chromium: set SD35_CHROMIUM to one")
    with hosts.Server(comfyui, tmp_path_factory.mktemp("canvas"), ["--cpu"]) as running:
        yield running


RENDERERS = {"classic": False, "nodes 2.0": True}


@pytest.fixture(scope="module", params=RENDERERS)
def page(server: hosts.Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    SHOTS.mkdir(exist_ok=True)
    with browser.canvas(server.url, RENDERERS[request.param]) as page:
        page.renderer = request.param.replace(" ", "")
        yield page
        ours = [m for m in page.messages if "sd35" in m.lower() and m.startswith(("error", "page"))]
        assert not ours
