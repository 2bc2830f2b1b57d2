"""Other classes in the places of a workflow's nodes; everything else of it stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .graph import Budget
from .shapes import SHAPES, WIDGET_TYPES
from .workflow_file import INPUTS, SEED_MODES, Canvas, Scope, is_node, widgets_of

Json = dict[str, Any]
LINK: tuple[str, ...] = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
"""What a link's places mean where it is a list."""


@dataclass(frozen=True)
class Swap:
    """Another class for a node. names: input -> its id there; an input without one goes. values:
    widgets that the old node hasn't, where they are not the default."""

    kind: str
    names: dict[str, str]
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Passed:
    """A node that goes: its first output comes from now on from what its `model` came from, or from
    a slot of another node."""

    node: str | None = None
    slot: int = 0


Changes = Mapping[str, "Swap | Passed"]
"""Node's id in the API's form -> what becomes of it."""


def value_of(swap: Swap, name: str, before: Mapping[str, Any], default: Any) -> Any:
    """What an input of the new node is: the old one's, a given value, or the default."""
    old = next((old for old, new in swap.names.items() if new == name), None)
    return before[old] if old is not None and old in before else swap.values.get(name, default)


def rewritten_prompt(workflow: Json, changes: Changes, budget: Budget) -> Json:
    """A workflow in the API's format with the changes made; the one that is given stays."""
    prompt = workflow.get("prompt", workflow)

    def source(value: Any) -> Any:
        seen: set[str] = set()
        while isinstance(value, list) and len(value) == 2 and str(value[0]) not in seen:
            budget.spend()
            seen.add(str(value[0]))
            change = changes.get(str(value[0]))
            if not isinstance(change, Passed):
                return value
            passed = prompt[str(value[0])]["inputs"]["model"]
            value = passed if change.node is None else [change.node, change.slot]
        return value

    made: Json = {}
    for key, node in prompt.items():
        change = changes.get(key)
        if isinstance(change, Passed):
            continue
        if not is_node(node):
            made[key] = node
            continue
        inputs = {name: source(value) for name, value in node["inputs"].items()}
        made[key] = {**node, "inputs": inputs}
        if isinstance(change, Swap):
            rows = SHAPES[change.kind].inputs
            values = {name: value_of(change, name, inputs, default) for name, _, default in rows}
            made[key]["inputs"] = {k: v for k, v in values.items() if v is not None}
            made[key]["class_type"] = change.kind
            made[key].pop("_meta", None)  # the front end's title, which is the old class's
    return {**workflow, "prompt": made} if "prompt" in workflow else made


def rewritten_canvas(workflow: Json, canvas: Canvas, changes: Changes, budget: Budget) -> Json:
    """A canvas file with the changes made, in subgraphs too; the one that is given stays.

    Nodes that stand in several instances of a subgraph have to change alike.
    """
    by_graph: dict[Any, dict[str, Swap | Passed]] = {}
    for scope in canvas.scopes:
        for key in scope.nodes:
            budget.spend()
            change = changes.get(scope.prefix + key)
            if change is not None:
                by_graph.setdefault(graph_id(scope), {})[key] = change
    renamed = {
        graph: {key: each.names for key, each in found.items() if isinstance(each, Swap)}
        for graph, found in by_graph.items()
    }

    def changed(found: Json, graph: Any) -> Json:
        made = _Rewriting(found, by_graph.get(graph, {}), budget).made()
        return {**made, "nodes": [_promotions(node, renamed) for node in made["nodes"]]}

    made = changed(workflow, None)
    definitions = workflow.get("definitions") or {}
    if definitions.get("subgraphs"):
        inner = [changed(each, each["id"]) for each in definitions["subgraphs"]]
        made["definitions"] = {**definitions, "subgraphs": inner}
    return made


def graph_id(scope: Scope) -> Any:
    """The subgraph that a scope is an instance of; None for the canvas itself."""
    return None if scope.outer is None else scope.definition.get("id")


def _promotions(node: Json, renamed: dict[Any, dict[str, dict[str, str]]]) -> Json:
    """A subgraph's node whose list of promoted widgets has their new names."""
    names = renamed.get(node.get("type"))
    properties = node.get("properties") or {}
    shown = properties.get("proxyWidgets")
    if not names or not isinstance(shown, list):
        return node
    rows = [
        [row[0], names.get(str(row[0]), {}).get(row[1], row[1]), *row[2:]]
        if isinstance(row, list) and len(row) > 1 and isinstance(row[1], str)
        else row
        for row in shown
    ]
    return {**node, "properties": {**properties, "proxyWidgets": rows}}


