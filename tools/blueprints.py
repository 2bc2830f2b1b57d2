"""Make the subgraph blueprints of subgraphs/ from the canvas workflows.

    python tools/blueprints.py

Each is one node in ComfyUI's search box with the widgets that a person changes; inside is the
workflow, with its settings. ComfyUI shows a blueprint under its file's name.
"""

from __future__ import annotations

import copy
import json
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text
from tools.layout import TITLE

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "subgraphs"
INPUTS, OUTPUTS = -10, -20
"""Ids of a subgraph's two ends."""
ORIGIN = uuid.UUID("7c7f3f6e-35d3-5d35-8a35-5d3535d35d35")
"""From which the ids in the files are made, so that they stay the same."""
COLUMN_GAP = 40
PROMPT, NEGATIVE = ("text", "prompt"), ("negative", "negative prompt")

Place = tuple[int, str]
"""A node's id and its input, or the number of its output, in the workflow."""


@dataclass(frozen=True)
class Blueprint:
    """`inputs`: name and label -> where it leads, `outputs`: name -> where it comes from."""

    workflow: str
    about: str
    inputs: dict[tuple[str, str], Place]
    outputs: dict[str, tuple[int, int]]


BLUEPRINTS = {
    "SD3.5 text to image": Blueprint(
        "text_to_image",
        "A prompt, a size, a seed and a model in, a picture out. Choosing a model fills the "
        "sampler inside with the settings that it was made for.",
        {
            PROMPT: (2, "text"),
            NEGATIVE: (3, "text"),
            ("width", "width"): (4, "width"),
            ("height", "height"): (4, "height"),
            ("seed", "seed"): (5, "seed"),
            ("model", "model"): (1, "model"),
        },
        {"IMAGE": (6, 0)},
    ),
    "SD3.5 with ControlNet": Blueprint(
        "controlnet_canny",
        "A picture steers another: edges, a depth map or a blurred picture, whichever ControlNet "
        "is chosen. The second output is what the ControlNet sees.",
        {
            ("image", "image"): (9, "image"),
            PROMPT: (7, "text"),
            NEGATIVE: (3, "text"),
            ("width", "width"): (4, "width"),
            ("height", "height"): (4, "height"),
            ("seed", "seed"): (12, "seed"),
            ("model", "model"): (1, "model"),
            ("control_net", "ControlNet"): (8, "control_net"),
            ("strength", "strength"): (11, "strength"),
        },
        {"IMAGE": (13, 0), "seen": (9, 1)},
    ),
}
"""File's name -> what is in it."""


def blueprint(name: str, wanted: Blueprint, workflow: dict[str, Any]) -> dict[str, Any]:
    """The file that ComfyUI reads: one node, and the subgraph that it stands for."""

    def made_id(what: str) -> str:
        return str(uuid.uuid5(ORIGIN, f"{name}/{what}"))

    nodes, links = needed(workflow, wanted)
    by_id = {node["id"]: node for node in nodes}
    next_link = max(link["id"] for link in links) + 1
    entries, given, values = [], [], []
    for slot, ((key, label), (node, socket)) in enumerate(wanted.inputs.items()):
        place = next(n for n, i in enumerate(by_id[node]["inputs"]) if i["name"] == socket)
        target = by_id[node]["inputs"][place]
        target["link"] = next_link
        links.append(link_of(next_link, INPUTS, slot, node, place, target["type"]))
        entry = {"id": made_id(key), "name": key, "type": target["type"], "linkIds": [next_link]}
        entries.append({**entry, "label": label, "pos": [0, 0]})
        next_link += 1
        shown = {"name": key, "type": target["type"], "label": label, "link": None}
        if "widget" in target:
            shown["widget"] = {"name": key}
            values.append(widget_value(by_id[node], socket))
        given.append(shown)
    leaving = []
    for slot, (key, (node, output)) in enumerate(wanted.outputs.items()):
        source = by_id[node]["outputs"][output]
        source["links"] = [*(source["links"] or ()), next_link]
        links.append(link_of(next_link, node, output, OUTPUTS, slot, source["type"]))
        leaving.append({"id": made_id(f"{key} out"), "name": key, "type": source["type"],
                        "linkIds": [next_link], "pos": [0, 0]})  # fmt: skip
        next_link += 1
    left, right = edges(nodes)
    subgraph = {
        **{"id": made_id("subgraph"), "version": 1, "revision": 0, "config": {}, "name": name},
        "state": {"lastGroupId": 0, "lastNodeId": max(by_id), "lastLinkId": next_link - 1,
                  "lastRerouteId": 0},
        "inputNode": {"id": INPUTS, "bounding": [left - 200, 0, 120, 60 + 20 * len(entries)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right + 80, 0, 120, 80]},
        "inputs": entries,
        "outputs": leaving,
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": links,
        "extra": {},
        "category": "SD3.5",
        "description": wanted.about,
    }  # fmt: skip
    node = {
        **{"id": 1, "type": subgraph["id"], "pos": [0, TITLE], "size": [360, 320], "flags": {}},
        **{"order": 0, "mode": 0, "inputs": given, "title": name, "properties": {}},
        "outputs": [{"name": o["name"], "type": o["type"], "links": []} for o in leaving],
        "widgets_values": values,
    }
    return {
        **{"id": made_id("file"), "revision": 0, "last_node_id": 1, "last_link_id": 0},
        **{"nodes": [node], "links": [], "groups": [], "config": {}, "version": 0.4},
        "definitions": {"subgraphs": [subgraph]},
        "extra": {"BlueprintDescription": wanted.about},
    }


