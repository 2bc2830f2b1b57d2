"""Text from outside (file names, keys, widgets, servers) made fit for a log and a canvas."""

from __future__ import annotations

import re

LONGEST = 2000
"""Characters of a line; the middle of a longer one is left out."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, changes of direction and halves of characters."""


def printable(text: object, most: int = LONGEST) -> str:
    """One line that can't start another, colour a terminal or break an encoder."""
    line = _UNPRINTABLE.sub("\ufffd", str(text))
    if len(line) <= most:
        return line
    half = (most - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"
