"""A ComfyUI workflow as nodes and links, each value bounded where it is first read."""

from __future__ import annotations

import math
import time
from typing import Any

from ..errors import SettingError

Graph = dict[str, dict[str, Any]]
"""A prompt in the API's format: node id -> class_type, inputs and properties, each `bounded`."""
Link = tuple[str, int]

LARGEST_NUMBER = 2**64
"""Seeds end there."""
LONGEST_TEXT = 10_000
"""Characters of a widget; the rest of a longer one is not read."""
LONGEST_NAME = 200
"""Of a node's id and class."""


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


def bounded_value(value: Any) -> Any:
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


def node_of(kind: Any, inputs: dict[str, Any], properties: Any = None) -> dict[str, Any]:
    """A node of a Graph; properties are what the canvas keeps with a node, if anything."""
    properties = properties if isinstance(properties, dict) else {}
    return {
        "class_type": str(kind)[:LONGEST_NAME],
        "inputs": {name: bounded_value(value) for name, value in inputs.items()},
        "properties": {name: bounded_value(value) for name, value in properties.items()},
    }
