"""The canvas twins of the API workflows, in the real front end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools import browser, chromium
from tools import host as hosts

from ..conftest import PACK

SHOTS = Path(__file__).parent / "screenshots"
WITHOUT_THEIR_FILES = {"large_canny"}
"""Workflows for models that are too large to test with: they open and export alone."""
WORKFLOWS = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def server(comfyui: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Server]:
    if chromium.find() is None:
        pytest.skip("no Chromium: set SD35_CHROMIUM to one")
    with hosts.Server(comfyui, tmp_path_factory.mktemp("canvas"), ["--cpu"]) as running:
        yield running


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def essence(prompt: dict[str, Any]) -> dict[str, Any]:
    """Class types and inputs, without titles."""
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


def test_every_workflow_has_its_twin_and_thumbnail() -> None:
    assert sorted(p.stem for p in (PACK / "workflows" / "api").glob("*.json")) == WORKFLOWS
    for name in WORKFLOWS:
        assert (PACK / "workflows" / f"{name}.jpg").stat().st_size > 1000


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_exports_to_its_twin_and_runs(
    server: hosts.Server, name: str, nodes_2: bool
) -> None:
    SHOTS.mkdir(exist_ok=True)
    with browser.canvas(server.url, nodes_2) as page:
        browser.load(page, read(PACK / "workflows" / f"{name}.json"))
        page.screenshot(path=str(SHOTS / f"{name}_{'nodes2' if nodes_2 else 'classic'}.png"))
        missing = page.evaluate("() => window.app.graph.nodes.filter(n => n.has_errors).length")
        assert missing == 0 or name in WITHOUT_THEIR_FILES
        seen = browser.exported(page)
        expected = read(PACK / "workflows" / "api" / f"{name}.json")
        assert essence(seen) == essence(expected)
        if name in WITHOUT_THEIR_FILES:
            return
        browser.run(page)
        page.screenshot(path=str(SHOTS / f"{name}_{'nodes2' if nodes_2 else 'classic'}_done.png"))
        ours = [m for m in page.messages if "sd35" in m.lower() and m.startswith(("error", "page"))]  # pyright: ignore
        assert not ours


def test_help_pages_are_served_for_every_node(server: hosts.Server) -> None:
    import urllib.request

    for path in (PACK / "web" / "docs").glob("*.md"):
        url = f"{server.url}/extensions/{hosts.PACK_NAME}/docs/{path.name}"
        with urllib.request.urlopen(url) as answer:
            assert answer.read().decode() == path.read_text(encoding="utf-8")
    assert {p.stem for p in (PACK / "web" / "docs").glob("*.md")} == {
        "SD35Check",
        "SD35ControlHint",
        "SD35ControlNetApply",
        "SD35ControlNetLoader",
        "SD35Loader",
        "SD35StepCache",
        "SD35Quantize",
        "SD35Sampler",
        "SD35Sigmas",
        "SD35SkipLayerSweep",
        "SkipLayerGuidance",
    }
