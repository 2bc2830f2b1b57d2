"""Workflows as people share them: JSON of the canvas or the API, or a picture with one inside."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import SettingError
from .graph import LONGEST_NAME, Budget, Graph, TooLargeError, node_of
from .group_nodes import as_subgraph, group_of
from .known_nodes import THEIR_WIDGETS, WIDGETS
from .own_nodes import LOADER

SEED_MODES = {"fixed", "increment", "decrement", "randomize"}
"""What stands after a seed, without a name."""
MUTED, BYPASSED = 2, 4
INPUTS, OUTPUTS = "-10", "-20"
"""Ids of a subgraph's two ends, among its nodes."""
MOST_NODES, MOST_LINKS = 20_000, 200_000
DEEPEST = 16
"""Subgraphs in one another."""
PNG, WEBP = b"\x89PNG\r\n\x1a\n", b"WEBP"
TEXTS = ("prompt", "workflow")
"""Names under which ComfyUI puts them into a picture, the one that was run first."""
LARGEST_TEXT = 2**24
"""Bytes of a workflow in a picture."""


def read_workflow(data: bytes) -> dict[str, Any]:
    """The workflow in a file: JSON, or a PNG or WebP that ComfyUI saved. Raises SettingError."""
    if data.startswith(PNG):
        return _first(_png_texts(data))
    if data[8:12] == WEBP:
        return _first(_webp_texts(data))
    return parsed(data)


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


def _first(texts: dict[str, bytes]) -> dict[str, Any]:
    """The workflow among a picture's texts."""
    for name in TEXTS:
        if name in texts:
            return parsed(texts[name])
    raise SettingError(
        "There is no workflow in this picture. Other programs, and sites that show pictures, leave "
        "it out; take the file as ComfyUI saved it."
    )


def _png_texts(data: bytes) -> dict[str, bytes]:
    """The first text of each name that is looked for; packed ones of other names stay packed."""
    found: dict[str, bytes] = {}
    place = len(PNG)
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            name, _, text = data[place + 8 : place + 8 + length].partition(b"\0")
            key = name.decode("latin-1")
            if key in TEXTS and key not in found:
                found[key] = _png_text(kind, text)
        place += 12 + length
    return found


def _png_text(kind: bytes, text: bytes) -> bytes:
    """What stands after the name in one of PNG's three kinds of text."""
    if kind == b"tEXt":
        return text
    if kind == b"zTXt":
        return _inflated(text[1:])
    plain = text[2:].split(b"\0", 2)[-1]
    return _inflated(plain) if text[:1] == b"\1" else plain


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, LARGEST_TEXT)
    except zlib.error:
        return b""


def _webp_texts(data: bytes) -> dict[str, bytes]:
    """ComfyUI keeps them in EXIF, as `prompt:{...}` and `workflow:{...}`, each ended by a zero."""
    texts = re.finditer(rb"(prompt|workflow):(\{[^\0]*)", data)
    return {match[1].decode(): match[2] for match in texts}


def api_graph(workflow: dict[str, Any], budget: Budget | None = None) -> Graph:
    """The API's form of a workflow in either format; nodes without a class are left out.

    Raises SettingError for something else, TooLargeError for what takes too long.
    """
    budget = budget or Budget()
    if is_canvas(workflow):
        with sound():
            return Canvas(workflow, budget).graph
    graph = workflow.get("prompt", workflow)
    nodes = graph.items() if isinstance(graph, dict) else ()
    found = {key: node_of(n["class_type"], n["inputs"]) for key, n in nodes if is_node(n)}
    if not found:
        raise SettingError(
            "This is no ComfyUI workflow: neither the canvas' format (nodes, links) nor the API's "
            "(class_type, inputs). Save one in ComfyUI with Workflow > Save or > Export (API)."
        )
    return found


def is_canvas(workflow: dict[str, Any]) -> bool:
    """Whether it is in the canvas' format, not in the API's."""
    return "nodes" in workflow and "links" in workflow


