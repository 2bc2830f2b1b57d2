"""API workflows: read one, and set its widgets by the node's title, class or id."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import outside
from .errors import WorkflowError
from .outside import is_a

Workflow = dict[str, dict[str, Any]]
"""ComfyUI's API format: node id -> its class_type, inputs and, under _meta, its title."""


def read(path: str | Path) -> Workflow:
    """The API workflow in a JSON file. Raises WorkflowError for anything else."""
    path = Path(path)
    try:
        found = outside.read(path)
    except (OSError, ValueError) as error:
        raise WorkflowError(f"{path} can't be read as JSON: {error}.") from error
    return checked(found, str(path))


def checked(found: Any, name: str) -> Workflow:
    """The same, once it is known to be an API workflow. Raises WorkflowError."""
    if isinstance(found, dict) and isinstance(found.get("nodes"), list):
        raise WorkflowError(
            f"{name} is in the canvas' own format, which servers don't take. Open it on the canvas "
            "and choose File, Export (API)."
        )
    if not isinstance(found, dict) or not found:
        raise WorkflowError(
            f"{name} holds no workflow: expected an object with a node for each id."
        )
    for key, node in found.items():
        if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
            raise WorkflowError(f"{name}: node {key} has no inputs; this is no API workflow.")
        if not isinstance(node.get("class_type"), str):
            raise WorkflowError(f"{name}: node {key} has no class_type; this is no API workflow.")
        meta = node.get("_meta")
        if not isinstance(meta, (dict, type(None))) or not is_a((meta or {}).get("title", ""), str):
            raise WorkflowError(f"{name}: node {key} has a _meta that is no object with a title.")
    return found


def overridden(workflow: Workflow, overrides: Mapping[str, Any]) -> Workflow:
    """A copy with widgets set: {"Prompt.text": "an owl", "SD35Sampler.seed": 5, "7.width": 768}.

    Before the last dot stands a node's id, its title on the canvas, or its class; a text is taken
    as the number or the switch that the widget held. Raises WorkflowError when it names no widget,
    or more than one node.
    """
    changed = copy.deepcopy(workflow)
    for name, value in overrides.items():
        key, widget = target(changed, name)
        inputs = changed[key]["inputs"]
        inputs[widget] = like(inputs[widget], value, name)
    return changed


def target(workflow: Workflow, name: str) -> tuple[str, str]:
    """(node id, widget) that an override names. Raises WorkflowError."""
    node, dot, widget = name.rpartition(".")
    if not dot or not node or not widget:
        raise WorkflowError(f"'{name}' names no widget: write NODE.WIDGET, as in Prompt.text.")
    found = [key for key in workflow if key == node] or [
        key for key in workflow if node in (title(workflow[key]), workflow[key]["class_type"])
    ]
    if not found:
        names = {n for k, v in workflow.items() for n in (k, title(v), v["class_type"])}
        raise WorkflowError(f"'{name}': no node is called '{node}'. {nearest(node, names)}")
    having = [key for key in found if widget in workflow[key]["inputs"]]
    if len(having) > 1:
        nodes = ", ".join(f"{key} ({title(workflow[key])})" for key in having)
        raise WorkflowError(f"'{name}' fits several nodes: {nodes}. Name one by its id.")
    if not having:
        widgets = {w for key in found for w, v in widgets_of(workflow[key]).items()}
        raise WorkflowError(
            f"'{name}': '{node}' has no widget '{widget}'. {nearest(widget, widgets)}"
        )
    if isinstance(workflow[having[0]]["inputs"][widget], list):
        raise WorkflowError(
            f"'{name}' is connected to another node, which gives its value. Set that node's widget."
        )
    return having[0], widget


def title(node: Mapping[str, Any]) -> str:
    """A node's name on the canvas; its class where the file keeps none."""
    return (node.get("_meta") or {}).get("title") or node["class_type"]


def widgets_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that hold a value and no link."""
    return {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}


def nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), 3, 0.5)
    return (
        f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(sorted(known))}."
    )


def like(held: Any, value: Any, name: str) -> Any:
    """`value`, a text from a command line or a table made what the widget held before."""
    if not isinstance(value, str) or isinstance(held, str):
        return value
    try:
        if isinstance(held, bool):
            return {"true": True, "false": False, "1": True, "0": False}[value.strip().lower()]
        if isinstance(held, int):
            number = finite(float(value))
            return int(value) if value.strip().lstrip("+-").isdecimal() else number
        return finite(float(value))
    except (KeyError, ValueError, OverflowError) as error:
        kind = "true or false" if isinstance(held, bool) else "a number"
        raise WorkflowError(f"'{name}' takes {kind} (it held {held!r}); got {value!r}.") from error


def finite(number: float) -> float:
    """Raises ValueError for NaN and infinity, which JSON has not."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is no number that a widget can hold")
    return number
