"""The blueprints: one node from the search box, with what a person changes, that draws."""

from __future__ import annotations

from typing import Any

import pytest

from tools import blueprints, browser
from tools import host as hosts

from ..conftest import PACK
from .board import add_from_search, empty, finish, shot
from .conftest import read

SHOWN = """() => {
    const node = app.graph.nodes.find((n) => n.subgraph);
    return [node.title, node.widgets.map((w) => [w.label ?? w.name, w.value])];
}"""
COMPLETE = """() => {
    const node = app.graph.nodes.find((n) => n.subgraph);
    node.pos = [0, 0];
    const save = LiteGraph.createNode("SaveImage");
    app.graph.add(save);
    save.pos = [500, 0];
    node.connect(0, save, 0);
    if (node.inputs.some((input) => input.name === "image")) {
        const load = LiteGraph.createNode("LoadImage");
        app.graph.add(load);
        load.pos = [-400, 0];
        load.connect(0, node, node.inputs.findIndex((input) => input.name === "image"));
    }
    node.widgets.find((w) => w.name === "text").value = "a big owl on a purple background";
}"""


def test_the_server_lists_them_for_this_pack(server: hosts.Server) -> None:
    listed = hosts.call(server.url, "/global_subgraphs").values()
    ours = {each["name"] for each in listed if "sd35" in each["info"]["node_pack"]}
    assert ours == set(blueprints.BLUEPRINTS)


@pytest.mark.parametrize("name", blueprints.BLUEPRINTS)
def test_one_node_from_the_search_box_draws(page: Any, name: str) -> None:
    empty(page)
    add_from_search(page, name)
    title, shown = page.evaluate(SHOWN)
    assert title == name
    labels = [label for label, _ in shown]
    for label in ("prompt", "seed", "width", "height", "model"):
        assert label in labels, labels
    page.evaluate(COMPLETE)
    exported = browser.exported(page)
    workflow = blueprints.BLUEPRINTS[name].workflow
    twin = read(PACK / "workflows" / "api" / f"{workflow}.json")
    texts = [node["inputs"].get("text") for node in exported.values()]
    (sampler,) = (n for n in exported.values() if n["class_type"] == "SD35Sampler")
    wanted = [n for n in twin.values() if n["class_type"] == "SD35Sampler"][-1]["inputs"]
    for key in ("steps", "cfg", "shift", "sampler", "schedule"):
        assert sampler["inputs"][key] == wanted[key]
    assert "a big owl on a purple background" in texts
    finish(page)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(700)
    shot(page, f"blueprint_{name.replace(' ', '_')}")
    saved = page.evaluate("() => Object.values(app.nodeOutputs).flatMap((o) => o?.images ?? [])")
    assert [each for each in saved if each["type"] == "output"]