@contextmanager
def sound() -> Iterator[None]:
    """What damaged nodes and links of a canvas lead to becomes a SettingError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SettingError(
            f"The workflow's nodes or links are damaged ({error!r}). Open it in ComfyUI and "
            "save it again."
        ) from error


def is_node(node: Any) -> bool:
    """Whether it is a node of the API's format; an export has others where a pack was missing."""
    return (
        isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
    )


@dataclass
class Scope:
    """The nodes of a canvas, or of one instance of a subgraph on it."""

    prefix: str
    nodes: dict[str, dict[str, Any]]
    links: dict[Any, tuple[str, int, Any]]
    """Number -> the node that it comes from, its slot, and the type."""
    definition: dict[str, Any]
    """What the file says of it."""
    outer: tuple[Scope, dict[str, Any]] | None = None
    """Where it stands, and as which node."""
    inner: dict[str, Scope] = field(default_factory=dict)
    """Of the subgraphs in it, by their node."""
    depth: int = 0


class Canvas:
    """A canvas file with its subgraphs put in their places, as the host names them ("12:5")."""

    def __init__(self, workflow: dict[str, Any], budget: Budget):
        self.budget, self.graph = budget, {}
        subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or ()
        self.definitions = {each["id"]: each for each in subgraphs}
        self.groups = (workflow.get("extra") or {}).get("groupNodes") or {}
        self.count, self.links = 0, 0
        self.scopes = list(self._scopes(self._scope("", workflow)))
        for scope in self.scopes:
            for key, node in scope.nodes.items():
                if key not in scope.inner and node.get("mode") not in (MUTED, BYPASSED):
                    self._add(scope, key, node)

    def _scope(self, prefix: str, found: dict[str, Any], **more: Any) -> Scope:
        nodes = {str(node["id"])[:LONGEST_NAME]: node for node in found["nodes"]}
        self.count += len(nodes)
        self.links += len(found["links"])
        if self.count > MOST_NODES or self.links > MOST_LINKS:
            raise TooLargeError(
                f"The workflow is too large to check: with its subgraphs it has more than "
                f"{MOST_NODES:,} nodes or {MOST_LINKS:,} links. It can be queued all the same."
            )
        links = {}
        for link in found["links"]:
            if isinstance(link, dict):
                origin = link["origin_id"], link["origin_slot"], link.get("type")
                links[link["id"]] = (str(origin[0]), *origin[1:])
            elif isinstance(link, list):
                links[link[0]] = str(link[1]), link[2], link[5]
        return Scope(prefix, nodes, links, found, **more)

    def _scopes(self, scope: Scope) -> Iterator[Scope]:
        """A scope and those in it that are not muted or bypassed."""
        yield scope
        for key, node in scope.nodes.items():
            self.budget.spend()
            if node.get("mode") in (MUTED, BYPASSED):
                continue
            definition = self.definitions.get(node["type"])
            group = group_of(node, self.groups)
            if group is not None:
                node, definition = as_subgraph(node, group, self.budget)
            if definition is None:
                continue
            if scope.depth == DEEPEST:
                raise SettingError(f"The workflow's subgraphs stand more than {DEEPEST} deep.")
            inner = self._scope(
                f"{scope.prefix}{key}:"[-LONGEST_NAME:],
                definition,
                outer=(scope, node),
                depth=scope.depth + 1,
            )
            scope.inner[key] = inner
            yield from self._scopes(inner)

    def _add(self, scope: Scope, key: str, node: dict[str, Any]) -> None:
        self.budget.spend()
        if node["type"] in ("PrimitiveNode", "SetNode", "GetNode"):
            return  # what they pass on is looked up where it is used
        inputs = widgets_of(node)
        for slot in node.get("inputs") or ():
            if slot.get("link") is not None:
                value = self._source(scope, slot["link"])
                if value is not None:
                    inputs[slot["name"]] = value
        self.graph[scope.prefix + key] = node_of(node["type"], inputs, node.get("properties"))

    def _source(self, scope: Scope, number: Any) -> Any:
        """What a link brings: [node, slot], or a widget's value from another node."""
        seen: set[tuple[int, Any]] = set()
        while (id(scope), number) not in seen:
            self.budget.spend()
            seen.add((id(scope), number))
            link = scope.links.get(number)
            if link is None:
                return None
            key, slot, kind = link
            if key == INPUTS:
                if scope.outer is None:
                    return None
                name = scope.definition["inputs"][slot]["name"]
                outer, instance = scope.outer
                given = _slot(instance, name)
                if given is None or given.get("link") is None:
                    return promoted(instance, scope.definition).get(name)
                scope, number = outer, given["link"]
                continue
            node = scope.nodes.get(key)
            if node is None or node.get("mode") == MUTED:
                return None
            if node.get("mode") == BYPASSED:
                number = _passed(node, slot, kind)
            elif key in scope.inner:
                scope = scope.inner[key]
                number = _leaving(scope.definition, slot)
            elif node["type"] == "PrimitiveNode":
                return next(iter(node.get("widgets_values") or ()), None)
            elif node["type"] == "SetNode":
                number = _first_link(node)
            elif node["type"] == "GetNode":
                setter = self._setter(scope, node)
                if setter is None:
                    return None
                scope, number = setter
            else:
                return [scope.prefix + key, slot]
        return None

    def _setter(self, scope: Scope, getter: dict[str, Any]) -> tuple[Scope, Any] | None:
        """The link that a Set node of the same name takes, here or further out."""
        name = next(iter(getter.get("widgets_values") or ()), None)
        while True:
            for node in scope.nodes.values():
                self.budget.spend()
                values = node.get("widgets_values") or ()
                if node["type"] == "SetNode" and next(iter(values), None) == name:
                    return scope, _first_link(node)
            if scope.outer is None:
                return None
            scope = scope.outer[0]


