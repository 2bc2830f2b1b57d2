"""Where pictures go: a folder or an object store, each file whole or not there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sd35_core import whole_file

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

    def sweep(self) -> None:
        """Remove what killed batches left in a folder."""
        if not self.remote:
            whole_file.sweep(self.address)

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
    """Write a file; one of that name is replaced. Raises AutomationError."""
    with _worded():
        whole_file.write_whole(path, data, replace=True)


def write_new(path: Path, data: bytes) -> Path:
    """Write a file, with a number where one of its name is; its path. Raises AutomationError."""
    with _worded():
        return whole_file.write_new(path, data)


@contextmanager
def _worded() -> Iterator[None]:
    try:
        yield
    except whole_file.WriteError as error:
        raise AutomationError(str(error)) from error
