"""Prompts in the API's format, made of the pack's own workflows."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import uuid
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from tools import host as hosts

from ..conftest import PACK


def picture(server: hosts.Server, workflow: dict[str, Any]) -> np.ndarray:
    (data,) = hosts.pictures(server.url, hosts.run_prompt(server.url, workflow))
    return np.asarray(Image.open(io.BytesIO(data)))


def changed(workflow: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """A copy with inputs set on whichever node has them."""
    workflow = copy.deepcopy(workflow)
    for name, value in inputs.items():
        nodes = [node for node in workflow.values() if name in node["inputs"]]
        assert nodes, name
        nodes[0]["inputs"][name] = value
    return workflow


WORKFLOWS: dict[str, dict[str, Any]] = {
    "text_to_image": {"width": 64, "height": 64},
    "image_to_image": {},
    "inpaint": {},
    "controlnet_canny": {},
}
"""Files of workflows/api, and what is set in them."""


Prompt = dict[str, Any]


def short(name: str, seed: int = 1, steps: int = 3, **inputs: Any) -> Prompt:
    """A workflow of few steps; `inputs` are set in the widgets of every node that has them."""
    path = PACK / "workflows" / "api" / f"{name}.json"
    prompt = json.loads(path.read_text(encoding="utf-8"))
    values = {"seed": seed, "steps": steps, **WORKFLOWS[name], **inputs}
    for node in prompt.values():
        widgets = {k for k, v in node["inputs"].items() if not isinstance(v, list)}
        node["inputs"].update({k: v for k, v in values.items() if k in widgets})
    return prompt


def skipping(**inputs: Any) -> Prompt:
    """Text to image with Skip Layer Guidance."""
    prompt = short("text_to_image")
    values = {"model": ["1", 0], "layers": "1", "scale": 2.0, "start": 0.0, "end": 0.5, **inputs}
    prompt["20"] = {"class_type": "SkipLayerGuidance", "inputs": values}
    prompt["5"]["inputs"]["model"] = ["20", 0]
    return prompt


ENDS = ("execution_success", "execution_error", "execution_interrupted")


Event = dict[str, Any]


def followed(url: str, prompt: Prompt, act: Callable[[Event], None]) -> Event:
    """Queue a prompt, show every event of it to `act`, give the last."""

    async def follow() -> Event:
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession(url) as session,
            session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            answer = await session.post("/prompt", json={"prompt": prompt, "client_id": client})
            assert answer.status == 200, await answer.text()
            prompt_id = (await answer.json())["prompt_id"]
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                if event["data"].get("prompt_id") != prompt_id:
                    continue
                if event["type"] in ENDS:
                    return event
                act(event)
        raise AssertionError("the server closed the connection")

    return asyncio.run(follow())


def cancelled(server: hosts.Server, prompt: Prompt, when: Callable[[Event], bool]) -> str:
    """Interrupt a run at the first event that `when` waits for; the node at which it ended."""
    asked: list[Event] = []

    def act(event: Event) -> None:
        if not asked and when(event):
            asked.append(event)
            hosts.call(server.url, "/interrupt", {})

    end = followed(server.url, prompt, act)
    assert asked and end["type"] == "execution_interrupted", end
    return end["data"]["node_id"]


def failed(
    server: hosts.Server, prompt: Prompt, act: Callable[[Event], None] = lambda event: None
) -> str:
    """What the person is told of a run that ends in an error."""
    end = followed(server.url, prompt, act)
    assert end["type"] == "execution_error", end
    return end["data"]["exception_message"]


def is_step(event: Event, node: str, step: int) -> bool:
    data = event["data"]
    return event["type"] == "progress" and (data["node"], data["value"]) == (node, step)
