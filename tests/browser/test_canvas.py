"""The canvas twins of the API workflows, in the real front end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tools import browser, workflows
from tools import host as hosts

from ..conftest import NANO, PACK
from .conftest import SHOTS, read

RUN_SECONDS = 120
MISSING_FILES = """() => {
    const { $pinia } = document.querySelector("#vue-app").__vue_app__.config.globalProperties;
    const found = $pinia._s.get("missingModel").missingModelCandidates ?? [];
    return found.map(({ name, url, directory }) => ({ name, url, directory }));
}"""
"""What the front end lists as missing, with a button to download each."""
WORKFLOWS = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))


def essence(prompt: dict[str, Any]) -> dict[str, Any]:
    """Class types and inputs, without titles."""
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


def test_every_workflow_has_its_twin_and_thumbnail() -> None:
    assert sorted(p.stem for p in (PACK / "workflows" / "api").glob("*.json")) == WORKFLOWS
    for name in WORKFLOWS:
        assert (PACK / "workflows" / f"{name}.jpg").stat().st_size > 1000


@pytest.fixture(scope="module")
def canvas(
    server: hosts.Server, request: pytest.FixtureRequest
) -> Iterator[tuple[browser.Page, str]]:
    """One page for all workflows, and the renderer's name."""
    with browser.canvas(server.url, request.param == "nodes2") as page:
        yield page, request.param


@pytest.fixture(scope="module")
def small_lora(server: hosts.Server) -> str:
    """A LoRA for the small model, which changes it a little and at random."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    layer = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    halves = {"lora_A": torch.randn(4, 256), "lora_B": torch.randn(256, 4)}
    path = server.base / "models" / "loras" / "small_lora.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{layer}.{half}.weight": 0.1 * x for half, x in halves.items()}, path)
    return path.name


@pytest.fixture(scope="module")
def model_copy(server: hosts.Server) -> str:
    """A copy of the small model, for workflows that write a file beside it."""
    path = server.base / "models" / "checkpoints" / "copy.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(NANO, path)
    return path.name


def ours_in(page: browser.Page) -> list[str]:
    """Errors in the page's console that name the pack."""
    messages: list[str] = page.messages  # pyright: ignore
    return [m for m in messages if "sd35" in m.lower() and m.startswith(("error", "page"))]


def run_on_canvas(page: browser.Page, url: str) -> dict[str, Any]:
    """Queue the open workflow as the button does, wait for its end, give its history."""
    before = set(hosts.call(url, "/history"))
    page.evaluate("() => window.app.queuePrompt(0)")
    for _ in range(5 * RUN_SECONDS):
        page.wait_for_timeout(200)
        if done := set(hosts.call(url, "/history")) - before:
            page.wait_for_timeout(500)
            return hosts.call(url, "/history")[done.pop()]
    raise TimeoutError(f"no end after {RUN_SECONDS} s")


def run_without_canvas(url: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """As from a script; in a thread, because the browser has this one's event loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(hosts.run_prompt, url, prompt).result()


@pytest.mark.parametrize("canvas", ["classic", "nodes2"], indirect=True)
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_exports_to_its_twin_and_runs(
    server: hosts.Server,
    canvas: tuple[browser.Page, str],
    small_lora: str,
    model_copy: str,
    name: str,
) -> None:
    SHOTS.mkdir(exist_ok=True)
    page, renderer = canvas
    page.messages.clear()  # pyright: ignore
    browser.load(page, read(PACK / "workflows" / f"{name}.json"))
    page.screenshot(path=str(SHOTS / f"{name}_{renderer}.png"))
    assert page.evaluate("() => app.canvas.ds.scale") >= 0.7, "it fits the window and can be read"
    seen = browser.exported(page)
    expected = read(PACK / "workflows" / "api" / f"{name}.json")
    assert essence(seen) == essence(expected)
    files = workflows.files_of(expected)
    assert not ours_in(page)
    missing = page.evaluate(MISSING_FILES)
    assert sorted(missing, key=str) == sorted(map(workflows.download, files), key=str)
    if renderer == "classic" and name != "text_to_image":
        return  # the prompt is the twin's, which the other renderer runs
    if files:
        history = run_without_canvas(server.url, workflows.with_small_model(seen, lora=small_lora))
    elif any(node["class_type"] == "SD35Quantize" for node in seen.values()):
        seen["1"]["inputs"]["model"] = model_copy
        history = run_without_canvas(server.url, seen)
    else:
        history = run_on_canvas(page, server.url)
        page.screenshot(path=str(SHOTS / f"{name}_{renderer}_done.png"))
    assert history["status"]["status_str"] == "success"
    assert any(output.get("images") for output in history["outputs"].values())
    assert not ours_in(page)


def test_help_pages_are_served_for_every_node(server: hosts.Server) -> None:
    import urllib.request

    for path in (PACK / "web" / "docs").glob("*.md"):
        url = f"{server.url}/extensions/{hosts.PACK_NAME}/docs/{path.name}"
        with urllib.request.urlopen(url) as answer:
            assert answer.read().decode() == path.read_text(encoding="utf-8")
    assert {p.stem for p in (PACK / "web" / "docs").glob("*.md")} == {
        "SD35Check",
        "SD35ControlHint",
        "SD35ControlNetApply",
        "SD35ControlNetLoader",
        "SD35Loader",
        "SD35ModelLoader",
        "SD35StepCache",
        "SD35Quantize",
        "SD35Sampler",
        "SD35Sigmas",
        "SD35SkipLayerSweep",
        "SD35TrainLoRA",
        "SD35Upscale",
        "SkipLayerGuidance",
    }
