"""The jobs of a batch that are still to be done, and who does which."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from .jobs import Job
from .manifest import Manifest

WINDOW = 1000
"""Jobs that are read ahead and grouped by what they load."""
TAKEN = 50
"""Jobs of a group that a server takes at once."""
ATTEMPTS = 3
"""How often a job is tried, at least, before it is set aside; and once on each server."""
LATE_SECONDS, LATE_TIMES = 60.0, 10
"""A job is late after so long, and after so many times the slowest one that was done. An idle
server then takes it too: the one that has it may never end."""


@dataclass
class Failed:
    """A job that failed, with its reasons."""

    job: Job
    since: float
    attempts: int = 0
    kinds: set[str] = field(default_factory=set)
    """Of the servers on which it did."""
    error: str = ""


@dataclass
class Running:
    """A job that one server has, or two."""

    job: Job
    since: float
    servers: set[str] = field(default_factory=set)
    saving: str = ""
    """The server that was done first and saves its files."""


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
        self.kinds: dict[str, str] = {}
        """Server that is there -> its kind; servers of one kind fail alike."""
        self.running: dict[str, Running] = {}
        self.failed: dict[str, Failed] = {}
        """Those that wait for another attempt, and those that run it."""
        self.slowest = 0.0

    def left(self) -> bool:
        """Whether there are jobs that no server has yet."""
        self._read()
        waiting = (self.groups, *self.taken.values(), *self.adopted.values())
        return any(waiting) or any(job not in self.running for job in self.failed)

    def unfinished(self) -> bool:
        """Whether any job has not ended."""
        return bool(self.running) or self.left()

    def prompt_id(self, job: Job, attempt: int) -> str:
        return str(uuid.uuid5(self.manifest.batch, f"{job.id} {job.inputs()} {attempt}"))

    def attempt(self, job: Job) -> int:
        """The number of the attempt that comes next, from 1."""
        failed = self.failed.get(job.id)
        return self.manifest.attempts(job) + (failed.attempts if failed else 0) + 1

    def next(self, server: str) -> Job | None:
        """A job for a server: what it has already, what failed elsewhere, what shares files and
        texts with its last one, what nobody has, half of what the busiest one has taken, or one
        that is late."""
        self._read()
        job = self._adopted(server) or self._again(server) or self._new(server)
        job = job or self._late(server)
        if job is not None:
            running = self.running.setdefault(job.id, Running(job, time.monotonic()))
            running.servers.add(server)
        return job

    def _adopted(self, server: str) -> Job | None:
        return self.adopted[server].popleft() if self.adopted[server] else None

    def _again(self, server: str) -> Job | None:
        """A job that failed on other servers; on this one too when no other is to come."""
        for failed in self.failed.values():
            untried = set(self.kinds.values()) - failed.kinds
            mine = self.kinds.get(server) in untried or not untried or self._is_late(failed.since)
            if mine and failed.job.id not in self.running:
                return failed.job
        return None

    def _new(self, server: str) -> Job | None:
        mine = self.taken[server]
        if not mine and self.groups:
            self._take(server)
        elif not mine:
            others = max(self.taken.values(), key=len)
            for _ in range((len(others) + 1) // 2):
                mine.appendleft(others.pop())
        return mine.popleft() if mine else None

    def _late(self, server: str) -> Job | None:
        """The oldest that one other server has had for too long."""
        for running in self.running.values():  # the oldest first
            if not self._is_late(running.since):
                return None
            if len(running.servers) == 1 and server not in running.servers and not running.saving:
                return running.job
        return None

    def _is_late(self, since: float) -> bool:
        return time.monotonic() - since > max(LATE_SECONDS, LATE_TIMES * self.slowest)

    def _read(self) -> None:
        while not self.groups and (window := list(islice(self.missing, WINDOW))):
            for job in window:
                prompt = self.prompt_id(job, self.attempt(job))
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

    def claim(self, job: Job, server: str) -> bool:
        """Whether a server that was done with a job is the first and may save its files."""
        running = self.running.get(job.id)
        if running is None:
            return False
        if running.saving:
            running.servers.discard(server)
            return False
        running.saving = server
        return True

    def done(self, job: Job) -> None:
        """A job has ended, well or set aside."""
        running = self.running.pop(job.id)
        self.slowest = max(self.slowest, time.monotonic() - running.since)
        self.failed.pop(job.id, None)

    def fail(self, job: Job, server: str, error: str) -> Failed | None:
        """A job failed on a server; that it did, when it is not to be tried again."""
        running = self.running.get(job.id)
        if running is None:  # another server was sooner
            return None
        failed = self.failed.setdefault(job.id, Failed(job, time.monotonic()))
        failed.attempts += 1
        failed.kinds.add(self.kinds.get(server, server))
        failed.error = error
        untried = set(self.kinds.values()) - failed.kinds
        over = failed.attempts >= ATTEMPTS and (not untried or self._is_late(failed.since))
        if over and running.servers == {server}:
            return failed
        self._drop(job, server)
        return None

    def lose(self, server: str, *jobs: Job) -> None:
        """A server is gone: its jobs, and what only that one had, are the others'."""
        self.kinds.pop(server, None)
        self.known = {prompt: other for prompt, other in self.known.items() if other != server}
        back = [job for job in jobs if self._drop(job, server) and job.id not in self.failed]
        for lost in (*back, *self.taken.pop(server, ()), *self.adopted.pop(server, ())):
            self._put(lost)

    def _drop(self, job: Job, server: str) -> bool:
        """A server has a job no longer; whether no server has it now."""
        running = self.running.get(job.id)
        if running is None:
            return False
        running.servers.discard(server)
        if running.saving == server:
            running.saving = ""
        if running.servers:
            return False
        del self.running[job.id]
        return True
