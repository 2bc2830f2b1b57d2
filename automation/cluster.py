"""ComfyUIs on a Ray cluster: Ray starts, watches and restarts them; a batch sees servers.

Each is an actor with a ComfyUI of its own beside it, on 127.0.0.1 of its node. When the ComfyUI
ends, so does the actor, and Ray starts both again; when the actor is killed, its ComfyUI ends by
itself (bound.py). Prompts that were lost with it are queued again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from . import bound
from .answers import File, Result
from .client import Client
from .errors import AutomationError, LostError, RunError, ServerError
from .files import Place
from .limits import RESTARTS
from .workflow import Workflow

PACK = Path(__file__).parents[1]
PREFIX = "comfyui-of-ray-"
START_SECONDS = 600
"""How long a ComfyUI may take until it answers."""
CLOSE_SECONDS = 5
OLD_SECONDS = 60


@dataclass(frozen=True)
class Slots:
    """What the hosts of a batch are.

    comfyui: ComfyUI's folder on every node, started with the Python that Ray has there.
    arguments: further ones for its main.py. workers: how many; 0 is one for each GPU of the
    cluster, or where there is none, each `cpus` CPUs. cpus: for each worker, also its threads.
    """

    comfyui: str
    arguments: tuple[str, ...] = ()
    workers: int = 0
    cpus: int = 1


class Host:
    """A Ray actor: one ComfyUI. Its errors are answers, so that they keep their class and words."""

    def __init__(self, slots: Slots, gpu: bool):
        self.folder, self.lock = own_folder()
        self.client: Client | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.error: AutomationError | None = None
        self.closing = False
        try:
            self._start(slots, gpu)
        except AutomationError as error:
            self.error = error

    def _start(self, slots: Slots, gpu: bool) -> None:
        main = Path(slots.comfyui) / "main.py"
        if not main.is_file():
            raise ServerError(
                f"On {socket.gethostname()} there is no ComfyUI at {slots.comfyui}: {main} is "
                "missing. --comfyui names its folder on every node."
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = {
            "--output-directory": self.folder / "output",
            "--temp-directory": self.folder,  # ComfyUI makes a folder temp in it
            "--user-directory": self.folder / "user",
            "--database-url": "sqlite:///:memory:",
        }
        (self.folder / "user").mkdir()
        options = ["--listen", "127.0.0.1", "--port", port, "--disable-auto-launch"]
        options += [part for pair in own.items() for part in pair] + ([] if gpu else ["--cpu"])
        command = [sys.executable, bound.__file__, main, *options, *slots.arguments]
        with (self.folder / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=slots.comfyui,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            )
        self.url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + START_SECONDS
        while not answers(port):
            if self.process.poll() is not None or time.monotonic() > end:
                raise ServerError(
                    f"ComfyUI did not start on {socket.gethostname()}:", *self._log_tail()
                )
            time.sleep(0.2)
        threading.Thread(target=self._end_with_comfyui, daemon=True).start()

    def _end_with_comfyui(self) -> None:
        assert self.process is not None
        self.process.wait()
        if not self.closing:
            os._exit(1)  # Ray starts this actor anew, and it a ComfyUI

    def close(self) -> None:
        """End ComfyUI and remove what it wrote here."""
        self.closing = True
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _log_tail(self) -> list[str]:
        text = (self.folder / "log.txt").read_text("utf-8", errors="replace")
        return text.splitlines()[-15:]

    async def about(self) -> dict[str, Any] | AutomationError:
        """The server's versions and devices, with `node`, `pid` and `process`, that of ComfyUI."""
        if self.error is not None:
            return self.error
        try:
            found = await (await self._entered()).about()
        except AutomationError as error:
            return error
        assert self.process is not None
        own = {"node": socket.gethostname(), "pid": os.getpid(), "process": self.process.pid}
        return {**found, **own}

    async def run(self, workflow: Workflow, prompt_id: str) -> Result | AutomationError:
        """The same as Client.run. Files are deleted here once they were fetched, and their names
        are used again: where ComfyUI answers with a file that it did not write for this prompt, it
        is told to forget, and asked again."""
        try:
            client = await self._entered()
            result = await client.run(workflow, prompt_id=prompt_id)
            for attempt in range(RESTARTS):
                if not any(file.node in result.cached for file in result.files):
                    return result
                await client.forget()
                again = str(uuid.uuid5(uuid.UUID(prompt_id), str(attempt)))
                result = await client.run(workflow, prompt_id=again)
        except AutomationError as error:
            return error
        return RunError("ComfyUI answers with a file that was fetched and deleted before.")

    async def fetch(self, file: File) -> bytes | AutomationError:
        """The contents of a file, which is deleted here."""
        try:
            data = await (await self._entered()).fetch(file)
        except AutomationError as error:
            return error
        path = (self.folder / file.type / file.subfolder / file.filename).resolve()
        if path.is_relative_to(self.folder.resolve()):
            path.unlink(missing_ok=True)
        return data

    async def save(self, file: File, place: Place, name: str) -> str | AutomationError:
        """Write a file where it belongs, straight from this node; its sha256."""
        data = await self.fetch(file)
        if isinstance(data, AutomationError):
            return data
        try:
            return await asyncio.to_thread(place.write, name, data)
        except AutomationError as error:
            return error

    async def _entered(self) -> Client:
        if self.client is None:
            self.client = await Client(self.url).__aenter__()
        return self.client


