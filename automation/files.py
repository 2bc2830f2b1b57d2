"""Files that are whole or not there: written under another name first, then renamed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import AutomationError


@dataclass(frozen=True)
class Place:
    """Where pictures go: a folder, or an address for fsspec as s3://bucket/folder.

    `remote`: every node of a cluster can write there itself.
    """

    address: str

    @property
    def remote(self) -> bool:
        return "://" in self.address

    def write(self, name: str, data: bytes) -> str:
        """Write a file, whole or not at all; its sha256. Raises AutomationError."""
        if self.remote:
            _write_remote(f"{self.address.rstrip('/')}/{name}", data)
        else:
            write(Path(self.address) / name, data)
        return hashlib.sha256(data).hexdigest()

    def has(self, name: str) -> bool:
        """Whether a file is there; of a remote place that is taken on trust, to ask costs time."""
        return self.remote or (Path(self.address) / name).is_file()


def _write_remote(address: str, data: bytes) -> None:
    """One put, which object stores show when it is whole."""
    try:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        system, path = fsspec.url_to_fs(address)
        if isinstance(system, LocalFileSystem):
            return write(Path(path), data)
        return system.pipe_file(path, data)
    except AutomationError:
        raise
    except Exception as error:  # each kind of storage has its own errors
        raise AutomationError(
            f"{address} could not be written ({len(data) / 1e6:.1f} MB): {error!r}. Is the address "
            "right, its package installed (s3fs, gcsfs, adlfs), and are you allowed to write?"
        ) from error


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
