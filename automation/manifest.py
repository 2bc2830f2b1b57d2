"""What became of each job of a batch: a line of JSON each, in the folder of its pictures."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import files, outside
from .errors import AutomationError
from .files import Place
from .jobs import Job

DONE, ASIDE = "done", "set aside"
LINE: dict[str, outside.Types] = {
    "job": str, "status": str, "inputs": str, "attempts": int, "files": list,
}  # fmt: skip
"""What this reads of a line."""
LARGEST = 2**24
"""Bytes of a line: texts of reports are in it."""


class Manifest:
    """manifest.jsonl of a folder: lines are added, whole or not at all, and the last one counts.

    `batch` is the folder's own id, from which its prompts' ids are made.
    """

    def __init__(self, folder: Path, pictures: Place):
        self.folder, self.path = folder, folder / "manifest.jsonl"
        self.pictures = pictures
        self.seen: dict[str, tuple[str, str, list[str], int]] = {}
        """Job -> (status, hash of its inputs, its files, attempts)."""
        self._lines: list[bytes] = []
        self._writing = asyncio.Lock()
        self.batch = self._batch()
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise AutomationError(f"{self.path} is no file of a batch. Use another folder.")
        if self.path.exists():
            self._read()

    def _batch(self) -> uuid.UUID:
        path = self.folder / "batch.json"
        if not path.exists():
            files.write(path, json.dumps({"batch": str(uuid.uuid4())}).encode())
        try:
            return uuid.UUID(outside.fields(outside.read(path), {"batch": str})["batch"])
        except (OSError, ValueError) as error:
            raise AutomationError(f"{path} is damaged ({error}). Use another folder.") from error

    def _read(self) -> None:
        """Take up the lines; one that was cut off by the end of a run is taken away."""
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LARGEST), b""), 1):
                if not line.endswith(b"\n") and len(line) < LARGEST:
                    break
                try:
                    self._take_up(checked(outside.parsed(line)))
                except ValueError as error:
                    raise AutomationError(
                        f"{self.path} is damaged in line {number}: {error}. Repair that line or "
                        "take it out; its job is then done again."
                    ) from error
                whole += len(line)
        if whole != self.path.stat().st_size:
            os.truncate(self.path, whole)

    def missing(self, job: Job, again: bool = False) -> bool:
        """Whether a job has still to be done; with `again` those that were set aside as well."""
        status, inputs, names, _ = self.seen.get(job.id, ("", "", (), 0))
        if inputs != job.inputs() or not all(map(self.pictures.has, names)):
            return True
        return not (status == DONE or (status == ASIDE and not again))

    def attempts(self, job: Job) -> int:
        """How often a job was tried and failed before it was set aside, with the same inputs."""
        status, inputs, _, attempts = self.seen.get(job.id, ("", "", (), 0))
        return attempts if status == ASIDE and inputs == job.inputs() else 0

    def _take_up(self, entry: dict[str, Any]) -> None:
        names = [file["name"] for file in entry.get("files", ())]
        self.seen[entry["job"]] = entry["status"], entry["inputs"], names, entry["attempts"]

    async def add(self, entry: dict[str, Any]) -> None:
        """Write down what became of a job; on the disk when this returns. Entries that come while
        the disk is busy are written together."""
        text = json.dumps(entry, ensure_ascii=False, sort_keys=True)
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        self._lines.append(line)
        async with self._writing:
            if any(line is waiting for waiting in self._lines):
                lines, self._lines = self._lines, []
                await asyncio.to_thread(self._append, b"".join(lines))
        self._take_up(entry)

    def _append(self, data: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                before = file.tell()
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, before)
                    raise
        except OSError as error:
            raise AutomationError(
                f"{self.path} could not be written: {error}. Make room on the disk; the same "
                "command goes on from here."
            ) from error


def checked(entry: Any) -> dict[str, Any]:
    """A line of a manifest. Raises ValueError that names what is wrong in it."""
    outside.fields(entry, LINE, LINE.keys() - {"files"})
    if entry["status"] not in (DONE, ASIDE):
        raise ValueError(f"'status' is {outside.shown(entry['status'])}")
    if not 0 < entry["attempts"] < 10**9:
        raise ValueError(f"'attempts' is {outside.shown(entry['attempts'])}")
    for file in entry.get("files", ()):
        name = outside.fields(file, {"name": str, "sha256": str})["name"]
        if not outside.is_file_name(name):
            raise ValueError(f"a file is named {outside.shown(name)}, which is no name of one")
    return entry


@contextmanager
def opened(folder: Path, pictures: Place | None = None) -> Iterator[Manifest]:
    """The manifest of a folder, its pictures there or elsewhere, for one batch at a time.

    Raises AutomationError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            place = pictures or Place(str(folder))
            place.sweep()
            yield Manifest(folder, place)
    except Timeout as error:
        raise AutomationError(
            f"Another batch is writing into {folder}. Wait for it, or use another folder."
        ) from error
    except OSError as error:
        raise AutomationError(f"{folder} can't be used: {error}.") from error
