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
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

import aiohttp

from . import answers, limits
from .answers import File, Result, Step
from .errors import LostError, RefusedError, RunError, ServerError
from .files import Place
from .outside import parsed
from .workflow import Workflow

Read = Callable[[Any], Any]


class AwayError(Exception):
    """No whole answer this time; the next one may be."""


@dataclass
class _Followed:
    """A prompt that someone waits for."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: float = -limits.QUICK_SECONDS
    """When an event said so, by the monotonic clock."""
    step: Callable[[Step], None] | None = None


class Client:
    """One server; any number of prompts at once.

    patience: seconds that a server may be away before that is an error. largest: bytes of a file
    that is fetched. What a server answers is held to the limits above, and when it is not as
    ComfyUI's, that is a ServerError.
    """

    def __init__(self, url: str, patience: float = 120, largest: int = limits.LARGEST_FILE):
        self.url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
        self.host = self.kind = self.url
        self.patience, self.largest = patience, largest
        self.client_id = uuid.uuid4().hex
        self._followed: dict[str, _Followed] = {}
        self._lost = 0

    async def __aenter__(self) -> Client:
        plain = {"Accept-Encoding": "identity"}  # what is packed could be of any size
        self._session = aiohttp.ClientSession(
            headers=plain, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )
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
        return await self._ask(answers.about, "GET", "/system_stats")

    async def known(self) -> set[str]:
        """The ids of prompts that the server waits for, draws or has drawn lately."""
        queue = await self._ask(answers.queued, "GET", "/queue")
        past = f"/history?max_items={limits.REMEMBERED}"
        return set(queue) | await self._ask(answers.ended, "GET", past)

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
        before = self._lost
        for _ in range(limits.RESTARTS):
            await self.submit(workflow, prompt_id)
            result = await self.wait(prompt_id, step, workflow)
            if result is not None:
                return result
        if self._lost == before:
            raise ServerError(
                f"{self.url} took a prompt {limits.RESTARTS} times and knows nothing of it each "
                "time."
            )
        raise RunError(f"{self.url} was started anew {limits.RESTARTS} times while it had this.")

    async def submit(self, workflow: Workflow, prompt_id: str | None = None) -> str:
        """Queue a workflow once, whatever the connection does; the prompt's id.

        Raises RefusedError with the server's reasons when it takes no such workflow, ServerError
        when it is gone.
        """
        prompt_id = prompt_id or str(uuid.uuid4())
        body = {"prompt": workflow, "prompt_id": prompt_id, "client_id": self.client_id}

        async def post() -> str:
            if await self.state(prompt_id) == "unknown":
                accepted = partial(answers.accepted, prompt_id=prompt_id)
                if reasons := await self._once(accepted, "POST", "/prompt", body):
                    await self._once(None, "POST", "/queue", {"delete": [prompt_id]})
                    raise RefusedError(*reasons)
            return prompt_id

        try:
            return await self._patiently(post)
        except RefusedError:
            await self._check_nodes(workflow)
            raise

    async def _check_nodes(self, workflow: Workflow) -> None:
        """Raises ServerError when the server lacks nodes; other servers may have them."""
        kinds = sorted({node["class_type"] for node in workflow.values()})
        lacking = [k for k in kinds if not await self._has(k)]
        if lacking:
            raise ServerError(
                f"{self.url} has no node {', '.join(lacking)}. Install the node pack there, start "
                "it anew, and look at its log if the nodes are still missing."
            )

    async def _has(self, kind: str) -> bool:
        """Whether the server has a node of that class."""
        return await self._ask(bool, "GET", f"/object_info/{quote(kind, '')}")

    async def state(self, prompt_id: str) -> str:
        """ "pending", "running", "ended", or "unknown" to this server."""
        # the queue first: from there a prompt moves to the history
        queue = await self._once(answers.queued, "GET", "/queue")
        if prompt_id in queue:
            return queue[prompt_id]
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
                    return found and self._read(answers.result_of, prompt_id, found, workflow)
                with contextlib.suppress(asyncio.TimeoutError):
                    quick = time.monotonic() - followed.ended < limits.QUICK_SECONDS
                    seconds = limits.ENDED_SECONDS if quick else limits.LOOK_SECONDS
                    await asyncio.wait_for(followed.changed.wait(), seconds)
                followed.changed.clear()
        finally:
            del self._followed[prompt_id]

    async def cancel(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or stop it; nothing happens when it has ended."""
        await self._ask(None, "POST", "/queue", {"delete": [prompt_id]})
        await self._ask(None, "POST", "/interrupt", {"prompt_id": prompt_id})

    async def fetch(self, file: File) -> bytes:
        """The contents of a file that a workflow saved, at most `largest` bytes.

        Raises LostError when it is gone or no picture of its kind.
        """
        place = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}

        async def get() -> bytes:
            status, data = await self._answer(
                "GET", "/view", self.largest, limits.FILE_SECONDS, params=place
            )
            if status != 200:
                raise LostError(f"{self.url} no longer has {file.filename}.")
            if not answers.is_whole(file.filename, data):
                raise LostError(
                    f"{self.url} gives {len(data):,} bytes as {file.filename}, which are no whole "
                    "picture of that kind."
                )
            return data

        return await self._patiently(get)

    async def save(self, file: File, place: Place, name: str) -> str:
        """Write a file that a workflow saved where it belongs; its sha256."""
        data = await self.fetch(file)
        return await asyncio.to_thread(place.write, name, data)

    async def forget(self) -> None:
        """Empty the server's cache of what nodes gave; models stay loaded."""
        await self._ask(None, "POST", "/free", {"free_memory": True, "unload_models": False})

    async def _history(self, prompt_id: str) -> dict[str, Any] | None:
        entry = partial(answers.entry_of, prompt_id=prompt_id)
        return await self._once(entry, "GET", f"/history/{prompt_id}")

    async def _ask(self, read: Read | None, method: str, path: str, body: Any = None) -> Any:
        return await self._patiently(lambda: self._once(read, method, path, body))

    async def _patiently(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What `ask` gives, tried again for a while when the server does not answer."""
        end, pause = 0.0, 0.2
        while True:
            try:
                return await ask()
            except AwayError as error:
                self._lost += 1
                end = end or time.monotonic() + self.patience
                if time.monotonic() + pause > end:
                    raise ServerError(
                        f"No ComfyUI answers at {self.url} ({error}). Is it started, and is the "
                        "address right?"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5)

    async def _once(self, read: Read | None, method: str, path: str, body: Any = None) -> Any:
        """What `read` makes of the JSON that one request gets; nothing without it.

        Raises RefusedError, AwayError, or ServerError for an answer that is not ComfyUI's.
        """
        status, data = await self._answer(
            method, path, limits.LARGEST_ANSWER, limits.ANSWER_SECONDS, json=body
        )
        if status == 400:
            raise RefusedError(*answers.refusal(data))
        if status > 400:
            said = data[:200].decode("utf-8", "replace")
            raise ServerError(f"{self.url}{path} answers {status}: {said}")
        return read and self._read(lambda: read(parsed(data)))

    def _read(self, read: Callable[..., Any], *values: Any) -> Any:
        """What `read` gives. Raises ServerError when the server's answer is not as ComfyUI's."""
        try:
            return read(*values)
        except ValueError as error:
            raise ServerError(
                f"{self.url} answers, but not as ComfyUI does: {error}. Is the address right?"
            ) from error

    async def _answer(
        self, method: str, path: str, largest: int, seconds: float, **more: Any
    ) -> tuple[int, bytes]:
        """Status and body of one answer. Raises AwayError when it does not come whole in time,
        ServerError when it is larger, packed, or leads elsewhere."""
        timeout = aiohttp.ClientTimeout(seconds, sock_connect=10)
        options: dict[str, Any] = {"timeout": timeout, "allow_redirects": False, **more}
        data = bytearray()
        try:
            async with self._session.request(method, self.url + path, **options) as answer:
                if answer.status in limits.AWAY:
                    raise AwayError(f"it answers {answer.status}")
                if answer.status in limits.REDIRECTS:
                    raise ServerError(
                        f"{self.url} leads on to {answer.headers.get('Location')}. If that is "
                        "ComfyUI, give that address."
                    )
                packed = answer.headers.get("Content-Encoding", "identity")
                if packed != "identity":
                    raise ServerError(f"{self.url} answers packed as {packed}, which none asked.")
                async for piece in answer.content.iter_any():
                    data += piece
                    if len(data) > largest:
                        raise ServerError(
                            f"{self.url}{path} answers with more than {largest / 1e6:,.0f} MB, the "
                            "most that is taken."
                        )
                return answer.status, bytes(data)
        except (aiohttp.InvalidURL, ValueError) as error:
            raise ServerError(f"{self.url} is no address: {error}.") from error
        except aiohttp.ClientResponseError as error:
            raise ServerError(f"{self.url} answers with no HTTP: {error.message}") from error
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise AwayError(str(error) or f"no whole answer within {seconds} s") from error

    async def _listen(self) -> None:
        """Pass on what the server tells; for ever, through lost connections."""
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        while True:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
                async with self._session.ws_connect(
                    address, max_msg_size=limits.LARGEST_EVENT, heartbeat=30
                ) as socket:
                    async for message in socket:
                        if message.type == aiohttp.WSMsgType.TEXT:
                            self._told(message.data)
            self._lost += 1
            for followed in self._followed.values():
                followed.changed.set()  # what was said meanwhile is lost: look
            await asyncio.sleep(0.5)

    def _told(self, text: str) -> None:
        """An event, which may be anything: what it says of a prompt is only a hint."""
        try:
            kind, prompt_id, step = answers.progress(parsed(text))
        except ValueError:
            return
        followed = self._followed.get(prompt_id)
        if followed is None:
            return
        if step is not None and followed.step is not None:
            followed.step(step)
        if kind in ("execution_success", "execution_error", "execution_interrupted"):
            followed.ended = time.monotonic()
            followed.changed.set()
