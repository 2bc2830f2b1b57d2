"""A workflow's links, walked upwards: what is connected to an input, and what a widget says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .graph import Budget, Graph, Link
from .known_nodes import SAMPLER_NODES
from .own_nodes import ALIAS, CHECK, CHECK_OUTPUTS, LOADER


class Links:
    """Walks up the links of a workflow. Raises TooLargeError when the budget is spent."""

    def __init__(self, graph: Graph, budget: Budget | None = None):
        self.graph, self.budget = graph, budget or Budget()

    def kind(self, key: str) -> str:
        kind = self.graph[key]["class_type"] if key in self.graph else ""
        return LOADER if kind == ALIAS else kind

    def link(self, key: str, name: str) -> Link | None:
        """What is connected to an input, through nodes that only pass it on."""
        seen = set()
        value = self.graph[key]["inputs"].get(name)
        while isinstance(value, list) and str(value[0]) in self.graph:
            self.budget.spend()
            source, slot = str(value[0]), value[1]
            if self.kind(source) == CHECK and 0 <= slot < len(CHECK_OUTPUTS):
                passed = CHECK_OUTPUTS[slot]
            elif self.kind(source) in ("Reroute", "ReroutePrimitive"):
                passed = next(iter(self.graph[source]["inputs"]), "")
            else:
                return source, slot
            if (source, slot) in seen:
                return None
            seen.add((source, slot))
            value = self.graph[source]["inputs"].get(passed)
        return None

    def value(self, key: str, *names: str) -> Any:
        """The widget's value; through a link, that of a node with a single `value`."""
        for name in names:
            value = self.graph[key]["inputs"].get(name)
            if isinstance(value, list):
                link = self.link(key, name)
                value = self.graph[link[0]]["inputs"].get("value") if link else None
            if value is not None and not isinstance(value, list):
                return value
        return None

    def text(self, key: str, *names: str) -> str | None:
        """A widget's text."""
        value = self.value(key, *names)
        return value if isinstance(value, str) else None

    def number(self, key: str, *names: str) -> float | None:
        """A widget's number."""
        value = self.value(key, *names)
        return float(value) if isinstance(value, (int, float)) else None

    def whole(self, key: str, name: str) -> int | None:
        number = self.number(key, name)
        return None if number is None else int(number)

    def chain(self, key: str, *names: str) -> Iterator[str]:
        """Nodes upwards along the first of the named inputs that is connected."""
        seen: set[str] = set()
        while key not in seen:
            seen.add(key)
            link = next((found for name in names if (found := self.link(key, name))), None)
            if link is None:
                return
            key = link[0]
            yield key


def leading_to(graph: Graph, key: str | None) -> set[str]:
    """The samplers that a node stands before; without any, those with the same model.

    A second sampler after the first is not counted.
    """
    if key not in graph:
        return set()
    followers: dict[str, list[str]] = {}
    for name, node in graph.items():
        for value in node["inputs"].values():
            if isinstance(value, list):
                followers.setdefault(str(value[0]), []).append(name)
    found, seen, waiting = set(), {key}, [key]
    while waiting:
        for name in followers.get(waiting.pop(), ()):
            if graph[name]["class_type"] in SAMPLER_NODES:
                found.add(name)
            elif name not in seen:
                seen.add(name)
                waiting.append(name)
    if found:
        return found
    links = Links(graph)
    source = links.link(key, "model")
    samplers = (k for k, node in graph.items() if node["class_type"] in SAMPLER_NODES)
    return {s for s in samplers if source and links.link(s, "model") == source}
