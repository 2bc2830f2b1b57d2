"""Workflows as apps: ComfyUI's App mode shows what to fill in, and the picture."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools import browser
from tools import host as hosts
from tools.layout import APPS

from ..conftest import PACK
from .board import LONG, shot
from .conftest import read

WIDGETS, RUN = "[data-testid=linear-widgets]", "[data-testid=linear-run-button]"
TOGGLE = "() => app.extensionManager.command.execute('Comfy.ToggleLinear')"
HAS_APPS = "() => app.extensionManager.command.commands.some(({id}) => id === 'Comfy.ToggleLinear')"


@pytest.mark.parametrize("name", APPS)
def test_an_app_shows_its_inputs_and_the_picture_that_it_draws(
    page: Any, server: hosts.Server, name: str
) -> None:
    if not page.evaluate(HAS_APPS):
        pytest.skip("this front end has no App mode")
    browser.load(page, read(PACK / "workflows" / f"{name}.json"))
    assert not page.locator(WIDGETS).is_visible(), "it opens as a graph"
    page.evaluate(TOGGLE)
    shown = page.locator(WIDGETS)
    welcome = page.get_by_role("button", name="Skip", exact=True)
    shown.locator("textarea").first.or_(welcome).first.wait_for(timeout=LONG)
    page.wait_for_timeout(1500)
    if welcome.is_visible():  # the first time
        welcome.click()
    texts = [title for title, widget in APPS[name] if widget == "text"]
    assert shown.locator("textarea").count() == len(texts)
    for title, widget in APPS[name]:
        label = title if widget == "text" else widget
        assert shown.get_by_text(label, exact=True).count() == 1, shown.inner_text()
    words = "a big owl on a purple background"
    shown.locator("textarea").nth(texts.index("Prompt")).fill(words)
    before = set(hosts.call(server.url, "/history"))
    page.locator(RUN).get_by_role("button", name="Run").click()
    for _ in range(600):
        page.wait_for_timeout(200)
        if set(hosts.call(server.url, "/history")) - before:
            break
    page.wait_for_timeout(2000)
    shot(page, f"app_{name}")
    (done,) = set(hosts.call(server.url, "/history")) - before
    history = hosts.call(server.url, "/history")[done]
    assert history["status"]["status_str"] == "success"
    assert words in json.dumps(history["prompt"])
    assert page.locator("main img, [data-testid=linear-outputs] img").count(), "the picture"
    page.evaluate(TOGGLE)
