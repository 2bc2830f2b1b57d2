"""A ComfyUI workflow as nodes and links, from either JSON format, bounded where it is read."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from .errors import SettingError
from .known_nodes import LOADERS, SAMPLERS

Graph = dict[str, dict[str, Any]]
"""A prompt in the API's format: node id -> class_type and inputs, each of them `bounded`."""
Link = tuple[str, int]

LARGEST_NUMBER = 2**64
"""Seeds end there."""
LONGEST_TEXT = 10_000
"""Characters of a widget; the rest of a longer one is not read."""
LONGEST_NAME = 200
"""Of a node's id and class."""
SEED_MODES = {"fixed", "increment", "decrement", "randomize"}
MUTED, BYPASSED = 2, 4


class TooLargeError(SettingError):
    """A workflow whose reading would take too long."""


class Budget:
    """Seconds of this thread's own time for what a stranger sent."""

    def __init__(self, seconds: float = math.inf):
        self.seconds, self.end = seconds, time.thread_time() + seconds

    def spend(self) -> None:
        """Raises TooLargeError when they are over; to be called in every loop over a workflow."""
        if time.thread_time() > self.end:
            raise TooLargeError(
                f"The workflow is too large to check: reading it takes more than {self.seconds:g} "
                "s. It can be queued all the same."
            )


def bounded(value: Any) -> Any:
    """A widget's value or a link as everything after this may rely on: a text of LONGEST_TEXT
    characters at most and without halves of any, a finite number up to LARGEST_NUMBER, a switch,
    [node, slot]; None for anything else."""
    if isinstance(value, str):
        text = value[:LONGEST_TEXT]
        return text if text.isascii() else text.encode("utf-16", "replace").decode("utf-16")
    if isinstance(value, (int, float)):
        return value if abs(value) <= LARGEST_NUMBER else None
    if isinstance(value, list) and len(value) == 2:
        node, slot = value
        if isinstance(node, (str, int)) and isinstance(slot, int) and abs(slot) < LARGEST_NUMBER:
            return [str(node)[:LONGEST_NAME], slot]
    return None


def parsed(data: bytes | str) -> dict[str, Any]:
    """The workflow in a JSON text. Raises SettingError."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"The workflow can't be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise SettingError(f"This is no workflow: expected an object, got a {kind}.")
    return found


def api_graph(workflow: dict[str, Any], budget: Budget | None = None) -> Graph:
    """The API's form of a workflow in either format.

    Raises SettingError for something else, and for a canvas file that does not name its widgets.
    """
    budget = budget or Budget()
    if "nodes" in workflow and "links" in workflow:
        try:
            return _from_canvas(workflow, budget)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SettingError(
                f"The workflow's nodes or links are damaged ({error!r}). Open it in ComfyUI and "
                "save it again."
            ) from error
    graph = workflow.get("prompt", workflow)
    if (
        not isinstance(graph, dict)
        or not graph
        or not all(
            isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs"), dict)
            for node in graph.values()
        )
    ):
        raise SettingError(
            "This is no ComfyUI workflow: neither the canvas' format (nodes, links) nor the API's "
            "(class_type, inputs). Save one in ComfyUI with Workflow > Save or > Export (API)."
        )
    return {key: _node(node["class_type"], node["inputs"]) for key, node in graph.items()}


def _node(kind: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    values = {name: bounded(value) for name, value in inputs.items()}
    return {"class_type": str(kind)[:LONGEST_NAME], "inputs": values}


def _from_canvas(workflow: dict[str, Any], budget: Budget) -> Graph:
    if workflow.get("definitions", {}).get("subgraphs"):
        raise SettingError(
            "The workflow has subgraphs, which can't be read in this format. Export it with "
            "Workflow > Export (API) and check that file."
        )
    links = {link[0]: link for link in workflow["links"] if isinstance(link, list)}
    nodes = {str(node["id"])[:LONGEST_NAME]: node for node in workflow["nodes"]}
    graph: Graph = {}
    for key, node in nodes.items():
        budget.spend()
        if node.get("mode") in (MUTED, BYPASSED):
            continue
        inputs: dict[str, Any] = {}
        values = node.get("widgets_values") or []
        if isinstance(values, dict):
            inputs.update(values)
            values = []
        rest, named = iter(values), False
        for slot in node.get("inputs", ()):
            name = slot["name"]
            if "widget" in slot:
                named = True
                value = next(rest, None)
                if isinstance(value, str) and value in SEED_MODES:
                    value = next(rest, None)
                inputs[name] = value
            if slot.get("link") is not None:
                source = _source(links, nodes, slot["link"], budget)
                if source is not None:
                    inputs[name] = list(source)
        if values and not named and node["type"] in SAMPLERS | LOADERS.keys():
            raise SettingError(
                f"The workflow's {node['type']} does not name its widgets: it was saved by an "
                "old ComfyUI. Open it in a newer one and save it again."
            )
        graph[key] = _node(node["type"], inputs)
    return graph


def _source(
    links: dict[Any, Any], nodes: dict[str, Any], number: Any, budget: Budget
) -> Link | None:
    """Where a link comes from, through bypassed nodes."""
    for _ in range(len(nodes) + 1):
        budget.spend()
        link = links.get(number)
        if link is None or str(link[1]) not in nodes:
            return None
        node, slot, kind = nodes[str(link[1])], link[2], link[5]
        if node.get("mode") == MUTED:
            return None
        if node.get("mode") != BYPASSED:
            return str(link[1]), slot
        passed = [i for i in node.get("inputs", ()) if i.get("type") == kind]
        passed = [i.get("link") for i in passed if i.get("link") is not None]
        if not passed:
            return None
        number = passed[min(slot, len(passed) - 1)]
    return None
