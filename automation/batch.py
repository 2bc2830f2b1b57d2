"""Many jobs on one server or several: each done once, whatever is killed on the way.

A job's files get their names once they are whole, then its line in the manifest is written. Its
prompt id is made from the batch, the job and its inputs, so a driver that is started again finds
the prompts of the one before on the servers, and waits for them instead of queueing them twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from . import files
from .client import Client
from .errors import RefusedError, RunError, ServerError
from .jobs import Job, Table
from .manifest import ASIDE, DONE, Manifest, opened

log = logging.getLogger("sd35.automation")

WINDOW = 1000
"""Jobs that are read ahead and sorted by what they load."""
ATTEMPTS = 3
AT_ONCE = 2
"""Prompts a server: one is drawn while the next one waits there."""


class Waiting:
    """The jobs that are still to be done, for whichever server asks next."""

    def __init__(self, jobs: Iterator[Job], manifest: Manifest, again: bool):
        self.missing = (job for job in jobs if manifest.missing(job, again))
        self.manifest = manifest
        self.shared: deque[Job] = deque()
        self.owned: dict[str, deque[Job]] = {}
        self.known: dict[str, str] = {}
        """Prompt -> the server that has it already, from a driver that was killed."""
        self.active = 0
        """Jobs that a server has now; it may be lost, and they come back."""

    def prompt_id(self, job: Job, attempt: int) -> str:
        return str(uuid.uuid5(self.manifest.batch, f"{job.id} {job.inputs()} {attempt}"))

    def next(self, server: str) -> Job | None:
        """A job for a server: first those that it has already."""
        owned = self.owned.get(server)
        if owned:
            return owned.popleft()
        while not self.shared and (window := list(islice(self.missing, WINDOW))):
            for job in sorted(window, key=Job.group):
                owner = self.known.get(self.prompt_id(job, 1))
                (self.owned.setdefault(owner, deque()) if owner else self.shared).append(job)
            if self.owned.get(server):
                return self.owned[server].popleft()
        return self.shared.popleft() if self.shared else None

    def give_back(self, job: Job, server: str) -> None:
        """A job whose server is gone, and what only that one had."""
        self.shared.appendleft(job)
        self.shared.extend(self.owned.pop(server, ()))


async def run(
    table: Table,
    clients: list[Client],
    folder: Path,
    again: bool = False,
    done: Callable[[str], None] = lambda status: None,
) -> dict[str, int]:
    """Do what is missing of a batch; how many jobs ended how.

    done: is told the status of each job when it ends. Raises AutomationError when nothing can go
    on: no server is left, the disk is full, a row can't be used. What was done is kept.
    """
    counts = {DONE: 0, ASIDE: 0}
    with opened(folder) as manifest:
        waiting = Waiting(table.jobs(), manifest, again)
        entered: list[Client] = []
        try:
            for client in clients:
                await client.__aenter__()
                entered.append(client)
                waiting.known.update(dict.fromkeys(await client.known(), client.url))

            def ended(status: str) -> None:
                counts[status] += 1
                done(status)

            tasks = [
                asyncio.create_task(_work(client, waiting, ended))
                for client in clients
                for _ in range(AT_ONCE)
            ]
            try:
                lost = [error for error in await asyncio.gather(*tasks) if error]
            finally:
                for task in tasks:
                    task.cancel()
            if waiting.shared:
                raise ServerError(f"{lost[0]} The same command does the jobs that are left.")
        finally:
            for client in entered:
                await client.__aexit__()
    return counts


async def _work(
    client: Client, waiting: Waiting, ended: Callable[[str], None]
) -> ServerError | None:
    """Do jobs on one server until there are none; the error when it is gone."""
    about = (await client.about())["system"]
    versions = {"comfyui": about["comfyui_version"], "torch": about.get("pytorch_version")}
    while True:
        job = waiting.next(client.url)
        if job is None:
            if not waiting.active:
                return None
            await asyncio.sleep(0.2)
            continue
        waiting.active += 1
        try:
            entry = await _do(client, waiting, job)
        except ServerError as error:
            log.warning("%s", error)
            waiting.give_back(job, client.url)
            return error
        finally:
            waiting.active -= 1
        entry |= {"host": client.url, "versions": versions}
        await asyncio.to_thread(waiting.manifest.add, entry)
        ended(entry["status"])


async def _do(client: Client, waiting: Waiting, job: Job) -> dict[str, Any]:
    """Run one job, up to three times, and save its files; its line for the manifest."""
    start, errors = time.time(), []
    entry = {"job": job.id, "inputs": job.inputs(), "seed": job.seed, "tags": job.tags}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            result = await client.run(job.workflow, prompt_id=waiting.prompt_id(job, attempt))
        except (RunError, RefusedError) as error:
            errors.append(str(error))
            continue
        saved = []
        for number, file in enumerate(result.files):
            data = await client.fetch(file)
            suffix = PurePosixPath(file.filename).suffix
            name = f"{job.id}{f'_{number}' if number else ''}{suffix}"
            await asyncio.to_thread(files.write, waiting.manifest.folder / name, data)
            saved.append({"name": name, "sha256": hashlib.sha256(data).hexdigest()})
        texts = [text for texts in result.texts.values() for text in texts]
        made = {"status": DONE, "files": saved, "texts": texts, "attempts": attempt}
        return {**entry, **made, "started": start, "seconds": round(time.time() - start, 3)}
    aside = {"status": ASIDE, "error": errors[-1], "attempts": len(errors)}
    return {**entry, **aside, "started": start, "seconds": round(time.time() - start, 3)}
