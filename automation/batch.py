"""Many jobs on one server or several: each done once, whatever is killed on the way.

A job's files get their names once they are whole, then its line in the manifest is written. Its
prompt id is made from the batch, the job and its inputs, so a driver that is started again finds
the prompts of the one before on the servers, and waits for them instead of queueing them twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from .client import File, Result
from .errors import RefusedError, RunError, ServerError
from .files import Place
from .jobs import Job, Table
from .manifest import ASIDE, DONE, Manifest, opened
from .workflow import Workflow

log = logging.getLogger("sd35.automation")

WINDOW = 1000
"""Jobs that are read ahead and grouped by what they load."""
TAKEN = 50
"""Jobs of a group that a server takes at once."""
ATTEMPTS = 3
AT_ONCE = 2
"""Prompts a server: one is drawn while the next one waits there."""


class Server(Protocol):
    """What a batch needs of a server: client.Client has it, and cluster.Worker."""

    url: str
    host: str
    """For the manifest: the same, or where Ray has put it."""

    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, *error: Any) -> None: ...
    async def about(self) -> dict[str, Any]: ...
    async def known(self) -> set[str]: ...
    async def run(self, workflow: Workflow, *, prompt_id: str) -> Result: ...
    async def save(self, file: File, place: Place, name: str) -> str: ...


class Waiting:
    """The jobs that are still to be done, for whichever server asks next."""

    def __init__(self, jobs: Iterator[Job], manifest: Manifest, again: bool):
        self.missing = (job for job in jobs if manifest.missing(job, again))
        self.manifest = manifest
        self.groups: dict[str, dict[str, deque[Job]]] = {}
        """Model files -> texts -> jobs."""
        self.taken: defaultdict[str, deque[Job]] = defaultdict(deque)
        self.adopted: defaultdict[str, deque[Job]] = defaultdict(deque)
        """Jobs that a server has from a driver that was killed."""
        self.known: dict[str, str] = {}
        """Prompt -> the server that has it."""
        self.files: dict[str, str] = {}
        """Server -> the model files that it has loaded."""
        self.active = 0
        """Jobs that a server has now; it may be lost, and they come back."""

    def left(self) -> bool:
        """Whether there are jobs that no server has yet."""
        self._read()
        return bool(self.groups or any(self.taken.values()) or any(self.adopted.values()))

    def prompt_id(self, job: Job, attempt: int) -> str:
        return str(uuid.uuid5(self.manifest.batch, f"{job.id} {job.inputs()} {attempt}"))

    def next(self, server: str) -> Job | None:
        """A job for a server: what it has already, what shares files and texts with its last one,
        what nobody has, or half of what the busiest one has taken."""
        self._read()
        if self.adopted[server]:
            return self.adopted[server].popleft()
        mine = self.taken[server]
        if not mine and self.groups:
            self._take(server)
        elif not mine:
            others = max(self.taken.values(), key=len)
            for _ in range((len(others) + 1) // 2):
                mine.appendleft(others.pop())
        return mine.popleft() if mine else None

    def _read(self) -> None:
        while not self.groups and (window := list(islice(self.missing, WINDOW))):
            for job in window:
                prompt = self.prompt_id(job, self.manifest.attempts(job) + 1)
                if prompt in self.known:
                    self.adopted[self.known[prompt]].append(job)
                else:
                    self._put(job)

    def _put(self, job: Job) -> None:
        files, texts = job.group()
        self.groups.setdefault(files, {}).setdefault(texts, deque()).append(job)

    def _take(self, server: str) -> None:
        files = self.files.get(server, "")
        if files not in self.groups:
            loaded = list(self.files.values())
            files = self.files[server] = min(self.groups, key=loaded.count)
        by_text = self.groups[files]
        texts, jobs = next(iter(by_text.items()))
        while jobs and len(self.taken[server]) < TAKEN:
            self.taken[server].append(jobs.popleft())
        if not jobs:
            del by_text[texts]
        if not by_text:
            del self.groups[files]

    def give_back(self, server: str, *jobs: Job) -> None:
        """Jobs whose server is gone, and what only that one had."""
        for lost in (*jobs, *self.taken.pop(server, ()), *self.adopted.pop(server, ())):
            self._put(lost)


async def run(
    table: Table,
    servers: Sequence[Server],
    folder: Path,
    again: bool = False,
    done: Callable[[str], None] = lambda status: None,
    pictures: str = "",
) -> dict[str, int]:
    """Do what is missing of a batch; how many jobs ended how.

    done: is told the status of each job when it ends. pictures: where they go, if not to `folder`,
    which has the manifest. Raises AutomationError when nothing can go on: no server is left, the
    disk is full, a row can't be used. What was done is kept.
    """
    counts = {DONE: 0, ASIDE: 0}
    place = Place(pictures or str(folder))
    async with AsyncExitStack() as stack:
        manifest = stack.enter_context(opened(folder, place))
        waiting = Waiting(table.jobs(), manifest, again)
        inside: list[Server] = []

        @stack.push_async_callback
        async def leave() -> None:
            await asyncio.gather(*(server.__aexit__(None, None, None) for server in inside))

        async def enter(server: Server) -> None:
            await server.__aenter__()
            inside.append(server)
            waiting.known.update(dict.fromkeys(await server.known(), server.url))

        def ended(status: str) -> None:
            counts[status] += 1
            done(status)

        entered = await asyncio.gather(*map(enter, servers), return_exceptions=True)
        for error in filter(None, entered):
            raise error
        works = [asyncio.create_task(_serve(each, waiting, place, ended)) for each in servers]
        try:
            lost: list[ServerError] = []
            for work in asyncio.as_completed(works):
                error = await work
                if error is not None:
                    lost.append(error)
                elif not waiting.active and not waiting.left():
                    break  # what is still starting is not needed
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
        if waiting.left():
            raise ServerError(f"{lost[0]} The same command does the jobs that are left.")
    return counts


async def _serve(
    server: Server, waiting: Waiting, place: Place, ended: Callable[[str], None]
) -> ServerError | None:
    """Keep one server busy until there are no jobs; the error when it is gone."""
    try:
        about = (await server.about())["system"]
    except ServerError as error:
        log.warning("%s", error)
        waiting.give_back(server.url)
        return error
    versions = {"comfyui": about["comfyui_version"], "torch": about.get("pytorch_version")}

    async def work() -> ServerError | None:
        while (job := waiting.next(server.url)) is not None or waiting.active:
            if job is None:
                await asyncio.sleep(0.2)
                continue
            waiting.active += 1
            try:
                entry = await _do(server, waiting, job, place)
                await waiting.manifest.add(entry | {"host": server.host, "versions": versions})
                ended(entry["status"])
            except ServerError as error:
                log.warning("%s", error)
                waiting.give_back(server.url, job)
                return error
            finally:
                waiting.active -= 1
        return None

    return next(filter(None, await asyncio.gather(*(work() for _ in range(AT_ONCE)))), None)


async def _do(server: Server, waiting: Waiting, job: Job, place: Place) -> dict[str, Any]:
    """Run one job, up to three times, and save its files; its line for the manifest.

    `seconds` there are those from `started` on, with waiting, `drawing` those of the server.
    """
    start, error = time.time(), ""
    entry = {"job": job.id, "inputs": job.inputs(), "seed": job.seed, "tags": job.tags}
    before = waiting.manifest.attempts(job)
    for attempt in range(before + 1, before + ATTEMPTS + 1):
        try:
            result = await server.run(job.workflow, prompt_id=waiting.prompt_id(job, attempt))
            saved = []
            for number, file in enumerate(result.files):
                suffix = PurePosixPath(file.filename).suffix
                name = f"{job.id}{f'_{number}' if number else ''}{suffix}"
                saved.append({"name": name, "sha256": await server.save(file, place, name)})
        except (RunError, RefusedError) as failed:
            error = str(failed)
            continue
        texts = [text for texts in result.texts.values() for text in texts]
        made = {"status": DONE, "files": saved, "texts": texts, "attempts": attempt}
        made["drawing"] = result.seconds
        return {**entry, **made, "started": start, "seconds": round(time.time() - start, 3)}
    aside = {"status": ASIDE, "error": error, "attempts": attempt}
    return {**entry, **aside, "started": start, "seconds": round(time.time() - start, 3)}
