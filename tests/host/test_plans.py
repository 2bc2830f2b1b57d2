"""The canvas' questions to a running server: hostile ones cost themselves alone."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import psutil
import pytest

from tools import host as hosts

from ..unit.hostile_plans import HOSTILE, node, sampler

AT_ONCE = 20
ALLOWED_MB = 50
SLOWEST = (
    "layers without end",
    "twenty thousand samplers",
    "samplers and decoders",
    "skips in a row",
)


async def asked(session: aiohttp.ClientSession, body: bytes) -> tuple[int, dict[str, Any]]:
    async with session.post("/sd35/plan", data=body) as answer:
        return answer.status, json.loads(await answer.read())


async def queue_seconds(session: aiohttp.ClientSession, over: asyncio.Event) -> list[float]:
    """How long /queue takes, asked until the others are done."""
    found = []
    while not over.is_set():
        start = time.perf_counter()
        async with session.get("/queue") as answer:
            assert answer.status == 200
            await answer.read()
        found.append(time.perf_counter() - start)
        await asyncio.sleep(0.01)
    return found


async def together(url: str, bodies: list[bytes]) -> tuple[list[tuple[int, Any]], list[float]]:
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        over = asyncio.Event()
        watching = asyncio.create_task(queue_seconds(session, over))
        await asyncio.sleep(0.1)
        answers = await asyncio.gather(*(asked(session, body) for body in bodies))
        over.set()
        return answers, await watching


def test_the_queue_answers_while_twenty_hostile_plans_are_in_flight(server: hosts.Server) -> None:
    bodies = [json.dumps(HOSTILE[name]).encode() for name in SLOWEST]
    bodies.append(json.dumps({"1": sampler(denoise=1e-300)}).encode())
    answers, seconds = asyncio.run(together(server.url, [*bodies] * (AT_ONCE // len(bodies))))
    assert {status for status, _ in answers} <= {200, 413}
    assert len(seconds) > 10
    assert max(seconds) < 2, "in turn, with half a second each, the plans would take ten"


def test_the_whole_hostile_corpus_leaves_the_server_as_it_was(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    bodies = [json.dumps(graph).encode() for graph in HOSTILE.values()]
    bodies += [b"[" * 1_900_000, b"[" + b"{}," * 600_000 + b"{}]", b"x" * 3_000_000, b""]
    hosts.run_prompt(server.url, workflow)
    said = len(server.log_tail(10**6))
    before = process.memory_info().rss / 1e6
    for start in range(0, len(bodies), AT_ONCE):
        answers, _ = asyncio.run(together(server.url, bodies[start : start + AT_ONCE]))
        assert all(status in (200, 400, 413) for status, _ in answers)
        assert all(found.get("error", "words") for _, found in answers)
        assert hosts.run_prompt(server.url, workflow)["outputs"], "the next good prompt works"
    assert process.memory_info().rss / 1e6 - before < ALLOWED_MB
    assert "Traceback" not in server.log_tail(10**6)[said:]


def test_hostile_workflows_cost_the_migration_its_budget_alone(server: hosts.Server) -> None:
    async def ask(body: bytes) -> int:
        async with (
            aiohttp.ClientSession(server.url) as session,
            session.post("/sd35/migrate", data=body) as answer,
        ):
            found = json.loads(await answer.read())
            assert found.get("report") or found["error"]
            return answer.status

    for name in SLOWEST:
        started = time.perf_counter()
        assert asyncio.run(ask(json.dumps(HOSTILE[name]).encode())) in (200, 413)
        assert time.perf_counter() - started < 5, name


def test_too_many_questions_are_refused_and_the_next_one_is_answered(server: hosts.Server) -> None:
    body = json.dumps(HOSTILE["a hundred ControlNets on ten thousand steps"]).encode()
    answers, seconds = asyncio.run(together(server.url, [body] * 60))
    words = {found.get("error", "") for status, found in answers if status == 413}
    assert any("Too many workflows wait" in text for text in words)
    assert len(seconds) > 10, "the queue answers meanwhile"
    assert hosts.call(server.url, "/sd35/plan", {"1": sampler()})["1"]["sigmas"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"prompt": {"1": {"class_type": "A", "inputs": {}}}, "nodes": 5}', {}, 200),
        (b'{"1": {"class_type": "A", "inputs": {}}}', {"Content-Type": "x; charset=nosuch"}, 200),
        (b"{}", {"Content-Type": "application/json; charset=utf-7"}, 400),
        (b"\xff\xfe\xfd", {}, 400),
        (b"[]", {}, 400),
        (b"x" * 2_000_001, {}, 413),
    ],
)
def test_odd_bodies_get_an_answer_in_words(
    server: hosts.Server, body: bytes, headers: dict[str, str], status: int
) -> None:
    async def ask() -> tuple[int, dict[str, Any]]:
        async with (
            aiohttp.ClientSession(server.url) as session,
            session.post("/sd35/plan", data=body, headers=headers) as answer,
        ):
            return answer.status, json.loads(await answer.read())

    seen, found = asyncio.run(ask())
    assert seen == status and (status == 200 or len(found["error"]) > 20)


def test_a_body_that_does_not_come_costs_nobody_anything(server: hosts.Server) -> None:
    async def trickle() -> int:
        port = int(server.url.rpartition(":")[2])
        writers = []
        for _ in range(40):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /sd35/plan HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{"
            )
            writers.append(writer)
        async with aiohttp.ClientSession(server.url) as session:
            status, _ = await asked(session, json.dumps({"1": sampler()}).encode())
        for writer in writers:
            writer.close()
        return status

    assert asyncio.run(trickle()) == 200


def with_check(workflow: dict[str, Any]) -> dict[str, Any]:
    """Put SD35Check before the sampler; the sampler's inputs."""
    inputs = workflow["5"]["inputs"]
    names = ("model", "positive", "negative", "latent")
    workflow["90"] = node("SD35Check", **{name: inputs[name] for name in names}, strict="report")
    inputs.update({name: ["90", slot] for slot, name in enumerate(names)})
    return inputs


def test_the_check_says_so_in_a_run_and_the_next_one_works(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    """Names that would forge a line of the log, halves of characters, numbers without measure."""
    inputs = with_check(workflow)
    workflow["91"] = node("LoraLoaderModelOnly", lora_name="\ud800\nINFO forged \x1b[31m")
    inputs.update(steps=4)
    workflow["91"]["inputs"]["model"] = inputs["model"]  # not queued: it leads nowhere
    history = hosts.run_prompt(server.url, workflow)
    assert history["outputs"]["90"]["text"]
    assert "\nINFO forged" not in server.log_tail(2_000)


def test_a_workflow_that_is_too_large_for_the_check_is_drawn_all_the_same(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    inputs = with_check(workflow)
    inputs.update(steps=4)
    skip = {"layers": "1", "scale": 0.0, "start": 0.1, "end": 0.2}
    for number in range(101):
        workflow[f"s{number}"] = node("SkipLayerGuidance", model=[f"s{number + 1}", 0], **skip)
    workflow["s100"]["inputs"]["model"] = ["1", 0]
    workflow["90"]["inputs"]["model"] = ["s0", 0]
    history = hosts.run_prompt(server.url, workflow)
    assert history["outputs"]["90"]["text"] and history["outputs"]["7"]["images"]
    assert "too large to check" in server.log_tail(2_000)
