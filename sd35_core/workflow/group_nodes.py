"""ComfyUI's group nodes, which came before subgraphs, as subgraphs of a canvas file.

A group node is saved as a node of the type `workflow>NAME`; `extra.groupNodes` has what is in it:
nodes, links by the nodes' places, and the outputs that lead out though they are used inside.
"""

from __future__ import annotations

from typing import Any

from .graph import Budget

PREFIXES = ("workflow>", "workflow/")


def group_of(node: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any] | None:
    """What is in a node, if it is a group node of the file's."""
    kind = str(node["type"])
    prefix = next((prefix for prefix in PREFIXES if kind.startswith(prefix)), None)
    return None if prefix is None else groups.get(kind.removeprefix(prefix))


def as_subgraph(
    node: dict[str, Any], group: dict[str, Any], budget: Budget
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group node and what is in it, as the node of a subgraph and its definition. Raises
    TooLargeError when the budget is spent."""
    inner = [dict(each) for each in group["nodes"]]
    links: list[dict[str, Any]] = []

    def link(origin: Any, slot: int, target: Any, target_slot: int, kind: Any) -> int:
        links.append({
            "id": len(links), "origin_id": origin, "origin_slot": slot, "target_id": target,
            "target_slot": target_slot, "type": kind,
        })  # fmt: skip
        return len(links) - 1

    within = [each for each in group["links"] if None not in (each[0], each[2])]  # not from outside
    inside = {(each[2], each[3]): each for each in within}
    used = {(each[0], each[1]) for each in within}
    shown = {(_place(each[0]), each[1]) for each in group.get("external") or ()}
    waiting: list[dict[str, Any]] = list(node.get("inputs") or ())
    inputs: list[dict[str, Any]] = []
    for place, each in enumerate(inner):
        budget.spend()
        each["id"] = place
        slots = [dict(slot) for slot in each.get("inputs") or ()]
        for number, slot in enumerate(slots):
            budget.spend()
            origin = inside.get((place, number))
            if origin is not None:
                slot["link"] = link(origin[0], origin[1], place, number, slot.get("type"))
                continue
            slot["link"] = None
            given = _taken(waiting, slot, budget)
            if given is not None:
                slot["link"] = link(-10, len(inputs), place, number, slot.get("type"))
                inputs.append({"name": f"{place} {slot['name']}", "link": given.get("link")})
        each["inputs"] = slots
    places = [
        (place, slot)
        for place, each in enumerate(inner)
        for slot in range(len(each.get("outputs") or ()))
        if (place, slot) not in used or (place, slot) in shown
    ]
    for number, (place, slot) in enumerate(places):
        link(place, slot, -20, number, None)
    _spread(node.get("widgets_values"), inner)
    definition = {
        "nodes": inner,
        "links": links,
        "inputs": [{"name": slot["name"]} for slot in inputs],
    }
    return {**node, "inputs": inputs}, definition


def _place(node: Any) -> Any:
    """The place of a node that is named by it, or, in older files, written out."""
    return node.get("index") if isinstance(node, dict) else node


def _taken(
    waiting: list[dict[str, Any]], slot: dict[str, Any], budget: Budget
) -> dict[str, Any] | None:
    """The next outer slot that stands for an inner one; it is taken off the list."""
    name = slot.get("name")
    for number, outer in enumerate(waiting):
        budget.spend()
        if outer.get("type") == slot.get("type") and str(outer.get("name")).endswith(str(name)):
            return waiting.pop(number)
    return None


def _spread(values: Any, inner: list[dict[str, Any]]) -> None:
    """Give the group node's widgets to the nodes in it, in their order; where they are not as many
    as those have, the group's own stay."""
    own = [each.get("widgets_values") for each in inner]
    counts = [len(each) if isinstance(each, list) else 0 for each in own]
    if not isinstance(values, list) or len(values) != sum(counts):
        return
    rest = iter(values)
    for each, count in zip(inner, counts):
        if count:
            each["widgets_values"] = [next(rest) for _ in range(count)]
