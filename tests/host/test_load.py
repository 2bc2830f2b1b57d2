"""Prompts of every kind from eight clients at once: nothing is lost, mixed up or leaked.

SD35_LOAD_PROMPTS says how many. `--log-cli-level=INFO` shows the server's memory on the way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import aiohttp
import psutil
import pytest

from tools import host as hosts

from .prompts import WORKFLOWS, Prompt, short, skipping

log = logging.getLogger(__name__)

CLIENTS, PROMPTS = 8, int(os.environ.get("SD35_LOAD_PROMPTS", 60))
LOST_SECONDS = 600
"""A prompt that says nothing for so long counts as lost."""
ALLOWED_MB = 150
"""Growth after the first two fifths. Measured: memory comes in steps of 40 to 90 MB, as threads
get heaps of their own, 160 MB in all; after 200 prompts 300 more add 6 MB. A leaked copy of the
model would be 39 MB a picture, 600 MB in all."""
SEEDS = (1, 2, 3)
LONG = {"seed": 9, "steps": 500}
"""Never done. One seed alone: of every other prompt that does not end ComfyUI keeps 70 to 300 kB,
whoever's the nodes are."""
ENDS = ("execution_success", "execution_error", "execution_interrupted")
KINDS = {
    "a picture": 8,
    "refused": 3,
    "failing": 3,
    "deleted": 2,
    "interrupted": 2,
    "the same id twice": 2,
    "disconnecting": 4,
}
"""What a prompt comes to -> how often."""

Key = tuple[str, int]
"""(workflow, seed)."""


def linked(value: Any) -> Prompt:
    """Text to image with another link, or none, at the sampler's positive prompt."""
    prompt = short("text_to_image")
    prompt["5"]["inputs"]["positive"] = value
    if value is None:
        del prompt["5"]["inputs"]["positive"]
    return prompt


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": short("text_to_image", steps=0)}, "Value 0 smaller than min of 1: steps"),
    ({"prompt": short("text_to_image", model="gone.safetensors")}, "'gone.safetensors' not in"),
    ({"prompt": short("text_to_image", sampler="ddim")}, "sampler: 'ddim' not in"),
    ({"prompt": linked(None)}, "SD35Sampler (5): Required input is missing: positive"),
    ({"prompt": linked(["1", 2])}, "received_type(VAE) mismatch input_type(CONDITIONING)"),
    ({"prompt": {}}, "Prompt has no outputs"),
    ({}, "No prompt provided"),
]
"""What the host does not take, and what it says."""
FAILING: list[tuple[Prompt, str]] = [
    (skipping(layers="99"), "there is no layer 99"),
    (skipping(layers="1, x"), "'x' is not a layer number"),
    (skipping(start=0.6), "start is 0.6 and end is 0.5"),
    (short("text_to_image", width=8192, height=16), "position table ends at 512x512"),
    (short("text_to_image", clip_l="none", clip_g="none", t5xxl="none"), "clip input is invalid"),
    (short("controlnet_canny", kind="depth"), "kind is depth, but the ControlNet was trained"),
]  # fmt: skip
"""What fails once it runs, and what is said."""


