"""The real canvas in a headless Chromium, through Playwright."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tools import chromium

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def canvas(url: str, nodes_2: bool = False) -> Iterator[Page]:
    """The page of a running ComfyUI, ready, with its console in `page.messages`."""
    path = chromium.find_browser()
    if path is None:
        raise FileNotFoundError("no Chromium: set SD35_CHROMIUM to one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        messages: list[str] = []
        page.on("console", lambda m: messages.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda error: messages.append(f"pageerror: {error}"))
        page.messages = messages  # pyright: ignore[reportAttributeAccessIssue]
        page.goto(url)
        page.wait_for_function(
            "window.app && window.app.graph && window.app.canvas", timeout=90_000
        )
        set_value(page, "Comfy.TutorialCompleted", True)
        set_renderer(page, nodes_2)
        yield page
        browser.close()


def set_value(page: Page, key: str, value: Any) -> None:
    """One of ComfyUI's settings."""
    page.evaluate(
        "([key, value]) => window.app.ui.settings.setSettingValueAsync(key, value)", [key, value]
    )


def set_renderer(page: Page, nodes_2: bool) -> None:
    set_value(page, "Comfy.VueNodes.Enabled", nodes_2)
    page.wait_for_timeout(500)


def load(page: Page, workflow: dict[str, Any]) -> None:
    """Open a canvas workflow and fit it into the window."""
    page.evaluate("async (data) => { await window.app.loadGraphData(data); }", workflow)
    page.keyboard.press("Escape")
    page.wait_for_timeout(300)
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(500)


def exported(page: Page) -> dict[str, Any]:
    """What the canvas would queue: the open workflow in the API's format."""
    text = page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)")
    return json.loads(text)


def run(page: Page) -> None:
    """Queue the open workflow and wait until a picture is on the canvas."""
    page.evaluate("() => window.app.queuePrompt(0)")
    page.wait_for_function(
        "() => Object.values(window.app.nodeOutputs || {}).some(o => o && o.images)",
        timeout=120_000,
    )
    page.wait_for_timeout(1500)
