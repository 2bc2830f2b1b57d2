"""A ComfyUI server from Python: queue a workflow, follow it, fetch what it made, cancel it.

    async with Client("http://127.0.0.1:8188") as client:
        result = await client.run(workflow.read("text_to_image.json"))
        picture = await client.fetch(result.files[0])

The server's /queue and /history are the truth; its websocket only says sooner. So a lost connection
costs nothing, and a prompt is queued again only when a server that answers knows nothing of it:
it was started anew. Source of the protocol: docs.comfy.org, "Server routes" and "Messages".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp

from .errors import LostError, RefusedError, RunError, ServerError
from .files import Place
from .workflow import Workflow, title

LOOK_SECONDS = 5.0
"""How long a prompt is followed by its events alone before the server is asked."""
ENDED_SECONDS = 0.02
"""The same once an event says that it has ended: its history is written just after that."""
RESTARTS = 3
"""How often a prompt is queued when its server ends while it has it: it may be the cause."""
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)


@dataclass(frozen=True)
class File:
    """Something that a workflow saved, as the server names it."""

    node: str
    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True)
class Step:
    """How far a node is."""

    node: str
    done: int
    total: int


@dataclass
class Result:
    """What a prompt made: files, and texts by the node that showed them.

    seconds: that the server took, without waiting. cached: nodes that did not run, because the
    server has what they gave for the same inputs.
    """

    prompt_id: str
    files: list[File]
    texts: dict[str, list[str]]
    seconds: float
    cached: frozenset[str] = frozenset()


@dataclass
class _Followed:
    """A prompt that someone waits for."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    step: Callable[[Step], None] | None = None


