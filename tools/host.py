"""A ComfyUI to run the pack in: find it, start it, talk to it.

COMFYUI_PATH names an own install; otherwise tools/install.py fetches one into a cache outside the
checkout (SD35_CACHE, else the platform's cache folder); COMFYUI_VERSION chooses an older one,
or one with the newest front end.
Standard library alone until the host's environment exists; `run_prompt` shows progress with that
environment's aiohttp.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd35_core.whole_file import write_text
from tools.install import DEFAULT_VERSION, PACK, PACK_NAME, Host, HostError, get

START_SECONDS = 300
STARTED = "SD35_TOOL_STARTED_AGAIN"
ENDS = ("execution_success", "execution_error", "execution_interrupted")
MOST_JSON, MOST_PICTURES = 64_000_000, 256_000_000
"""Bytes of an answer of a server, and of all pictures of a prompt."""


def find_comfyui(path: str | None = None) -> Host:
    """The host at `path` or COMFYUI_PATH, else a cached one, fetched if it isn't there."""
    if sys.version_info < (3, 10):  # noqa: UP036
        raise HostError(
            f"This is Python {sys.version.split()[0]}; 3.10 or newer is needed. Start it with one."
        )
    path = path or os.environ.get("COMFYUI_PATH")
    if path:
        return own_install(Path(path))
    return get(os.environ.get("COMFYUI_VERSION") or DEFAULT_VERSION)


def own_install(folder: Path) -> Host:
    """A ComfyUI that is already there, with the Python beside it."""
    folder = folder.expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "comfyui_version.py").is_file():
        raise HostError(
            f"{folder} is no ComfyUI folder: main.py and comfyui_version.py are missing."
        )
    places = [folder / "venv", folder / ".venv", folder.parent / "python_embeded"]
    for place in places:
        for python in (
            place / "bin" / "python",
            place / "Scripts" / "python.exe",
            place / "python.exe",
        ):
            if python.is_file():
                return Host(folder, python, own=True)
    return Host(folder, Path(sys.executable), own=True)


def started_again() -> bool:
    """Whether this program runs in ComfyUI's environment because `start_again` started it."""
    return STARTED in os.environ


def start_again(python: Path, script: str) -> int:
    """Run this program, with its arguments, with ComfyUI's own Python; gives its exit status."""
    command = [str(python), script, *sys.argv[1:]]
    environment = {**os.environ, STARTED: "1"}
    if sys.platform != "win32":
        os.execve(python, command, environment)
    return subprocess.call(command, env=environment)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def link_pack(custom_nodes: Path) -> None:
    """Make the pack appear in a custom_nodes folder: a link, or a copy where links can't be."""
    custom_nodes.mkdir(parents=True, exist_ok=True)
    target = custom_nodes / PACK_NAME
    if target.exists():
        return
    try:
        if sys.platform == "win32":
            import _winapi

            _winapi.CreateJunction(str(PACK), str(target))
        else:
            target.symlink_to(PACK, target_is_directory=True)
    except OSError:
        shutil.copytree(PACK, target, ignore=shutil.ignore_patterns(".git", "tests"))


