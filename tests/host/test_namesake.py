"""Beside RES4LYF, which has a node SD35Loader too: both packs' workflows run, none is garbled."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sd35_core.workflow.check import check
from sd35_core.workflow.known_nodes import as_ours
from sd35_core.workflow.own_nodes import ALIAS, LOADER
from tools import browser as browsers
from tools import chromium
from tools import host as hosts

from ..conftest import PACK

NEIGHBOUR = PACK / "tests" / "data" / "res4lyf.py"
THEIRS = {
    "model_name": "sd3.5_medium.safetensors",
    "weight_dtype": "fp8_e4m3fn",
    "clip_name1": "clip_g.safetensors",
    "clip_name2_opt": ".none",
    "clip_name3_opt": ".none",
    "vae_name": ".use_ckpt_vae",
}
AS_OURS = {
    "model": "sd3.5_medium.safetensors", "clip_l": "none", "clip_g": "clip_g.safetensors",
    "t5xxl": "none", "vae": "from model file", "weight_dtype": "fp8_e4m3fn",
}  # fmt: skip


def with_neighbour(base: Path, first: bool) -> None:
    """The host loads packs in the order in which the system lists their folders."""
    folder = base / "custom_nodes"
    for name in ("a", "b", "c", "d") if first else ("w", "x", "y", "z"):
        (folder / f"{name}_res4lyf").mkdir(parents=True)
        shutil.copy(NEIGHBOUR, folder / f"{name}_res4lyf" / "__init__.py")


@pytest.fixture(scope="module", params=[True, False], ids=["before", "after"])
def beside(
    request: pytest.FixtureRequest, comfyui: hosts.Host, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[hosts.Server]:
    base = tmp_path_factory.mktemp("beside")
    if request.param:
        with_neighbour(base, first=True)
    hosts.link_pack(base / "custom_nodes")
    if not request.param:
        with_neighbour(base, first=False)
    with hosts.Server(comfyui, base, ["--cpu"]) as server:
        yield server


def test_both_packs_prompts_run(beside: hosts.Server, workflow: dict[str, Any]) -> None:
    known = hosts.call(beside.url, "/object_info")
    assert known[LOADER]["category"] == "RES4LYF/loaders" and ALIAS in known
    history = hosts.run_prompt(beside.url, workflow)
    assert any(output.get("images") for output in history["outputs"].values())
    history = hosts.run_prompt(beside.url, {"1": {"class_type": LOADER, "inputs": THEIRS}})
    assert history["outputs"]["1"]["text"] == ["theirs: sd3.5_medium.safetensors"]


def test_our_canvas_workflows_open_with_every_value_in_its_place(beside: hosts.Server) -> None:
    if chromium.find_browser() is None:
        pytest.skip("no Chromium: set SD35_CHROMIUM to one")
    import json

    saved = json.loads((PACK / "workflows" / "text_to_image.json").read_text("utf-8"))
    before = next(n for n in saved["nodes"] if n["type"] == LOADER)["widgets_values"]
    with browsers.canvas(beside.url, nodes_2=False) as page:
        browsers.load(page, saved)
        node = page.evaluate(
            f"() => {{ const n = app.graph.nodes.find((n) => n.type === '{ALIAS}');"
            " return n && n.widgets.map((w) => w.value); }}".replace("}}", "}")
        )
    assert node is not None and node[: len(before)] == before


def test_their_prompt_is_read_as_ours_without_them(server: hosts.Server) -> None:
    assert as_ours(THEIRS) == AS_OURS
    with pytest.raises(hosts.HostError, match="sd3.5_medium.safetensors"):  # which is not there
        hosts.run_prompt(server.url, {
            "1": {"class_type": LOADER, "inputs": THEIRS},
            "2": {"class_type": "EmptySD3LatentImage",
                  "inputs": {"width": 128, "height": 128, "batch_size": 1}},
            "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 2]}},
            "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
        })  # fmt: skip


def test_their_canvas_workflow_opens_with_every_value_in_its_place(server: hosts.Server) -> None:
    if chromium.find_browser() is None:
        pytest.skip("no Chromium: set SD35_CHROMIUM to one")
    theirs = {
        "id": 1, "type": LOADER, "pos": [0, 0], "size": [300, 200], "flags": {}, "order": 0,
        "mode": 0, "inputs": [], "outputs": [], "properties": {"cnr_id": "RES4LYF"},
        "widgets_values": list(THEIRS.values()),
    }  # fmt: skip
    saved = {"last_node_id": 1, "last_link_id": 0, "nodes": [theirs], "links": [], "version": 0.4}
    with browsers.canvas(server.url, nodes_2=False) as page:
        browsers.load(page, saved)
        values = page.evaluate(
            "() => Object.fromEntries(app.graph.nodes[0].widgets.map((w) => [w.name, w.value]))"
        )
    assert {key: values[key] for key in AS_OURS} == AS_OURS


def test_the_check_says_whose_loader_it_is() -> None:
    graph = {
        "1": {"class_type": LOADER, "inputs": THEIRS},
        "2": {"class_type": "SkipLayerGuidance",
              "inputs": {"model": ["1", 0], "layers": "7, 8, 9", "scale": 2.5, "start": 0.01,
                         "end": 0.2}},
        "3": {"class_type": "KSampler",
              "inputs": {"model": ["2", 0], "steps": 28, "cfg": 4.0, "scheduler": "normal"}},
    }  # fmt: skip
    said = check(graph, lambda folder, name: None)["3"]
    assert any("RES4LYF" in finding.text for finding in said)