class Client:
    """One server; any number of prompts at once.

    patience: seconds that a server may be away before that is an error.
    """

    def __init__(self, url: str, patience: float = 120):
        self.url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
        self.host = self.url
        self.patience = patience
        self.client_id = uuid.uuid4().hex
        self._followed: dict[str, _Followed] = {}

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(timeout=TIMEOUT)
        try:
            await self.about()
        except BaseException:
            await self._session.close()
            raise
        self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listener
        await self._session.close()

    async def about(self) -> dict[str, Any]:
        """The server's versions and devices. Raises ServerError when it is no ComfyUI."""
        found = await self._ask("GET", "/system_stats")
        if not isinstance(found, dict) or "comfyui_version" not in found.get("system", {}):
            raise ServerError(f"{self.url} answers, but not as ComfyUI does. Is the address right?")
        return found

    async def known(self) -> set[str]:
        """The ids of all prompts that the server waits for, draws or has drawn."""
        queue = await self._ask("GET", "/queue")
        entries = [*queue["queue_running"], *queue["queue_pending"]]
        return {entry[1] for entry in entries} | set(await self._ask("GET", "/history"))

    async def run(
        self,
        workflow: Workflow,
        step: Callable[[Step], None] | None = None,
        prompt_id: str | None = None,
    ) -> Result:
        """Queue a workflow and wait for what it makes; again if the server was started anew.

        With the `prompt_id` of a prompt that the server knows, that one is waited for.

        Raises RefusedError when it is refused, RunError when it fails, ServerError when the
        server is gone.
        """
        prompt_id = prompt_id or str(uuid.uuid4())
        for _ in range(RESTARTS):
            await self.submit(workflow, prompt_id)
            result = await self.wait(prompt_id, step, workflow)
            if result is not None:
                return result
        raise RunError(f"{self.url} was started anew {RESTARTS} times while it had this.")

    async def submit(self, workflow: Workflow, prompt_id: str | None = None) -> str:
        """Queue a workflow once, whatever the connection does; the prompt's id.

        Raises RefusedError with the server's reasons when it takes no such workflow, ServerError
        when it is gone.
        """
        prompt_id = prompt_id or str(uuid.uuid4())
        body = {"prompt": workflow, "prompt_id": prompt_id, "client_id": self.client_id}

        async def post() -> str:
            if await self.state(prompt_id) == "unknown":
                answer = await self._once("POST", "/prompt", body)
                if answer.get("node_errors"):  # it was queued for the outputs that can be made
                    await self._once("POST", "/queue", {"delete": [prompt_id]})
                    found = {"message": "A part of the workflow can't be run"}
                    raise RefusedError(refusal(json.dumps({"error": found, **answer})))
            return prompt_id

        try:
            return await self._patiently(post)
        except RefusedError:
            await self._check_nodes(workflow)
            raise

    async def _check_nodes(self, workflow: Workflow) -> None:
        """Raises ServerError when the server lacks nodes; other servers may have them."""
        kinds = sorted({node["class_type"] for node in workflow.values()})
        lacking = [k for k in kinds if not await self._ask("GET", f"/object_info/{quote(k, '')}")]
        if lacking:
            raise ServerError(
                f"{self.url} has no node {', '.join(lacking)}. Install the node pack there, start "
                "it anew, and look at its log if the nodes are still missing."
            )

    async def state(self, prompt_id: str) -> str:
        """ "pending", "running", "ended", or "unknown" to this server."""
        queue = await self._once("GET", "/queue")  # first: from here a prompt moves to the history
        for name in ("running", "pending"):
            if any(entry[1] == prompt_id for entry in queue[f"queue_{name}"]):
                return name
        return "ended" if await self._history(prompt_id) else "unknown"

    async def wait(
        self,
        prompt_id: str,
        step: Callable[[Step], None] | None = None,
        workflow: Workflow | None = None,
    ) -> Result | None:
        """What a queued prompt makes; None when the server no longer knows of it.

        Raises RunError when it fails or was cancelled, ServerError when the server is gone.
        """
        followed = self._followed[prompt_id] = _Followed(step=step)
        try:
            while True:
                state = await self._patiently(lambda: self.state(prompt_id))
                if state == "unknown":
                    return None
                if state == "ended":
                    found = await self._patiently(lambda: self._history(prompt_id))
                    return None if found is None else result_of(prompt_id, found, workflow)
                with contextlib.suppress(asyncio.TimeoutError):
                    seconds = ENDED_SECONDS if followed.ended else LOOK_SECONDS
                    await asyncio.wait_for(followed.changed.wait(), seconds)
                followed.changed.clear()
        finally:
            del self._followed[prompt_id]

    async def cancel(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or stop it; nothing happens when it has ended."""
        await self._ask("POST", "/queue", {"delete": [prompt_id]})
        await self._ask("POST", "/interrupt", {"prompt_id": prompt_id})

    async def fetch(self, file: File) -> bytes:
        """The contents of a file that a workflow saved. Raises LostError when it is gone."""
        place = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}

        async def get() -> bytes:
            async with self._session.get(f"{self.url}/view", params=place) as answer:
                if answer.status != 200:
                    raise LostError(f"{self.url} no longer has {file.filename}.")
                return await answer.read()

        return await self._patiently(get)

    async def save(self, file: File, place: Place, name: str) -> str:
        """Write a file that a workflow saved where it belongs; its sha256."""
        data = await self.fetch(file)
        return await asyncio.to_thread(place.write, name, data)

    async def forget(self) -> None:
        """Empty the server's cache of what nodes gave; models stay loaded."""
        await self._ask("POST", "/free", {"free_memory": True, "unload_models": False})

    async def _history(self, prompt_id: str) -> dict[str, Any] | None:
        found = (await self._once("GET", f"/history/{prompt_id}")).get(prompt_id)
        return found if found and found.get("status", {}).get("status_str") else None

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return await self._patiently(lambda: self._once(method, path, body))

    async def _patiently(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What `ask` gives, tried again for a while when the server does not answer."""
        end, pause = time.monotonic() + self.patience, 0.2
        while True:
            try:
                return await ask()
            except (aiohttp.ClientConnectionError, asyncio.TimeoutError, ConnectionError) as error:
                if time.monotonic() + pause > end:
                    raise ServerError(
                        f"No ComfyUI answers at {self.url} ({error}). Is it started, and is the "
                        "address right?"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5)

    async def _once(self, method: str, path: str, body: Any = None) -> Any:
        """One request. Raises RefusedError, or ServerError for an answer that is not ComfyUI's."""
        async with self._session.request(method, self.url + path, json=body) as answer:
            text = await answer.text()
        if answer.status == 400:
            raise RefusedError(refusal(text))
        if answer.status > 400:
            raise ServerError(f"{self.url}{path} answers {answer.status}: {text[:200]}")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ServerError(
                f"{self.url} answers, but not as ComfyUI does. Is the address right?"
            ) from error

    async def _listen(self) -> None:
        """Pass on what the server tells; for ever, through lost connections."""
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        while True:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
                async with self._session.ws_connect(
                    address, max_msg_size=0, heartbeat=30
                ) as socket:
                    async for message in socket:
                        if message.type == aiohttp.WSMsgType.TEXT:
                            self._told(json.loads(message.data))
            for followed in self._followed.values():
                followed.changed.set()  # what was said meanwhile is lost: look
            await asyncio.sleep(0.5)

    def _told(self, event: dict[str, Any]) -> None:
        data = event.get("data") or {}
        followed = self._followed.get(str(data.get("prompt_id")))
        if followed is None:
            return
        if event["type"] == "progress" and followed.step is not None:
            followed.step(Step(str(data.get("node")), data["value"], data["max"]))
        if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
            followed.ended = True
            followed.changed.set()


def result_of(prompt_id: str, history: dict[str, Any], workflow: Workflow | None = None) -> Result:
    """What an entry of /history holds. Raises RunError when the prompt failed."""
    if history["status"]["status_str"] != "success":
        raise RunError(failure(history, workflow or {}))
    files, texts = [], {}
    for node, output in history["outputs"].items():
        for kind, entries in output.items():
            if kind == "text" and isinstance(entries, (list, tuple)):
                texts[node] = [str(entry) for entry in entries]
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict) and "filename" in entry:
                    place = entry.get("subfolder", ""), entry.get("type", "output")
                    files.append(File(node, entry["filename"], *place))
    messages = dict(history["status"].get("messages", ()))
    cached = messages.get("execution_cached", {}).get("nodes", ())
    milliseconds = (
        messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]
    )
    return Result(prompt_id, files, texts, milliseconds / 1000, frozenset(map(str, cached)))


def failure(history: dict[str, Any], workflow: Workflow) -> str:
    """Why a prompt ended without its results."""
    for kind, data in history["status"].get("messages", ()):
        if kind == "execution_interrupted":
            return "The run was cancelled."
        if kind == "execution_error":
            node = workflow.get(str(data["node_id"]))
            name = title(node) if node else data["node_type"]
            return f"{name} ({data['node_id']}): {data['exception_message'].strip()}"
    return f"The run ended as '{history['status']['status_str']}'."


def refusal(text: str) -> str:
    """Why a workflow was not queued, a line for each widget."""
    try:
        answer = json.loads(text)
        lines = [answer["error"]["message"]]
        for key, node in (answer.get("node_errors") or {}).items():
            lines += [
                f"{node['class_type']} ({key}): {error['message']}: {error['details']}"
                for error in node["errors"]
            ]
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return text[:300]