class Worker:
    """A Host as a batch sees it: the methods of a Client that it needs."""

    def __init__(self, ray: Any, slots: Slots, gpu: bool, number: int, patience: float):
        self.url = self.host = f"ray:{number}"
        self.kind = "ray"
        self.patience = patience
        self._ray, self._slots, self._gpu = ray, slots, gpu

    async def __aenter__(self) -> Worker:
        options = {"num_cpus": self._slots.cpus, "num_gpus": int(self._gpu), "max_restarts": -1}
        self._actor = self._ray.remote(Host).options(**options).remote(self._slots, self._gpu)
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._actor.close.remote(), CLOSE_SECONDS)
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)

    async def known(self) -> set[str]:
        """None: this ComfyUI is new."""
        return set()

    async def about(self) -> dict[str, Any]:
        """As Client.about, once the cluster has room for it and it has started."""
        try:
            found = await asyncio.wait_for(self._up(), self.patience)
        except asyncio.TimeoutError as error:
            raise ServerError(
                f"{self.url} was not up within {self.patience:g} s: there was no room in the "
                f"cluster (it asks for {self._slots.cpus} CPU and, where there are GPUs, for one), "
                "or it ended again and again. Wait longer with --patience, or ask for fewer "
                "--workers."
            ) from error
        self.host = f"{self.url} on {found['node']}"
        return found

    async def _up(self) -> dict[str, Any]:
        while True:
            with contextlib.suppress(LostError):
                return await self._ask("about")
            await asyncio.sleep(1)

    async def run(self, workflow: Workflow, prompt_id: str) -> Result:
        """As Client.run."""
        for _ in range(RESTARTS):
            try:
                return await self._ask("run", workflow, prompt_id)
            except LostError:
                await self.about()
        raise RunError(f"ComfyUI ended {RESTARTS} times while it had this.")

    async def save(self, file: File, place: Place, name: str) -> str:
        """As Client.save."""
        if place.remote:
            return await self._ask("save", file, place, name)
        data = await self._ask("fetch", file)
        return await asyncio.to_thread(place.write, name, data)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            answer = await getattr(self._actor, method).remote(*arguments)
        except self._ray.exceptions.RayActorError as error:
            raise LostError(f"{self.url} ended: {error}") from error
        if isinstance(answer, AutomationError):
            raise answer
        return answer


def own_folder() -> tuple[Path, FileLock]:
    """A new temporary folder, locked as long as this process lives; those of dead ones go."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(Timeout, OSError):
            if time.time() - left.stat().st_mtime > OLD_SECONDS:  # else it may not be locked yet
                with FileLock(left / "lock", timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = FileLock(folder / "lock", thread_local=False)
    lock.acquire()
    return folder, lock


def answers(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def joined(address: str, slots: Slots, patience: float) -> Iterator[list[Worker]]:
    """Workers of the Ray cluster at an address; "auto" is the one that runs here, "local" one of
    this batch alone. They and what they started end with the context.

    Raises AutomationError when there is no such cluster, or no ray here.
    """
    check_address(address)
    if address == "local":
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listens on 127.0.0.1 alone
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    else:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # of 40 s each, not 20
    try:
        import ray
    except ImportError as error:
        raise AutomationError(f"--ray needs the package ray: pip install ray ({error}).") from error
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"py_modules": [str(PACK / name) for name in ("automation", "sd35_core")]},
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise AutomationError(
            f"No Ray cluster can be joined at {address}: {error} If it asks for a token, set "
            "RAY_AUTH_MODE=token here too."
        ) from error
    try:
        have = ray.cluster_resources()
        count = slots.workers or int(have.get("GPU") or have.get("CPU", 0) // slots.cpus)
        if not count:
            raise AutomationError(f"The Ray cluster at {address} has neither GPU nor CPU: {have}.")
        gpu = bool(have.get("GPU"))
        yield [Worker(ray, slots, gpu, number, patience) for number in range(1, count + 1)]
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raises AutomationError when nothing listens there; ray itself would try for minutes."""
    found = announced() if address == "auto" else address
    if found in ("", "local"):
        return
    place = urlsplit(found if "://" in found else f"//{found}")
    try:
        socket.create_connection((place.hostname or "", place.port or 0), 5).close()
    except (OSError, ValueError) as error:
        raise AutomationError(
            f"No Ray cluster answers at {address} ({found}: {error}). Write its HOST:PORT (6379 "
            "unless set otherwise), or auto for the one on this machine, or local for one of its "
            "own."
        ) from error


def announced() -> str:
    """Where "auto" looks: RAY_ADDRESS, or what the last `ray start` on this machine wrote down,
    which stays there when it is killed; else nothing."""
    if "RAY_ADDRESS" in os.environ:
        return os.environ["RAY_ADDRESS"]
    system = tempfile.gettempdir() if sys.platform in ("linux", "win32") else "/tmp"
    try:
        folder = Path(os.environ.get("RAY_TMPDIR", system))
        return (folder / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
