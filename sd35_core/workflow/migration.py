"""ComfyUI's own nodes of an SD3.5 workflow as this pack's, where these draw the same picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import SettingError
from .graph import Budget
from .holdings import FindFile
from .planning import Planner
from .reader import Reader
from .rewriting import Changes, graph_id, rewritten_canvas, rewritten_prompt
from .workflow_file import Canvas, api_graph, is_canvas, parsed, sound

LARGEST_LIST = 100
"""Lines of a report."""


@dataclass(frozen=True)
class Migration:
    """A workflow with this pack's nodes, and a line for each node that was replaced or stays."""

    workflow: dict[str, Any]
    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def report(self) -> str:
        """What became of the workflow, a line each."""
        if not self.replaced and not self.left:
            return "There is nothing to replace: no node of ComfyUI's own draws with SD3.5 here."
        return "\n".join([*self.replaced[:LARGEST_LIST], *self.left[:LARGEST_LIST]])


def migrated(
    workflow: dict[str, Any], find_file: FindFile, budget: Budget | None = None
) -> Migration:
    """The workflow, in either format, with this pack's nodes; the one that is given stays.

    Raises SettingError for no workflow, TooLargeError when the budget is spent.
    """
    budget = budget or Budget()
    if not is_canvas(workflow):
        plan = Planner(Reader(api_graph(workflow, budget), find_file, budget), {})
        made = rewritten_prompt(workflow, plan.changes, budget)
        return Migration(made, plan.replaced, plan.left)
    with sound():
        canvas = Canvas(workflow, budget)
        places = Places(canvas, budget)
        fixed = dict.fromkeys(places.in_groups, "it is in a group node; make that a subgraph first")
        while True:  # each time round a node more stays
            reader = Reader(canvas.graph, find_file, budget)
            plan = Planner(reader, fixed, places.linked, places.seen)
            unlike = places.unlike(plan.changes)
            if not unlike:
                break
            fixed |= dict.fromkeys(unlike, "its subgraph stands in several places that differ")
        made = rewritten_canvas(workflow, canvas, plan.changes, budget)
    return Migration(made, plan.replaced, plan.left)


def migration_answer(body: bytes, find_file: FindFile, seconds: float) -> str:
    """A workflow in JSON -> JSON: workflow, and the lines replaced and left.

    Raises SettingError for no workflow, and for one that takes more than so many seconds.
    """
    found = migrated(parsed(body), find_file, Budget(seconds))
    try:
        return json.dumps({"report": found.report(), **vars(found)}, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"The workflow can't be written as JSON: {error}.") from error


class Places:
    """Where on a canvas the nodes of the API's form stand."""

    def __init__(self, canvas: Canvas, budget: Budget):
        self.graph = canvas.graph
        self.in_groups: set[str] = set()
        self.nodes: dict[str, dict[str, Any]] = {}
        self.instances: dict[tuple[Any, str], list[str]] = {}
        self.targets: dict[str, list[str]] = {}
        for scope in canvas.scopes:
            grouped = scope.outer is not None and graph_id(scope) is None
            for name, node in scope.nodes.items():
                budget.spend()
                key = scope.prefix + name
                self.nodes[key] = node
                self.instances.setdefault((graph_id(scope), name), []).append(key)
                if grouped:
                    self.in_groups.add(key)
            found = () if grouped else scope.definition["links"]
            for link in found:
                budget.spend()
                ends = (link[1], link[3]) if isinstance(link, list) else (
                    link["origin_id"], link["target_id"]
                )  # fmt: skip
                self.targets.setdefault(f"{scope.prefix}{ends[0]}", []).append(
                    f"{scope.prefix}{ends[1]}"
                )

    def linked(self, key: str, name: str) -> bool:
        """Whether a widget's value comes from another node or from outside a subgraph."""
        slots = self.nodes[key].get("inputs") or ()
        return any(s.get("name") == name and s.get("link") is not None for s in slots)

    def seen(self, key: str) -> bool:
        """Whether everything that a node's outputs lead to runs, and stands beside it."""
        return all(target in self.graph for target in self.targets.get(key, ()))

    def unlike(self, changes: Changes) -> list[str]:
        """Nodes of a subgraph that would become different things in two instances of it."""
        return [
            key
            for keys in self.instances.values()
            if len(keys) > 1 and any(k in changes for k in keys)
            for key in keys
            if any(changes.get(k) != changes.get(keys[0]) for k in keys)
        ]
