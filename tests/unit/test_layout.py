"""The canvas workflows can be read: nothing lies over anything, and all of it fits a window."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from sd35_core.workflow.workflow_file import api_graph
from tools import blueprints
from tools.layout import APPS, HIGHEST, NOTE, TITLE, WIDEST, as_app, laid_out

from ..conftest import PACK

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
WINDOW = (1200, 645)
"""Where "Fit view" puts a workflow in a window of 1600x900: three quarters of the canvas."""
LEAST_SCALE = 0.7

Box = tuple[float, float, float, float]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def box(node: dict[str, Any]) -> Box:
    (x, y), (width, height) = node["pos"], node["size"]
    if node["flags"].get("collapsed"):
        height = 0
    return x, y - TITLE, x + width, y + height


def group_box(group: dict[str, Any]) -> Box:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def apart(a: Box, b: Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def within(a: Box, b: Box) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_laid_out_to_be_read(path: Path) -> None:
    workflow = read(path)
    assert laid_out(workflow) == workflow, "run python tools/layout.py"
    assert as_app(workflow, path.stem) == workflow, "run python tools/layout.py"
    assert ("linearData" in workflow["extra"]) == (path.stem in APPS)
    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    groups = [group_box(group) for group in workflow["groups"]]
    for a, b in itertools.combinations(boxes.values(), 2):
        assert apart(a, b), (a, b)
    (note,) = (node for node in workflow["nodes"] if node["type"] == NOTE)
    every = [*groups, boxes.pop(note["id"])]
    for a, b in itertools.combinations(every, 2):
        assert apart(a, b), (a, b)
    for each in boxes.values():
        assert sum(within(each, group) for group in groups) == 1, each
    assert all(group["title"] for group in workflow["groups"])
    assert note["pos"] == [0, TITLE], "the note is at the top left"
    assert min(each[0] for each in every) == min(each[1] for each in every) == 0
    width, height = max(each[2] for each in every), max(each[3] for each in every)
    assert width <= WIDEST and height <= HIGHEST, (width, height)
    assert min(WINDOW[0] / width, WINDOW[1] / height) >= LEAST_SCALE


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_layout_changes_nothing_but_places(path: Path) -> None:
    def essence(workflow: dict[str, Any]) -> Any:
        nodes = [{**node, "pos": 0, "size": 0, "flags": 0} for node in workflow["nodes"]]
        return nodes, workflow["links"]

    workflow = read(path)
    scattered = read(path)
    for number, node in enumerate(scattered["nodes"]):
        node["pos"] = [7 * number, -3 * number]
    assert essence(laid_out(scattered)) == essence(workflow)
    assert laid_out(scattered) == workflow


@pytest.mark.parametrize("name", blueprints.BLUEPRINTS)
def test_a_blueprint_is_its_workflow_in_one_node(name: str) -> None:
    path = blueprints.FOLDER / f"{name}.json"
    assert read(path) == blueprints.made(name), "run python tools/blueprints.py"
    wanted = blueprints.BLUEPRINTS[name]
    twin = read(PACK / "workflows" / "api" / f"{wanted.workflow}.json")
    found = api_graph(read(path))
    for key, node in found.items():
        (_, inner), original = key.split(":"), twin[key.split(":")[1]]
        assert node["class_type"] == original["class_type"]
        for each, value in original["inputs"].items():
            if isinstance(value, list):
                value = [f"1:{value[0]}", value[1]]
            elif (int(inner), each) in wanted.inputs.values():
                value = node["inputs"][each]
            if (int(inner), each) == wanted.inputs.get(("image", "image")):
                continue
            assert node["inputs"][each] == value, (key, each)
