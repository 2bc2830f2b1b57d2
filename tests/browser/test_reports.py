"""What nodes tell stands below them, whole and for good, in both renderers of a real canvas."""

from __future__ import annotations

from typing import Any

import pytest

from tools import browser
from tools import host as hosts

from ..conftest import PACK
from .board import (
    PANEL,
    add_mediums_layers,
    finish,
    fixed_seed,
    of,
    opened,
    panel,
    set_widget,
    shot,
    with_skip_layers,
)
from .conftest import read

REPORT = ".sd35-report"
SEEN = """(piece) => {
    const broken = [];
    const walker = document.createTreeWalker(piece, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        for (const { 0: word, index } of walker.currentNode.data.matchAll(/\\S+/g)) {
            const range = document.createRange();
            range.setStart(walker.currentNode, index);
            range.setEnd(walker.currentNode, index + word.length);
            if (range.getClientRects().length > 1) broken.push(word);
        }
    }
    const box = piece.closest(".sd35-piece");
    return { broken, spare: box.clientHeight - box.firstChild.offsetHeight };
}"""
"""Words that stand on two lines, and the room that is left below the text."""


def readable(page: Any) -> None:
    """Every piece has its words whole, and room for all of them."""
    for piece in page.locator(f"{PANEL} .sd35-report, {PANEL} .sd35-findings").all():
        if piece.is_visible():
            seen = piece.evaluate(SEEN)
            assert not seen["broken"], piece.inner_text()
            assert seen["spare"] >= -1, (seen, piece.inner_text())


def test_a_report_stays_when_the_run_is_over_and_comes_back_from_the_cache(page: Any) -> None:
    workflow = read(PACK / "workflows" / "text_to_image.json")
    opened(page, workflow)
    assert page.locator(REPORT).count() == 0, "no room where there is nothing"
    fixed_seed(page)
    finish(page)
    said = page.locator(REPORT)
    assert "SD3.5" in said.inner_text()
    first = said.inner_text()
    shot(page, "report")
    readable(page)
    opened(page, workflow)
    page.wait_for_timeout(500)
    fixed_seed(page)
    finish(page)
    assert page.locator(REPORT).inner_text() == first, "the loader did not run again"
    saved = page.evaluate("() => JSON.stringify(app.graph.serialize())")
    assert "sd35_report" not in saved and "sd35_panel" not in saved


def test_a_page_that_is_opened_later_has_the_report_of_the_cached_loader(
    page: Any, comfyui: hosts.Host
) -> None:
    if "HAS_INTERMEDIATE_OUTPUT" not in (comfyui.folder / "execution.py").read_text("utf-8"):
        pytest.skip("this ComfyUI tells nothing of cached nodes")
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    fixed_seed(page)
    finish(page)
    page.reload()
    page.wait_for_function("window.app && window.app.graph && window.app.canvas")
    page.wait_for_timeout(1000)
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    fixed_seed(page)
    finish(page)
    assert "SD3.5" in page.locator(REPORT).inner_text()


def test_the_checks_findings_stand_below_it_line_by_line_gravest_first(page: Any) -> None:
    opened(page, read(PACK / "workflows" / "check.json"))
    set_widget(page, "SD35Sampler", "cfg", 15.0)
    set_widget(page, "SD35Sampler", "shift", 3.0)
    of(page, "EmptySD3LatentImage", "node.widgets[0].value = 512;")
    finish(page)
    said = page.locator(REPORT, has=page.locator(".sd35-warning, .sd35-error")).first
    kinds = said.evaluate("(piece) => [...piece.children].map((line) => line.className)")
    assert len(kinds) >= 2
    order = ["sd35-error", "sd35-warning", "sd35-note", ""]  # last what memory it takes
    assert kinds == sorted(kinds, key=order.index)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(500)
    shot(page, "check_report")
    readable(page)


def test_a_report_is_there_before_the_run_ends_or_fails(page: Any) -> None:
    opened(page, read(PACK / "workflows" / "check.json"))
    set_widget(page, "SD35Check", "strict", "stop at warnings")
    set_widget(page, "SD35Sampler", "cfg", 15.0)
    finish(page, "execution_error")
    assert page.locator(REPORT, has_text="cfg is 15").count() == 1
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    of(page, "SD35Sampler", ADD_STEP_CACHE)
    finish(page)
    assert page.locator(REPORT, has_text="left out").count() == 1, "told while sampling"


ADD_STEP_CACHE = """const cache = LiteGraph.createNode("SD35StepCache"); app.graph.add(cache);
    cache.pos = [node.pos[0], node.pos[1] + node.size[1] + 60];
    app.graph.nodes.find((n) => n.type === "SD35Loader").connect(0, cache, 0);
    cache.connect(0, node, 0);"""


def test_findings_take_room_when_there_are_any(page: Any) -> None:
    with_skip_layers(page)
    high = "return node.widgets.find((w) => w.name === 'sd35_panel').options.getMinHeight();"
    before = of(page, "SD35Sampler", high)
    set_widget(page, "SD35Sampler", "cfg", 15.0)
    set_widget(page, "SD35Sampler", "shift", 3.0)
    set_widget(page, "SkipLayerGuidance", "end", 0.001)
    page.wait_for_timeout(300)
    shot(page, "findings")
    kinds = panel(page, "SD35Sampler").locator(".sd35-findings > *")
    assert kinds.count() >= 2
    readable(page)
    assert of(page, "SD35Sampler", high) > before


def test_the_side_panel_lists_no_row_of_ours(page: Any) -> None:
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    finish(page)
    browser.set_value(page, "Comfy.RightSidePanel.IsOpen", True)
    options = "return node.widgets.filter((w) => w.name.startsWith('sd35_')).length;"
    try:
        for kind, row in (("SD35Sampler", "denoise"), ("SD35Loader", "t5xxl")):
            assert of(page, kind, options)
            of(page, kind, "app.canvas.deselectAll(); app.canvas.selectItems([node]);")
            page.wait_for_timeout(1000)
            side = page.get_by_test_id("properties-panel")
            rows = side.inner_text().splitlines()
            assert row in rows and not {"sd35_panel", "sd35_report"} & set(rows)
        shot(page, "side")
    finally:
        browser.set_value(page, "Comfy.RightSidePanel.IsOpen", False)


def test_a_node_whose_check_has_an_error_wears_a_badge(page: Any) -> None:
    with_skip_layers(page)
    badges = "return node.badges.map((b) => b.text ?? '').filter((text) => text.includes('✖'));"
    for kind in ("SD35Sampler", "SkipLayerGuidance"):
        assert of(page, kind, badges) == ["✖ 1 error"], kind
    page.wait_for_timeout(300)
    shot(page, "badges")
    set_widget(page, "SkipLayerGuidance", "layers", "1")
    for kind in ("SD35Sampler", "SkipLayerGuidance"):
        assert of(page, kind, badges) == [], kind
    opened(page, read(PACK / "workflows" / "check.json"))
    add_mediums_layers(page, "SD35Check")
    for kind in ("SD35Check", "SD35Sampler"):
        assert of(page, kind, badges) == ["✖ 1 error"], kind
    shot(page, "badge_of_check")
    assert page.get_by_text("✖ 1 error").count() == (page.renderer != "classic")
