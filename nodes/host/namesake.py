"""RES4LYF, another pack, has a node SD35Loader too: with both installed, both packs' workflows run.

ComfyUI keeps one class for an id. RES4LYF's keeps it then, and ours is there under `ALIAS` alone;
a queued node with our inputs is taken for that. Without RES4LYF its node's inputs are read as ours.
"""

from __future__ import annotations

from typing import Any

from server import PromptServer

import nodes

from ...sd35_core.workflow.known_nodes import as_ours, is_theirs
from ...sd35_core.workflow.own_nodes import ALIAS, LOADER
from .report import log


def is_taken(own: type) -> bool:
    """Whether another pack's class has the id of our loader."""
    found = nodes.NODE_CLASS_MAPPINGS.get(LOADER)
    return found is not None and not issubclass(found, own)


def listed_first(own: list[Any], loader: type) -> list[Any]:
    """The pack's nodes, without the loader where another pack has its id already."""
    if not is_taken(loader):
        return own
    log.warning(
        "Another pack (%s) has a node %s too. It keeps that name; ours is %s here, and workflows "
        "with ours are read as such.", nodes.NODE_CLASS_MAPPINGS[LOADER].__module__, LOADER, ALIAS,
    )  # fmt: skip
    return [node for node in own if node is not loader]


def serve_namesake(loader: type) -> None:
    """Have the server put every queued loader to the pack that it is of."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(lambda data: told_apart(data, is_taken(loader)))


def told_apart(data: Any, taken: bool) -> Any:
    """A queued prompt in which each loader has the id and the inputs of the class that runs it."""
    prompt = data.get("prompt") if isinstance(data, dict) else None
    for node in prompt.values() if isinstance(prompt, dict) else ():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        if not isinstance(inputs, dict) or node.get("class_type") != LOADER:
            continue
        if taken and not is_theirs(inputs):
            node["class_type"] = ALIAS
        elif is_theirs(inputs) and not taken:
            node["inputs"] = as_ours(inputs)
            log.warning("A node SD35Loader of RES4LYF was queued; SD3.5 Loader runs in its place.")
    return data
