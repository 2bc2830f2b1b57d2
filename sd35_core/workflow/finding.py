"""What is said of a set-up: a sentence, how grave it is, and the rule that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..words import printable
from .setup import Setup

Severity = Literal["error", "warning", "note"]
"""error: the run fails or the picture is spoiled. warning: something does nothing, or looks bad.
note: worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One sentence or two for the person at the canvas; `rule` names it for programs."""

    severity: Severity
    rule: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", printable(self.text))

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


Rule = Callable[[Setup], Iterator[Finding]]


def error(rule: str, text: str) -> Finding:
    return Finding("error", rule, text)


def warning(rule: str, text: str) -> Finding:
    return Finding("warning", rule, text)


def note(rule: str, text: str) -> Finding:
    return Finding("note", rule, text)