class Server:
    """A running ComfyUI with the pack in it; a context manager. `url` is where it listens.

    With `base`, and for a fetched host, it sees the files of that folder alone; an own install
    without `base` keeps its models, nodes, settings and outputs.
    """

    def __init__(self, host: Host, base: Path | None = None, arguments: list[str] | None = None):
        self.host = host
        self.arguments = arguments or []
        self.temporary = tempfile.TemporaryDirectory(
            prefix="sd35-host-", ignore_cleanup_errors=True
        )
        self.alone = base is not None or not host.own
        self.base = base or Path(self.temporary.name)
        self.log = Path(self.temporary.name) / "server.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        command = [str(self.host.python), str(self.host.folder / "main.py")]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        if not has_accelerator(self.host):
            command.append("--cpu")
        if self.alone:
            link_pack(self.base / "custom_nodes")
            shutil.copytree(
                self.host.folder / "input", self.base / "input", dirs_exist_ok=True
            )  # the picture that ComfyUI comes with, which workflows may name
            return [*command, "--base-directory", str(self.base), *self.arguments]
        installed = self.host.folder / "custom_nodes"
        if not any(p.resolve() == PACK for p in installed.glob("*")):
            nodes = Path(self.temporary.name) / "extra_nodes"
            link_pack(nodes)
            paths = Path(self.temporary.name) / "paths.yaml"
            write_text(paths, f"sd35:\n  custom_nodes: {json.dumps(str(nodes))}\n", replace=True)
            command += ["--extra-model-paths-config", str(paths)]
        return [*command, *self.arguments]

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.host.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    **self.host.environment,
                    **{"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                },
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise HostError(f"ComfyUI ended at its start:\n{self.log_tail()}")
            try:
                call(self.url, "/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise HostError(f"ComfyUI did not answer in {START_SECONDS} s:\n{self.log_tail()}")

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text("utf-8", errors="replace").splitlines()[-lines:])

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.temporary.cleanup()


def has_accelerator(host: Host) -> bool:
    """Whether the host's torch sees a GPU."""
    code = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    done = subprocess.run([str(host.python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() == "True"


def received(request: str | urllib.request.Request, timeout: float, most: int) -> bytes:
    """The answer to a request; one to this machine never takes the way through a proxy.

    Raises HostError for one of more than `most` bytes or that is no HTTP, OSError where none is.
    """
    address = request if isinstance(request, str) else request.full_url
    with understood(address):
        near = urllib.parse.urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if near else None))
        with opener.open(request, timeout=timeout) as answer:
            data = answer.read(most + 1)
    if len(data) > most:
        raise HostError(f"{address} answers with more than {most / 1e6:.0f} MB; no more is read.")
    return data


@contextmanager
def understood(address: str) -> Iterator[None]:
    """What is no answer of ComfyUI's becomes a HostError: other types, missing keys, no HTTP."""
    wrong = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
    try:
        yield
    except (*wrong, http.client.HTTPException) as error:
        raise HostError(
            f"{address} gives no answer that ComfyUI would give ({type(error).__name__}: "
            f"{str(error)[:200]}). Is it a ComfyUI, and the address right?"
        ) from error


def call(url: str, path: str, data: Any = None, timeout: float = 30) -> Any:
    """One JSON request to a server; the error of a refused one is raised as HostError."""
    body = None if data is None else json.dumps(data).encode()
    with understood(url):
        request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        text = received(request, timeout, MOST_JSON)
    except urllib.error.HTTPError as error:
        raise HostError(refusal(error.read(MOST_JSON).decode(errors="replace"))) from error
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise HostError(f"{url}{path} answers, but not as ComfyUI does: {text[:60]!r}") from error


def refusal(text: str) -> str:
    """What the host says of a prompt it does not take, in lines a person can read."""
    try:
        answer = json.loads(text)
        lines = [answer["error"]["message"]]
        for node, found in answer.get("node_errors", {}).items():
            for error in found["errors"]:
                lines.append(
                    f"{found['class_type']} ({node}): {error['message']}: {error['details']}"
                )
        return "\n".join(lines)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return text[:300]


Progress = Callable[[str, int, int], None]
"""(node id, steps done, steps in all)."""


def run_prompt(
    url: str, prompt: dict[str, Any], progress: Progress | None = None
) -> dict[str, Any]:
    """Queue an API workflow, wait for its end, give its history. Raises HostError on failure."""
    try:
        return _run_prompt(url, prompt, progress)
    except OSError as error:
        raise HostError(f"ComfyUI at {url} ended or was lost during the run: {error}") from error


def _run_prompt(url: str, prompt: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    prompt_id, client_id = str(uuid.uuid4()), str(uuid.uuid4())
    request = {"prompt": prompt, "prompt_id": prompt_id, "client_id": client_id}
    try:
        import asyncio

        import aiohttp  # noqa: F401

        asyncio.run(_follow(url, request, progress))
    except ImportError:
        call(url, "/prompt", request)
    with understood(url):
        while True:
            history = call(url, f"/history/{prompt_id}").get(prompt_id)
            if history is not None and history.get("status", {}).get("status_str"):
                break
            time.sleep(0.2)
        if history["status"]["status_str"] != "success":
            raise HostError(failure(history))
        return history


async def _follow(url: str, request: dict[str, Any], progress: Progress | None) -> None:
    """Queue a prompt and pass on its progress events until it ends."""
    import asyncio

    import aiohttp

    address = f"{url}/ws?clientId={request['client_id']}"
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=MOST_JSON) as ws,
        ):
            await asyncio.to_thread(call, url, "/prompt", request)
            async for message in ws:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                with understood(url):
                    event = json.loads(message.data)
                    kind, data = event["type"], event.get("data")
                    if not isinstance(data, dict) or data.get("prompt_id") != request["prompt_id"]:
                        continue
                    if kind == "progress" and progress is not None:
                        progress(str(data["node"]), int(data["value"]), int(data["max"]))
                    if kind in ENDS:
                        return
    except aiohttp.ClientError as error:
        raise HostError(f"{url} can't be followed while it draws: {error}") from error


def failure(history: dict[str, Any]) -> str:
    """Why a prompt failed, from its history."""
    for kind, data in history["status"].get("messages", []):
        if kind == "execution_error":
            return f"{data['node_type']} ({data['node_id']}): {data['exception_message'].strip()}"
        if kind == "execution_interrupted":
            return "The run was interrupted."
    return f"The run ended with '{history['status']['status_str']}'."


def pictures(url: str, history: dict[str, Any]) -> list[bytes]:
    """The files that a finished prompt saved. Raises HostError."""
    found: list[bytes] = []
    with understood(url):
        for output in history["outputs"].values():
            for image in output.get("images", []):
                query = urllib.parse.urlencode(image)
                left = MOST_PICTURES - sum(map(len, found))
                found.append(received(f"{url}/view?{query}", 30, left))
    return found
