"""A server that answers as ComfyUI does, but for one fault of its own."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BABBLE = (
    "{", "[" * 10_000, "5", "null", '{"type": []}', '{"type": "progress"}', '{"data": {}}',
    '{"type": "progress", "data": 5}',
    '{"type": "progress", "data": {"prompt_id": [], "value": "x", "max": NaN}}',
)  # fmt: skip
ENDLESS = b"\0" * 2**16


def picture(seed: int) -> bytes:
    """A PNG of one pixel that tells its seed by its colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    out = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    out.seek(0, io.SEEK_END)
    out.write(chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)))
    out.write(chunk(b"IDAT", zlib.compress(b"\0" + seed.to_bytes(3, "big"))))
    out.write(chunk(b"IEND", b""))
    return out.getvalue()


class FakeComfyUI:
    """`faults`: route -> what it answers there instead; `drawn` are the seeds that it was given."""

    def __init__(self, faults: dict[str, Handler] | None = None):
        self.faults = faults or {}
        self.history: dict[str, Any] = {}
        self.drawn: list[int] = []
        self.queue: dict[str, list[Any]] = {"queue_running": [], "queue_pending": []}
        self.filename = "x_00001_.png"
        self.forgets = self.never_ends = self.says_nothing = False

    def app(self) -> web.Application:
        routes: dict[str, tuple[str, Handler]] = {
            "/system_stats": ("GET", self.about),
            "/queue": ("GET", self.queued),
            "/prompt": ("POST", self.prompt),
            "/history": ("GET", self.all),
            "/history/{id}": ("GET", self.one),
            "/object_info/{kind}": ("GET", self.has),
            "/view": ("GET", self.view),
            "/ws": ("GET", self.socket),
        }
        app = web.Application(client_max_size=2**26)
        for path, (method, handler) in routes.items():
            app.router.add_route(method, path, self.faults.get(path, handler))
        app.router.add_post("/queue", self.has)
        app.router.add_post("/interrupt", self.has)
        return app

    async def about(self, request: web.Request) -> web.Response:
        return web.json_response({"system": {"comfyui_version": "fake"}, "devices": []})

    async def queued(self, request: web.Request) -> web.Response:
        return web.json_response(self.queue)

    async def prompt(self, request: web.Request) -> web.Response:
        asked = await request.json()
        key, graph = asked["prompt_id"], asked["prompt"]
        seed = next((n["inputs"]["seed"] for n in graph.values() if "seed" in n["inputs"]), 0)
        self.drawn.append(seed)
        saving = [key for key, n in graph.items() if n["class_type"] == "SaveImage"]
        images = [{"filename": self.filename, "subfolder": str(seed), "type": "output"}]
        outputs = {} if self.says_nothing else {node: {"images": images} for node in saving}
        messages = [
            ["execution_start", {"timestamp": 1000}],
            ["execution_success", {"timestamp": 1500}],
        ]
        if self.never_ends:
            self.queue["queue_running"].append([0, key, {}, {}, []])
        elif not self.forgets:
            status = {"status_str": "success", "completed": True, "messages": messages}
            self.history[key] = {"prompt": [], "outputs": outputs, "status": status}
        return web.json_response({"prompt_id": key, "number": 1, "node_errors": {}})

    async def all(self, request: web.Request) -> web.Response:
        return web.json_response(self.history)

    async def one(self, request: web.Request) -> web.Response:
        key = request.match_info["id"]
        return web.json_response({key: self.history[key]} if key in self.history else {})

    async def has(self, request: web.Request) -> web.Response:
        return web.json_response({"known": {}})

    async def view(self, request: web.Request) -> web.Response:
        return web.Response(body=picture(int(request.query["subfolder"])), content_type="image/png")

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for _ in socket:
            pass
        return socket


@contextmanager
def served(fake: FakeComfyUI) -> Iterator[str]:
    """Its address, while it runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(fake.app(), shutdown_timeout=0)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]  # pyright: ignore

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def says(body: Any, status: int = 200, **headers: str) -> Handler:
    """One answer, whatever is asked."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {key.replace("_", "-"): value for key, value in headers.items()}

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=data, status=status, headers=named)

    return answer


async def endless(request: web.Request) -> web.StreamResponse:
    """A body without an end."""
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(ENDLESS)


async def trickling(request: web.Request) -> web.StreamResponse:
    """A byte now and then."""
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(b" ")
        await asyncio.sleep(0.05)


async def broken_off(request: web.Request) -> web.StreamResponse:
    """A body that ends before it is whole."""
    answer = web.StreamResponse(headers={"Content-Length": "1000"})
    await answer.prepare(request)
    await answer.write(b"\x89PNG")
    assert request.transport is not None
    request.transport.abort()
    return answer


async def no_http(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(b"what?\r\n\r\n")  # pyright: ignore
    await asyncio.sleep(0.1)
    request.transport.abort()
    return web.StreamResponse()


async def babbling(request: web.Request) -> web.WebSocketResponse:
    """A websocket that says anything but what it should."""
    socket = web.WebSocketResponse(compress=False)
    await socket.prepare(request)
    for text in BABBLE:
        await socket.send_str(text)
    await socket.send_str("x" * 2**25)
    return socket


def failing_first(times: int, fault: Handler, then: Handler) -> Handler:
    """A fault so many times, then what is right."""
    left = [times]

    async def answer(request: web.Request) -> web.StreamResponse:
        left[0] -= 1
        return await (fault if left[0] >= 0 else then)(request)

    return answer
