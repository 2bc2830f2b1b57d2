"""Files that are whole or not there: written under another name first, then renamed."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import AutomationError


def write(path: Path, data: bytes) -> None:
    """Write a file; one of that name is replaced. Raises AutomationError when the system refuses.

    Killed, it leaves a file whose name ends in .partial, never half of one under `path`.
    """
    partial: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(".partial", f".{path.name}.", path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            with suppress(OSError):
                os.unlink(partial)
        raise AutomationError(
            f"{path} could not be written ({len(data) / 1e6:.1f} MB): {error}. Make room on the "
            "disk or choose another folder."
        ) from error


def free(path: Path) -> Path:
    """The path, or with a number where a file of that name is already."""
    number = 2
    found = path
    while found.exists():
        found = path.with_stem(f"{path.stem}_{number}")
        number += 1
    return found


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
