"""What the tests of the canvas do with an open page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tools import browser

from ..conftest import PACK
from .conftest import SHOTS, read

SAMPLER, SKIP, LOADER = "SD35Sampler", "SkipLayerGuidance", "SD35Loader"
PANEL = ".sd35-piece"
LONG = 60_000
"""Milliseconds that a busy machine may take."""


def of(page: Any, kind: str, code: str, *values: Any) -> Any:
    """Run code with `node`, the first of its kind in what is open, and `values`."""
    first = "const node = app.canvas.graph.nodes.find((n) => n.type === kind);"
    script = f"([kind, values]) => {{ {first} {code} }}"
    return page.evaluate(script, [kind, list(values)])


def widgets(page: Any, kind: str) -> dict[str, Any]:
    code = "return Object.fromEntries(node.widgets.map((w) => [w.name, w.value]));"
    return of(page, kind, code)


@contextmanager
def answered(page: Any) -> Iterator[None]:
    """Until the server has answered what was changed inside, and it is drawn."""
    with page.expect_response("**/sd35/plan", timeout=LONG):
        yield
    page.wait_for_timeout(200)


SET = """const w = node.widgets.find((w) => w.name === values[0]);
    w.value = values[1]; w.callback?.(values[1], app.canvas, node);"""
"""As the widget itself does after typing: the value, then its callback."""


def set_widget(page: Any, kind: str, name: str, value: Any) -> None:
    with answered(page):
        of(page, kind, SET, name, value)


def opened(page: Any, workflow: dict[str, Any]) -> None:
    with answered(page):
        browser.load(page, workflow)


def with_skip_layers(page: Any) -> None:
    """The shipped text-to-image workflow, with Medium's SkipLayerGuidance before its sampler."""
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    add_mediums_layers(page, SAMPLER)


def add_mediums_layers(page: Any, before: str) -> None:
    """Put a SkipLayerGuidance before a node, with Medium's layers, not the small model's."""
    with answered(page):
        of(page, before, ADD_SKIP_LAYERS)
    page.wait_for_timeout(500)  # it takes a layer of the small model
    set_widget(page, SKIP, "layers", "7, 8, 9")


ADD_SKIP_LAYERS = """const skip = LiteGraph.createNode('SkipLayerGuidance'); app.graph.add(skip);
        skip.pos = [node.pos[0], node.pos[1] + node.size[1] + 60];
        app.graph.nodes.find((n) => n.type === 'SD35Loader').connect(0, skip, 0);
        skip.connect(0, node, 0);
        app.extensionManager.command.execute('Comfy.Canvas.FitView');"""


def panel(page: Any, kind: str) -> Any:
    """The panel on the sampler or on the skip-layer node."""
    inner = ".sd35-recipe" if kind == SAMPLER else ".sd35-layers"
    return page.locator(PANEL, has=page.locator(inner))


def choose(page: Any, name: str) -> None:
    """A recipe from the sampler's list, with the mouse."""
    panel(page, SAMPLER).locator(".sd35-recipe").click()
    with answered(page):
        page.locator(".sd35-menu").get_by_text(name, exact=True).click()


def shot(page: Any, name: str) -> None:
    page.screenshot(path=str(SHOTS / f"panels_{name}_{page.renderer}.png"))


def finish(page: Any, end: str = "execution_success") -> None:
    """Queue the open workflow and wait until nothing runs, and a little longer."""
    page.evaluate(
        """() => {
            window.ended = "";
            for (const kind of ["execution_success", "execution_error"]) {
                app.api.addEventListener(kind, () => (window.ended ||= kind), { once: true });
            }
            app.queuePrompt(0);
        }"""
    )
    page.wait_for_function("() => window.ended", timeout=120_000)
    assert page.evaluate("() => window.ended") == end
    page.wait_for_timeout(1500)


def fixed_seed(page: Any) -> None:
    code = "node.widgets.find((w) => w.name === 'control_after_generate').value = 'fixed';"
    of(page, "SD35Sampler", code)


def add_from_search(page: Any, words: str) -> None:
    """Double-click, type, Enter, click: as a person adds a node. The click puts it down."""
    before = page.evaluate("() => app.graph.nodes.length")
    for _ in range(10):
        page.mouse.dblclick(1300, 780)
        page.wait_for_timeout(700)
        if page.evaluate("() => document.activeElement.tagName") == "INPUT":
            break
    page.keyboard.type(words)
    page.get_by_text(words, exact=True).first.wait_for(timeout=LONG)
    page.wait_for_timeout(200)
    page.keyboard.press("Enter")
    page.wait_for_function("(n) => app.graph.nodes.length > n", arg=before, timeout=LONG)
    page.mouse.move(1000, 600)
    page.mouse.click(1000, 600)
    page.wait_for_timeout(300)
    page.evaluate("() => { app.graph.nodes.at(-1).pos = [-3000, 0]; }")


def empty(page: Any, scale: float = 0.75) -> None:
    page.evaluate("() => app.graph.clear()")
    page.keyboard.press("Escape")
    page.evaluate(
        "(s) => { app.canvas.ds.scale = s; app.canvas.ds.offset = [120, 190]; "
        "app.canvas.setDirty(true, true); }",
        scale,
    )
    page.wait_for_timeout(300)
