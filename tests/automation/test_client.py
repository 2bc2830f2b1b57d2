"""The client against a real ComfyUI: results, cancelling, lost connections, restarts, refusals."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from automation.client import Client, Step
from automation.errors import RefusedError, RunError, ServerError
from automation.workflow import Workflow, overridden
from tools import host as hosts

from ..conftest import PACK


def test_a_workflow_gives_its_picture_texts_and_progress(
    server: hosts.Server, quick: Workflow
) -> None:
    steps: list[Step] = []
    quick["5"]["inputs"]["seed"] = 991  # which no other test draws: the server remembers

    async def draw() -> tuple[bytes, bytes]:
        async with Client(server.url) as client:
            results = [await client.run(quick, steps.append), await client.run(quick)]
            first, again = [await client.fetch(result.files[0]) for result in results]
            return first, again

    first, again = asyncio.run(draw())
    assert first.startswith(b"\x89PNG") and first == again
    assert [step.done for step in steps if step.total == 4][-1] == 4


def test_many_at_once_each_get_their_own(server: hosts.Server, quick: Workflow) -> None:
    async def draw() -> list[bytes]:
        async with Client(server.url) as client:
            prompts = [overridden(quick, {"SD35Sampler.seed": seed % 3}) for seed in range(6)]
            results = await asyncio.gather(*(client.run(prompt) for prompt in prompts))
            return [await client.fetch(result.files[0]) for result in results]

    pictures = asyncio.run(draw())
    assert pictures[:3] == pictures[3:] and len(set(pictures)) == 3


def test_a_cancelled_prompt_says_so_and_the_next_one_works(
    server: hosts.Server, quick: Workflow
) -> None:
    async def draw() -> None:
        async with Client(server.url) as client:
            long = overridden(quick, {"SD35Sampler.steps": 200, "SD35Sampler.seed": 77})
            prompt_id = await client.submit(long)
            while await client.state(prompt_id) != "running":
                await asyncio.sleep(0.05)
            waiting = asyncio.create_task(client.wait(prompt_id))
            await client.cancel(prompt_id)
            with pytest.raises(RunError, match="cancelled"):
                await waiting
            assert (await client.run(quick)).files

    asyncio.run(draw())


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def test_a_failing_node_and_a_refused_widget_are_named(
    server: hosts.Server, quick: Workflow
) -> None:
    async def draw() -> None:
        async with Client(server.url) as client:
            with pytest.raises(RefusedError, match="(?s)SD35Sampler.*steps"):
                await client.run(overridden(quick, {"SD35Sampler.steps": 0}))
            broken = {**quick, "8": node("LoadImage", image="gone.png")}
            broken["9"] = node("PreviewImage", images=["8", 0])
            with pytest.raises(RefusedError, match="(?s)A part of.*LoadImage.*gone.png"):
                await client.run(broken)
            wide = overridden(quick, {"EmptySD3LatentImage.width": 8192})
            with pytest.raises(RunError, match=r"DPM\+\+ 2M Shift Sampler .*position table"):
                await client.run(wide)

    asyncio.run(draw())


def test_a_server_that_is_started_anew_gets_the_prompt_again(
    comfyui: hosts.Host, tmp_path: Path, quick: Workflow
) -> None:
    """Killed in mid-run and started on the same port: one picture, from one wait."""
    with hosts.Server(comfyui, tmp_path, ["--cpu"]) as server:

        async def draw() -> int:
            async with Client(server.url) as client:
                long = overridden(quick, {"SD35Sampler.steps": 60})
                running = asyncio.Event()
                drawing = asyncio.create_task(client.run(long, lambda step: running.set()))
                await asyncio.wait_for(running.wait(), 120)
                assert server.process is not None
                server.process.kill()
                server.process.wait()
                await asyncio.to_thread(server.__enter__)
                result = await asyncio.wait_for(drawing, 120)
                assert await client.known() == {result.prompt_id}
                return len(result.files)

        assert asyncio.run(draw()) == 1
    assert len(list((tmp_path / "output").rglob("*.png"))) == 1


class Other(http.server.BaseHTTPRequestHandler):
    """A web server that is no ComfyUI."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def other() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_wrong_address_is_said(other: str) -> None:
    async def connect(url: str) -> None:
        async with Client(url, patience=1):
            pass

    with pytest.raises(ServerError, match="not as ComfyUI does"):
        asyncio.run(connect(other))
    with pytest.raises(ServerError, match="No ComfyUI answers"):
        asyncio.run(connect(f"127.0.0.1:{hosts.free_port()}"))


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACK), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "automation", *arguments],
        cwd=folder, env=environment, capture_output=True, encoding="utf-8",
    )  # fmt: skip


def test_the_command_saves_what_the_workflow_makes(
    server: hosts.Server, quick: Workflow, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(quick), encoding="utf-8")
    options = ["run", "a.json", "--server", server.url, "--out", "Bilder 图"]
    for _ in range(2):
        done = command(*options, "--set", "SD35Sampler.seed=9", folder=tmp_path)
        assert not done.returncode, done.stderr
    saved = sorted((tmp_path / "Bilder 图").iterdir())
    assert len(saved) == 2 and saved[0].read_bytes() == saved[1].read_bytes()
    done = command(*options, "--set", "SD35Sampler.sede=9", folder=tmp_path)
    assert done.returncode == 1 and "Did you mean seed" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_hosts_own_workflows_run_too(server: hosts.Server) -> None:
    image = {
        "class_type": "EmptyImage",
        "inputs": {"width": 8, "height": 8, "batch_size": 2, "color": 9},
    }
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "stock"}}

    async def draw() -> int:
        async with Client(server.url) as client:
            return len((await client.run({"1": image, "2": save})).files)

    assert asyncio.run(draw()) == 2