class _Rewriting:
    """The changes in one list of nodes with its links."""

    def __init__(self, found: Json, changes: Changes, budget: Budget):
        self.found, self.changes, self.budget = found, changes, budget
        self.nodes = {str(node["id"]): node for node in found["nodes"]}
        named: list[Json] = [
            dict(zip(LINK, x)) if isinstance(x, list) else dict(x or {}) for x in found["links"]
        ]
        self.links: dict[Any, Json] = {link["id"]: link for link in named if "id" in link}
        self.into = self._by("target_id")
        self.out: dict[str, list[Any]] = {}

    def _by(self, end: str) -> dict[str, list[Any]]:
        """Node -> the numbers of its links at one end."""
        found: dict[str, list[Any]] = {}
        for number, link in self.links.items():
            self.budget.spend()
            found.setdefault(str(link[end]), []).append(number)
        return found

    def made(self) -> Json:
        if not self.changes:
            return self.found
        before, self.out = set(self.links), self._by("origin_id")
        for key, change in self.changes.items():
            if isinstance(change, Passed):
                self._pass(key, change)
        for key, change in self.changes.items():
            if isinstance(change, Swap):
                self.nodes[key] = self._swapped(self.nodes[key], change)
        gone, self.out = before - self.links.keys(), self._by("origin_id")
        made = {**self.found, "nodes": [self._connected(node) for node in self.nodes.values()]}
        made["links"] = [self._written(x) for x in self.found["links"] if _number(x) not in gone]
        if made.get("inputs"):
            made["inputs"] = [self._entrance(n, slot) for n, slot in enumerate(made["inputs"])]
        if not gone:
            return made
        extra = made.get("extra")
        if extra:
            made["extra"] = {**extra, **_without(extra, gone)}
        return {**made, **_without(made, gone)}

    def _pass(self, key: str, change: Passed) -> None:
        """Take out a node whose output another one gives."""
        into = [self.links.pop(number) for number in self.into.get(key, ()) if number in self.links]
        if change.node is None:
            slots: list[Json] = list(self.nodes[key].get("inputs") or ())
            given = [x for x in into if slots[x["target_slot"]].get("name") == "model"]
            source = given[0]["origin_id"], given[0]["origin_slot"]
        else:
            source = self.nodes[change.node.rpartition(":")[2]]["id"], change.slot
        for number in self.out.get(key, ()):
            self.budget.spend()
            link = {**self.links[number], "origin_id": source[0], "origin_slot": source[1]}
            self.links[number] = link
            self.out.setdefault(str(source[0]), []).append(number)
        del self.nodes[key]

    def _swapped(self, node: Json, swap: Swap) -> Json:
        """A node of another class with the old one's links, widgets, place and looks."""
        shape, before = SHAPES[swap.kind], widgets_of(node)
        old: list[Json] = list(node.get("inputs") or ())
        slots = {swap.names.get(slot.get("name") or "", ""): slot for slot in old}
        inputs: list[Json] = []
        values: list[Any] = []
        for name, kind, default in shape.inputs:
            kept = {k: v for k, v in slots.get(name, {}).items() if k == "label"}
            slot = {"name": name, "type": kind, **kept, "link": slots.get(name, {}).get("link")}
            if kind in WIDGET_TYPES:
                slot["widget"] = {"name": name}
                values.append(value_of(swap, name, before, default))
                if name == "seed":
                    values.append(_seed_mode(node))
            inputs.append(slot)
        places = {slot["name"]: place for place, slot in enumerate(inputs)}
        for number in self.into.get(str(node["id"]), ()):
            link = self.links[number]
            name = swap.names.get(old[link["target_slot"]].get("name") or "")
            if name in places:
                self.links[number] = {**link, "target_slot": places[name]}
            else:
                del self.links[number]
        outputs = list(node.get("outputs") or ())
        made = {**node, "type": swap.kind, "inputs": inputs, "widgets_values": values}
        made["outputs"] = [
            {**(outputs[place] if place < len(outputs) else {}), "name": name, "type": kind}
            for place, (name, kind) in enumerate(shape.outputs)
        ]
        kept = {k: v for k, v in (node.get("properties") or {}).items() if k not in OF_THE_OLD}
        made["properties"] = {**kept, "Node name for S&R": swap.kind}
        if node.get("title") == node["type"]:
            del made["title"]
        return made

    def _connected(self, node: Json) -> Json:
        """A node whose outputs list the links that there are now."""
        self.budget.spend()
        slots = [self._listed(node["id"], n, x, "links") for n, x in enumerate(_outputs(node))]
        return node if slots == _outputs(node) else {**node, "outputs": slots}

    def _entrance(self, place: int, slot: Json) -> Json:
        """An input of a subgraph, with the links that it feeds now."""
        return self._listed(INPUTS, place, slot, "linkIds")

    def _listed(self, node: Any, place: int, slot: Json, name: str) -> Json:
        numbers = self.out.get(str(node), ())
        now = [n for n in numbers if self.links[n]["origin_slot"] == place]
        before = slot.get(name) or []
        return slot if sorted(now, key=str) == sorted(before, key=str) else {**slot, name: now}

    def _written(self, link: Any) -> Any:
        named = self.links.get(_number(link))
        if named is None:
            return link
        return [*(named[name] for name in LINK), *link[6:]] if isinstance(link, list) else named


OF_THE_OLD = {"cnr_id", "ver", "aux_id"}
"""Properties that name the pack of a node's class."""


def _number(link: Any) -> Any:
    return link[0] if isinstance(link, list) else (link or {}).get("id")


def _outputs(node: Json) -> list[Json]:
    return list(node.get("outputs") or ())


def _seed_mode(node: Json) -> str:
    """What stands after a seed: whether and how it changes."""
    values = node.get("widgets_values")
    found = values if isinstance(values, list) else ()
    return next((v for v in found if isinstance(v, str) and v in SEED_MODES), "randomize")


def _without(found: Json, gone: set[Any]) -> Json:
    """What is kept beside links, without those that are gone: their way-points."""
    made: Json = {}
    if found.get("linkExtensions"):
        made["linkExtensions"] = [x for x in found["linkExtensions"] if x.get("id") not in gone]
    if found.get("reroutes"):
        rows = [
            {**row, "linkIds": [n for n in row.get("linkIds") or () if n not in gone]}
            for row in found["reroutes"]
        ]
        made["reroutes"] = [row for row in rows if row["linkIds"] or row.get("floating")]
    return made