@dataclass
class Load:
    """What became of all prompts."""

    url: str
    process: psutil.Process
    jobs: list[tuple[str, Key]]
    expected: dict[Key, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    gone: set[str] = field(default_factory=set)
    """Ids that must never have run."""
    history: dict[str, Any] = field(default_factory=dict)
    held: list[float] = field(default_factory=list)
    """The server's resident memory in MB before the first prompt and after each."""

    def measure(self) -> None:
        self.held.append(self.process.memory_info().rss / 1e6)


class Client:
    """Someone with a websocket who does one thing after the other."""

    def __init__(self, load: Load, session: aiohttp.ClientSession, number: int):
        self.load, self.session, self.chance = load, session, random.Random(number)

    async def connect(self) -> None:
        """Under a new name, as a page that is opened again."""
        self.name = uuid.uuid4().hex
        self.socket = await self.session.ws_connect(f"/ws?clientId={self.name}", max_msg_size=0)

    async def post(self, path: str, data: Any) -> tuple[int, str]:
        async with self.session.post(path, json=data) as answer:
            return answer.status, await answer.text()

    async def get(self, path: str, **query: str) -> Any:
        async with self.session.get(path, params=query) as answer:
            assert answer.status == 200, path
            return await (answer.json() if "json" in answer.content_type else answer.read())

    async def queue(self, prompt: Prompt, prompt_id: str | None = None) -> str:
        """Queue a prompt that the host has to take; gives its id."""
        prompt_id = prompt_id or str(uuid.uuid4())
        data = {"prompt": prompt, "prompt_id": prompt_id, "client_id": self.name}
        status, text = await self.post("/prompt", data)
        assert status == 200, text
        assert json.loads(text)["prompt_id"] == prompt_id
        return prompt_id

    async def event(self, prompt_id: str, *kinds: str) -> dict[str, Any]:
        """The next event of some kinds about a prompt."""
        async for message in self.socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            if event["type"] in kinds and event["data"].get("prompt_id") == prompt_id:
                return event
        raise AssertionError("the websocket ended")

    async def end(self, prompt_id: str) -> dict[str, Any]:
        """The history of a prompt, which the host writes just after it says that it ended."""
        while not (found := await self.get(f"/history/{prompt_id}")):
            await asyncio.sleep(0.1)
        return found[prompt_id]

    async def saved(self, outputs: Any) -> list[bytes]:
        """The files that SaveImage wrote."""
        images = [image for output in outputs for image in output.get("images", ())]
        return [await self.get("/view", **i) for i in images if i["type"] == "output"]

    async def has_picture(self, entry: dict[str, Any], key: Key) -> None:
        assert entry["status"]["status_str"] == "success", hosts.failure(entry)
        assert await self.saved(entry["outputs"].values()) == [self.load.expected[key]], key

    async def a_picture(self, key: Key) -> None:
        prompt_id = await self.queue(short(*key))
        assert (await self.event(prompt_id, *ENDS))["type"] == "execution_success"
        await self.has_picture(await self.end(prompt_id), key)

    async def refused(self, _: Key) -> None:
        data, words = self.chance.choice(REFUSED)
        data = {"prompt_id": str(uuid.uuid4()), **data}
        status, text = await self.post("/prompt", data)
        assert status == 400 and words in hosts.refusal(text), text
        self.load.gone.add(data["prompt_id"])

    async def failing(self, _: Key) -> None:
        prompt, words = self.chance.choice(FAILING)
        prompt_id = await self.queue(prompt)
        event = await self.event(prompt_id, *ENDS)
        assert event["type"] == "execution_error", event
        assert words in event["data"]["exception_message"]
        entry = await self.end(prompt_id)
        assert entry["status"]["status_str"] == "error" and words in hosts.failure(entry)
        assert not await self.saved(entry["outputs"].values())

    async def deleted(self, key: Key) -> None:
        prompt_id = await self.queue(short(*key))
        await self.post("/queue", {"delete": [prompt_id]})
        running = (await self.get("/queue"))["queue_running"]
        late = prompt_id in [item[1] for item in running]
        if late or await self.get(f"/history/{prompt_id}"):
            await self.has_picture(await self.end(prompt_id), key)
        else:
            self.load.gone.add(prompt_id)

    async def interrupted(self, key: Key) -> None:
        prompt_id = await self.queue(short(key[0], **LONG))
        await self.event(prompt_id, self.chance.choice(["execution_start", "progress"]))
        await self.post("/interrupt", {"prompt_id": prompt_id})
        assert (await self.event(prompt_id, *ENDS))["type"] == "execution_interrupted"
        entry = await self.end(prompt_id)
        assert hosts.failure(entry) == "The run was interrupted."
        assert not await self.saved(entry["outputs"].values())

    async def the_same_id_twice(self, key: Key) -> None:
        """The host runs both: each one's picture comes by websocket, history keeps the last."""
        name, seed = key
        keys = [key, (name, SEEDS[SEEDS.index(seed) - 1])]
        prompt_id = await self.queue(short(*keys[0]))
        await self.queue(short(*keys[1]), prompt_id)
        for each in keys:
            outputs = []
            while (event := await self.event(prompt_id, "executed", *ENDS))["type"] not in ENDS:
                outputs.append(event["data"]["output"] or {})
            assert event["type"] == "execution_success"
            assert await self.saved(outputs) == [self.load.expected[each]], each
        while (entry := await self.end(prompt_id))["prompt"][2] != short(*keys[1]):
            await asyncio.sleep(0.1)
        await self.has_picture(entry, keys[1])

    async def disconnecting(self, key: Key) -> None:
        prompt_id = await self.queue(short(*key))
        if self.chance.random() < 0.5:
            await self.event(prompt_id, "execution_start")
        await self.socket.close()
        await self.has_picture(await self.end(prompt_id), key)
        await self.connect()

    async def work(self) -> None:
        """Take jobs until there are none."""
        await self.connect()
        while self.load.jobs:
            kind, key = self.load.jobs.pop()
            try:
                await asyncio.wait_for(getattr(self, kind.replace(" ", "_"))(key), LOST_SECONDS)
            except (AssertionError, asyncio.TimeoutError) as error:
                self.load.faults[kind].append(f"{key}: {error!r}")
                await self.socket.close()
                await self.connect()
            self.load.measure()
        await self.socket.close()


async def run(load: Load) -> None:
    """Draw every picture once, then do all jobs at once."""
    async with aiohttp.ClientSession(load.url) as session:
        clients = [Client(load, session, number) for number in range(CLIENTS)]
        first = clients[0]
        await first.connect()
        await first.post("/history", {"clear": True})
        for key in product(WORKFLOWS, SEEDS):
            entry = await first.end(await first.queue(short(*key)))
            (load.expected[key],) = await first.saved(entry["outputs"].values())
        await first.socket.close()
        load.measure()
        await asyncio.gather(*(client.work() for client in clients))
        load.history = await first.get("/history")


@pytest.fixture(scope="module")
def load(server: hosts.Server) -> Load:
    assert server.process is not None
    chance = random.Random(0)
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=PROMPTS - len(KINDS))
    kinds = chance.sample(kinds + list(KINDS), PROMPTS)
    jobs = [(kind, (chance.choice(list(WORKFLOWS)), chance.choice(SEEDS))) for kind in kinds]
    load = Load(server.url, psutil.Process(server.process.pid), jobs)
    start = time.monotonic()
    asyncio.run(run(load))
    log.info("%d prompts in %.0f s: %s", PROMPTS, time.monotonic() - start, Counter(kinds))
    log.info("MB: %s", [round(load.held[i * PROMPTS // 5]) for i in range(6)])
    return load


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_prompt_ends_as_it_should(load: Load, kind: str) -> None:
    assert not load.faults[kind]


def test_no_two_pictures_are_alike(load: Load) -> None:
    """So that a wrong one is seen."""
    assert len(set(load.expected.values())) == len(WORKFLOWS) * len(SEEDS)


def test_pictures_are_drawn_again_and_again(load: Load) -> None:
    """So that the same bytes do not come from the host's cache alone."""
    drawn = 0
    for entry in load.history.values():
        prompt, messages = entry["prompt"][2], dict(entry["status"]["messages"])
        samplers = {key for key, node in prompt.items() if node["class_type"] == "SD35Sampler"}
        cached = set(messages["execution_cached"]["nodes"])
        drawn += entry["status"]["status_str"] == "success" and not samplers & cached
    log.info("%d pictures drawn, each of %d several times", drawn, len(load.expected))
    assert drawn > 2 * len(load.expected)


def test_what_was_refused_or_deleted_never_ran(load: Load) -> None:
    assert len(load.gone) > 1
    assert not load.gone & set(load.history)


def test_prompts_run_in_the_order_of_their_numbers(load: Load) -> None:
    started = []
    for entry in load.history.values():
        messages = dict(entry["status"]["messages"])
        started.append((messages["execution_start"]["timestamp"], entry["prompt"][0]))
    numbers = [number for _, number in sorted(started)]
    assert numbers == sorted(numbers)


def test_memory_stays_flat(load: Load) -> None:
    fifth = len(load.held) // 5
    assert min(load.held[-fifth:]) - max(load.held[: 2 * fifth]) < ALLOWED_MB, load.held