def link_of(number: int, *ends: Any) -> dict[str, Any]:
    names = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
    return {"id": number, **dict(zip(names, ends))}


def needed(
    workflow: dict[str, Any], wanted: Blueprint
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The nodes and links that lead to the outputs; not those before a socket of the outside."""
    links = {link[0]: link_of(*link) for link in workflow["links"]}
    nodes = {node["id"]: copy.deepcopy(node) for node in workflow["nodes"]}
    ends = (
        each["link"]
        for node, socket in wanted.inputs.values()
        for each in nodes[node]["inputs"]
        if each["name"] == socket and each["link"] is not None
    )
    cut = {links[number]["origin_id"] for number in ends}
    found: dict[int, None] = {}
    waiting = [node for node, _ in wanted.outputs.values()]
    while waiting:
        key = waiting.pop()
        if key in found or key in cut:
            continue
        found[key] = None
        waiting += [links[i["link"]]["origin_id"] for i in nodes[key]["inputs"] if i["link"]]
    kept = [link for link in links.values() if {link["origin_id"], link["target_id"]} <= set(found)]
    numbers = {link["id"] for link in kept}
    chosen = [nodes[key] for key in sorted(found)]
    for node in chosen:
        for each in node["inputs"]:
            each["link"] = each["link"] if each["link"] in numbers else None
        for each in node["outputs"]:
            each["links"] = [number for number in each["links"] or () if number in numbers]
    return chosen, kept


def widget_value(node: dict[str, Any], name: str) -> Any:
    """A widget's value in a canvas file; what follows a seed has no input."""
    values = [v for v in node["widgets_values"] if v not in ("fixed", "randomize")]
    named = [each["name"] for each in node["inputs"] if "widget" in each]
    return values[named.index(name)]


def edges(nodes: list[dict[str, Any]]) -> tuple[float, float]:
    """Moves the nodes together, and gives where they begin and end."""
    places = sorted({node["pos"][0] for node in nodes})
    width = max(node["size"][0] for node in nodes)
    for node in nodes:
        node["pos"][0] = places.index(node["pos"][0]) * (width + COLUMN_GAP)
    return 0, len(places) * (width + COLUMN_GAP)


def made(name: str) -> dict[str, Any]:
    wanted = BLUEPRINTS[name]
    path = ROOT / "workflows" / f"{wanted.workflow}.json"
    return blueprint(name, wanted, json.loads(path.read_text(encoding="utf-8")))


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name in BLUEPRINTS:
        text = json.dumps(made(name), indent=1, ensure_ascii=False)
        write_text(FOLDER / f"{name}.json", text + "\n", replace=True)
        print(f"Wrote subgraphs/{name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
