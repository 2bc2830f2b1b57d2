"""A running ComfyUI for the tests of the canvas, which need a Chromium."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools import chromium
from tools import host as hosts


@pytest.fixture(scope="module")
def server(comfyui: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Server]:
    if chromium.find() is None:
        pytest.skip("no Chromium: set SD35_CHROMIUM to one")
    with hosts.Server(comfyui, tmp_path_factory.mktemp("canvas"), ["--cpu"]) as running:
        yield running
