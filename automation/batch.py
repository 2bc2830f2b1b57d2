"""Many jobs on one server or several: each done once, whatever is killed on the way.

A job's files get their names once they are whole, then its line in the manifest is written. Its
prompt id is made from the batch, the job and its inputs, so a driver that is started again finds
the prompts of the one before on the servers, and waits for them instead of queueing them twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from .answers import File, Result
from .errors import RefusedError, RunError, ServerError
from .files import Place
from .jobs import Job, Table
from .manifest import ASIDE, DONE, opened
from .outside import suffix_of
from .waiting import Waiting
from .workflow import Workflow

log = logging.getLogger("sd35.automation")

AT_ONCE = 2
"""Prompts a server: one is drawn while the next one waits there."""
ENTER_SECONDS = 5.0
"""How long the first servers wait for the others, which may have prompts from a killed driver."""


class Server(Protocol):
    """What a batch needs of a server: client.Client has it, and cluster.Worker."""

    url: str
    kind: str
    """Servers of one kind do the same with a job; one is asked for all when it failed."""
    host: str
    """For the manifest: the same, or where Ray has put it."""

    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, *error: Any) -> None: ...
    async def about(self) -> dict[str, Any]: ...
    async def known(self) -> set[str]: ...
    async def run(self, workflow: Workflow, *, prompt_id: str) -> Result: ...
    async def save(self, file: File, place: Place, name: str) -> str: ...


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
    with opened(folder, place) as manifest:
        waiting = Waiting(table.jobs(), manifest, again)
        entering = Entering(len(servers))

        def ended(status: str) -> None:
            counts[status] += 1
            done(status)

        lost: list[ServerError] = []
        async with together(_serve(s, waiting, place, ended, entering) for s in servers) as works:
            for work in asyncio.as_completed(works):
                error = await work
                if error is not None:
                    lost.append(error)
                if not waiting.unfinished():
                    break  # what is still starting, or never ends, is not needed
        if waiting.unfinished():
            raise ServerError(f"{lost[0]} The same command does the jobs that are left.")
    return counts


@asynccontextmanager
async def together(
    coroutines: Iterable[Coroutine[Any, Any, Any]],
) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Tasks that have all ended when the context is left."""
    tasks = [asyncio.create_task(each) for each in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Entering:
    """Servers begin together, or after ENTER_SECONDS without those that are still away."""

    def __init__(self, count: int):
        self.count, self.all = count, asyncio.Event()

    def entered(self) -> None:
        self.count -= 1
        if self.count <= 0:
            self.all.set()

    async def wait(self) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.all.wait(), ENTER_SECONDS)


async def _serve(
    server: Server,
    waiting: Waiting,
    place: Place,
    ended: Callable[[str], None],
    entering: Entering,
) -> ServerError | None:
    """Keep one server busy until there are no jobs; the error when it is gone."""
    try:
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(server)
                waiting.known.update(dict.fromkeys(await server.known(), server.url))
            finally:
                entering.entered()
            await entering.wait()
            about = (await server.about())["system"]
            versions = {"comfyui": about["comfyui_version"], "torch": about.get("pytorch_version")}
            waiting.kinds[server.url] = server.kind
            works = (_work(server, waiting, place, ended, versions) for _ in range(AT_ONCE))
            await asyncio.gather(*await stack.enter_async_context(together(works)))
    except ServerError as error:
        log.warning("%s", error)
        waiting.lose(server.url)
        return error
    return None


async def _work(
    server: Server,
    waiting: Waiting,
    place: Place,
    ended: Callable[[str], None],
    versions: dict[str, Any],
) -> None:
    """Do one job after the other. Raises ServerError when the server is gone."""
    while waiting.unfinished():
        job = waiting.next(server.url)
        if job is None:
            await asyncio.sleep(0.2)
            continue
        try:
            entry = await _do(server, waiting, job, place)
            if entry is None:
                continue
            await waiting.manifest.add(entry | {"host": server.host, "versions": versions})
        except BaseException:
            waiting.lose(server.url, job)
            raise
        waiting.done(job)
        ended(entry["status"])


async def _do(server: Server, waiting: Waiting, job: Job, place: Place) -> dict[str, Any] | None:
    """Run one job and save its files; its line for the manifest, or nothing when it is to be
    tried again or another server was sooner.

    `seconds` there are those from `started` on, with waiting, `drawing` those of the server.
    """
    start, attempt = time.time(), waiting.attempt(job)
    entry = {"job": job.id, "inputs": job.inputs(), "seed": job.seed, "tags": job.tags}
    entry |= {"attempts": attempt, "started": start}
    try:
        result = await server.run(job.workflow, prompt_id=waiting.prompt_id(job, attempt))
        if not waiting.claim(job, server.url):
            return None
        saved = []
        for number, file in enumerate(result.files):
            name = f"{job.id}{f'@{number}' if number else ''}{suffix_of(file.filename)}"
            saved.append({"name": name, "sha256": await server.save(file, place, name)})
    except (RunError, RefusedError) as error:
        failed = waiting.fail(job, server.url, str(error))
        if failed is None:
            return None
        made = {"status": ASIDE, "error": failed.error}
    else:
        texts = [text for texts in result.texts.values() for text in texts]
        made = {"status": DONE, "files": saved, "texts": texts, "drawing": result.seconds}
    return {**entry, **made, "seconds": round(time.time() - start, 3)}
