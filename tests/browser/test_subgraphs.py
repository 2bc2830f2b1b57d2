"""Panels, recipes and reports with loader, sampler and guidance on different sides of subgraphs."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tools import browser
from tools import host as hosts

from ..conftest import NANO, PACK
from .board import (
    LOADER,
    SAMPLER,
    SKIP,
    answered,
    choose,
    finish,
    fixed_seed,
    of,
    opened,
    panel,
    shot,
    widgets,
    with_skip_layers,
)
from .conftest import read

WRAP = """(kinds) => {
    const graph = app.canvas.graph;
    const items = graph.nodes.filter((n) => kinds.includes(n.type) || kinds.includes(n.title));
    const { subgraph, node } = graph.convertToSubgraph(new Set(items));
    node.title = kinds.join(" + ");
}"""
ENTER = """(title) => {
    app.canvas.setGraph(app.canvas.graph.nodes.find((n) => n.title === title).subgraph);
}"""
PROMOTE = """([kind, name]) => {
    const { graph } = app.canvas;
    const node = graph.nodes.find((n) => n.type === kind || n.title === kind);
    const slot = node.inputs.find((input) => input.name === name);
    graph.addInput(name, slot.type).connect(slot, node);
}"""
EDIT = """([title, name, value]) => {
    const node = app.canvas.graph.nodes.find((n) => n.title === title);
    const widget = node.widgets.find((w) => w.name === name);
    widget.value = value;
    widget.callback?.(value);
}"""
SHOWN = """(title) => {
    const node = app.canvas.graph.nodes.find((n) => n.title === title);
    return Object.fromEntries(node.widgets.map((w) => [w.name, w.value]));
}"""
OUTSIDE = "() => app.canvas.setGraph(app.rootGraph ?? app.graph)"


def wrap(page: Any, *kinds: str) -> str:
    """Put nodes into a subgraph, as the canvas does; gives its node's title."""
    with answered(page):
        page.evaluate(WRAP, list(kinds))
    return " + ".join(kinds)


def enter(page: Any, title: str) -> None:
    page.evaluate(ENTER, title)
    page.wait_for_timeout(1000)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(700)


def outside(page: Any) -> None:
    page.evaluate(OUTSIDE)
    page.wait_for_timeout(700)


def edit(page: Any, title: str, name: str, value: Any) -> None:
    """A widget that a subgraph shows on its node, then a click, as after typing."""
    with answered(page):
        page.evaluate(EDIT, [title, name, value])
        page.mouse.click(900, 840)


def said(page: Any) -> str:
    return panel(page, SAMPLER).locator(".sd35-changed").inner_text()


@pytest.fixture(scope="module")
def another_model(server: hosts.Server) -> str:
    path = server.base / "models" / "checkpoints" / "sd35_nano_copy.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(NANO, path)
    return path.name


def test_guidance_and_loader_inside_are_read_and_written_from_a_sampler_outside(page: Any) -> None:
    with_skip_layers(page)
    before = said(page)
    inner = wrap(page, LOADER, SKIP)
    assert said(page) == before
    choose(page, "SD3.5 Medium + Skip Layer Guidance")
    enter(page, inner)
    assert widgets(page, SKIP)["layers"] == "7, 8, 9" and widgets(page, SKIP)["start"] == 0.01
    assert panel(page, SKIP).locator(".sd35-layer").count() == 4
    shot(page, "guidance_inside")
    outside(page)


def test_what_is_set_two_subgraphs_further_out_reaches_the_sampler(page: Any) -> None:
    with_skip_layers(page)
    inner = wrap(page, SAMPLER)
    page.evaluate(ENTER, inner)
    with answered(page):
        page.evaluate(PROMOTE, [SAMPLER, "steps"])
    outside(page)
    outer = wrap(page, inner, SKIP)
    page.evaluate(ENTER, outer)
    page.evaluate(PROMOTE, [inner, "steps"])
    outside(page)
    edit(page, outer, "steps", 19)
    shot(page, "promoted")
    enter(page, outer)
    enter(page, inner)
    assert said(page) == "changed: steps 19 (28), layers 7, 8, 9 (1)"
    assert "19 steps" in panel(page, SAMPLER).locator(".sd35-legend").inner_text()
    choose(page, "SD3.5 Medium + Skip Layer Guidance")
    assert said(page) == "as the recipe"
    shot(page, "two_deep")
    outside(page)
    shown = page.evaluate(SHOWN, outer)
    assert shown["steps"] == 50, "the recipe is written where it is decided"
    exported = browser.exported(page)
    (sampler,) = (n["inputs"] for n in exported.values() if n["class_type"] == SAMPLER)
    (skip,) = (n["inputs"] for n in exported.values() if n["class_type"] == SKIP)
    assert sampler["steps"] == 50 and sampler["cfg"] == 4 and skip["layers"] == "7, 8, 9"


def test_a_model_chosen_on_the_outside_fills_the_sampler(page: Any, another_model: str) -> None:
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    page.evaluate("() => app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    page.wait_for_timeout(1500)
    inner = wrap(page, LOADER)
    page.evaluate(ENTER, inner)
    with answered(page):
        page.evaluate(PROMOTE, [LOADER, "model"])
    outside(page)
    code = "node.widgets.find((w) => w.name === 'steps').value = 7;"
    of(page, SAMPLER, code)
    edit(page, inner, "model", another_model)
    page.wait_for_timeout(500)
    assert widgets(page, SAMPLER)["steps"] == 28


def test_loader_and_check_tell_what_they_found_inside(page: Any) -> None:
    workflow = read(PACK / "workflows" / "check.json")
    opened(page, workflow)
    fixed_seed(page)
    of(page, SAMPLER, "node.widgets.find((w) => w.name === 'cfg').value = 15;")
    of(page, "SD35Check", "node.widgets.find((w) => w.name === 'strict').value = 'report';")
    inner = wrap(page, LOADER, "SD35Check", "Prompt", "Negative prompt")
    finish(page)
    enter(page, inner)
    assert page.locator(".sd35-report", has_text="parameters").count() == 1
    assert page.locator(".sd35-report", has_text="cfg is 15").count() == 1
    shot(page, "reports_inside")
    outside(page)
