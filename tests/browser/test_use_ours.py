"""Nodes of an open workflow become this pack's, in one step that can be taken back."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import save_file

from sd35_core.workflow.check import files_under
from sd35_core.workflow.migration import migrated
from tools import browser
from tools import host as hosts

from ..host.cases import SMALL
from ..unit.models import random_weights
from ..unit.stock_workflows import MODEL, SKIP, stock
from .board import LONG, shot
from .conftest import SHOTS

COMMAND = "SD3.5: use this pack's nodes"
STATE = "() => JSON.stringify(app.graph.serialize().nodes.map((n) => [n.id, n.type, n.pos]).sort())"
OFFERED = """() => app.canvas.getCanvasMenuOptions().map((item) => item?.content)"""
MODIFIED = "() => app.extensionManager.workflow.activeWorkflow.isModified"


@pytest.fixture(scope="module", autouse=True)
def small_checkpoint(server: hosts.Server) -> None:
    path = server.base / "models" / "checkpoints" / MODEL
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = random_weights(SMALL)
    save_file({f"model.diffusion_model.{k}": t for k, t in weights.items()}, path)


def opened_stock(page: Any, **settings: Any) -> dict[str, Any]:
    workflow = stock(**settings)
    browser.load(page, workflow)
    page.wait_for_timeout(500)
    return workflow


def test_one_step_there_and_one_back(page: Any, server: hosts.Server) -> None:
    SHOTS.mkdir(exist_ok=True)
    opened_stock(page, shift=2.0, skip=SKIP, steps=12, scheduler="normal")
    before, prompt = page.evaluate(STATE), browser.exported(page)
    page.mouse.click(800, 700, button="right")
    page.get_by_text(COMMAND).first.click(timeout=LONG)
    page.wait_for_function("() => app.graph.nodes.some((n) => n.type === 'SD35Sampler')")
    said = page.get_by_text("Ctrl+Z takes it back").last
    said.wait_for(timeout=LONG)
    assert "KSampler (7) is" in said.inner_text()
    shot(page, "use_ours")
    seen, expected = browser.exported(page), migrated(prompt, files_under(server.base / "models"))
    assert {k: (n["class_type"], n["inputs"]) for k, n in seen.items()} == {
        k: (n["class_type"], n["inputs"]) for k, n in expected.workflow.items()
    }
    assert page.evaluate(MODIFIED), "it is asked about when the page is left"
    after = page.evaluate(STATE)
    page.mouse.click(800, 700)
    page.keyboard.press("Control+z")
    page.wait_for_function("() => app.graph.nodes.some((n) => n.type === 'KSampler')")
    page.wait_for_timeout(700)
    assert page.evaluate(STATE) == before and browser.exported(page) == prompt
    page.keyboard.press("Control+y")
    page.wait_for_function("() => app.graph.nodes.some((n) => n.type === 'SD35Sampler')")
    page.wait_for_timeout(700)
    assert page.evaluate(STATE) == after
    assert COMMAND not in page.evaluate(OFFERED), "there is nothing left to replace"


def test_what_stays_is_said_with_the_reason(page: Any) -> None:
    opened_stock(page, sampler="uni_pc")
    page.evaluate("() => app.extensionManager.command.execute('SD35.UseOurs')")
    page.wait_for_function("() => app.graph.nodes.some((n) => n.type === 'SD35Loader')")
    page.get_by_text("its sampler is uni_pc").last.wait_for(timeout=LONG)
    shot(page, "use_ours_left")


def test_it_offers_itself_where_the_workflow_is_one_of_sd3_alone(page: Any) -> None:
    workflow = opened_stock(page)
    assert COMMAND in page.evaluate(OFFERED)
    for node in workflow["nodes"]:
        if node["type"] == "EmptySD3LatentImage":
            node["type"] = "EmptyLatentImage"
        if node["type"] == "CheckpointLoaderSimple":
            node["widgets_values"] = ["flux1-dev.safetensors"]
    browser.load(page, workflow)
    assert COMMAND not in page.evaluate(OFFERED)
    before = page.evaluate(STATE)
    page.evaluate("() => app.extensionManager.command.execute('SD35.UseOurs')")
    page.get_by_text("nothing to replace").last.wait_for(timeout=LONG)
    assert page.evaluate(STATE) == before
