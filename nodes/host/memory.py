"""Lack of memory, in words for the person at the canvas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ...sd35_core.errors import is_out_of_memory


@contextmanager
def enough_memory(doing: str, advice: str) -> Iterator[None]:
    """Has an error for lack of memory say what it was for and what to do.

    It stays of its kind: by that the host knows that it has to unload its models.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        kind = MemoryError if isinstance(error, (MemoryError, OSError)) else type(error)
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        seen = f" ({asked[1]} more were asked for)" if asked else ""
        raise kind(f"Out of memory while {doing}{seen}. {advice}") from error