def _slot(node: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((slot for slot in node.get("inputs") or () if slot.get("name") == name), None)


def _first_link(node: dict[str, Any]) -> Any:
    return next((slot.get("link") for slot in node.get("inputs") or ()), None)


def _passed(node: dict[str, Any], slot: int, kind: Any) -> Any:
    """The link that a bypassed node hands on for one of its outputs."""
    links = [each.get("link") for each in node.get("inputs") or () if each.get("type") == kind]
    links = [link for link in links if link is not None]
    return links[min(slot, len(links) - 1)] if links else None


def _leaving(definition: dict[str, Any], slot: int) -> Any:
    """The link in a subgraph that leads to one of its outputs."""
    ends = (link for link in definition["links"] if str(link["target_id"]) == OUTPUTS)
    return next((link["id"] for link in ends if link["target_slot"] == slot), None)


def promoted(instance: dict[str, Any], definition: dict[str, Any]) -> dict[str, Any]:
    """The widgets that a subgraph shows on its node, by its inputs' names."""
    plain = {slot["name"] for slot in instance.get("inputs") or () if "widget" not in slot}
    names = [each["name"] for each in definition.get("inputs") or ()]
    return _named([name for name in names if name not in plain], instance.get("widgets_values"))


def widgets_of(node: dict[str, Any]) -> dict[str, Any]:
    """A node's widgets by name: as the file names them, else in the order that is known."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return dict(values)
    named = [slot["name"] for slot in node.get("inputs") or () if "widget" in slot]
    order = WIDGETS.get(node["type"], ())
    if node["type"] == LOADER and "clip_l" not in named:
        order = THEIR_WIDGETS
    return _named(named if set(order) <= set(named) else list(order), values)


def _named(names: list[str], values: Any) -> dict[str, Any]:
    found, rest = {}, iter(values if isinstance(values, list) else ())
    for name in names:
        value = next(rest, None)
        if isinstance(value, str) and value in SEED_MODES:
            value = next(rest, None)
        found[name] = value
    return found
