"""Every workflow of workflows/api through a plain client: aiohttp and ComfyUI's API alone."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import save_file

from tools import host as hosts
from tools import workflows

from ..conftest import PACK

NAMES = sorted(path.stem for path in (PACK / "workflows" / "api").glob("*.json"))
ENDS = {"execution_success", "execution_error", "execution_interrupted"}


async def run(url: str, prompt: dict[str, Any]) -> tuple[list[bytes], dict[str, Any], int]:
    """Queue, follow the websocket to the end, fetch: (pictures, outputs, steps seen)."""
    client, steps = uuid.uuid4().hex, 0
    async with aiohttp.ClientSession(url) as session:
        async with session.ws_connect(f"/ws?clientId={client}") as socket:
            answer = await session.post("/prompt", json={"prompt": prompt, "client_id": client})
            assert answer.status == 200, await answer.text()
            prompt_id = (await answer.json())["prompt_id"]
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                steps += event["type"] == "progress"
                if event["type"] in ENDS and event["data"]["prompt_id"] == prompt_id:
                    assert event["type"] == "execution_success", event
                    break
        history: dict[str, Any] = {}
        while prompt_id not in history:  # the server writes it just after it says so
            history = await (await session.get(f"/history/{prompt_id}")).json()
        outputs = history[prompt_id]["outputs"]
        pictures = []
        for output in outputs.values():
            for image in output.get("images", ()):
                pictures.append(await (await session.get("/view", params=image)).read())
        return pictures, outputs, steps


@pytest.fixture(scope="module")
def small_lora(base: Path) -> str:
    layer = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    halves = {"lora_A": torch.ones(4, 256), "lora_B": torch.zeros(256, 4)}
    path = base / "models" / "loras" / "client_lora.safetensors"
    save_file({f"{layer}.{half}.weight": x for half, x in halves.items()}, path)
    return path.name


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_client_gets_the_picture(
    server: hosts.Server, base: Path, small_lora: str, name: str
) -> None:
    prompt = json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    if workflows.files_of(prompt):
        prompt = workflows.with_small_model(prompt, lora=small_lora)
    example = base / "input" / "example.png"
    if any(node["class_type"] == "LoadImage" for node in prompt.values()) and not example.exists():
        example.parent.mkdir(exist_ok=True)
        example.write_bytes((PACK / "web" / "docs" / "canvas.png").read_bytes())
    pictures, outputs, steps = asyncio.run(run(server.url, workflows.drawn(prompt)))
    assert pictures and all(data.startswith(b"\x89PNG") for data in pictures)
    assert steps > 1
    if name == "check":
        words = [text for output in outputs.values() for text in output.get("text", ())]
        assert any(text.startswith("Nothing to say: this set-up fits SD3.5.") for text in words)
