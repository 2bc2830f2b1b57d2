"""Mistakes put into working files as the canvas saves them: each gets the right sentence.

The files are the pack's own workflows; with SD35_STRANGERS naming a folder, as of ComfyUI's
templates, those of it that draw with SD3.5 are taken as well.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sd35_core.errors import SettingError
from sd35_core.workflow.check import check, files_under
from sd35_core.workflow.reader import setups
from sd35_core.workflow.setup import SD3
from sd35_core.workflow.workflow_file import api_graph, read_workflow

from ..conftest import PACK

Node = dict[str, Any]
Graph = dict[str, Node]
Mistake = Callable[[Graph, str], object]
"""(graph in the API's format, key of the sampler) -> it is changed."""

find = files_under(None)
LARGE = "sd3.5_large.safetensors"


def working() -> list[Path]:
    """Files with a sampler that draws with SD3 and of which nothing bad is said."""
    folders = [PACK / "workflows", *filter(None, [os.environ.get("SD35_STRANGERS")])]
    paths = [path for folder in folders for path in sorted(Path(folder).glob("**/*.json"))]
    return [path for path in paths if path.parent.name != "api" and sampler_of(path) is not None]


def opened(path: Path) -> Graph:
    return api_graph(read_workflow(path.read_bytes()))


def sampler_of(path: Path) -> str | None:
    """The first KSampler or sampler of ours whose model is SD3 and known."""
    try:
        graph = opened(path)
        found = setups(graph, find)
    except SettingError:
        return None
    for key, setup in found.items():
        simple = graph[key]["class_type"] in ("KSampler", "SD35Sampler")
        if simple and setup.model is not None and setup.model.kind == SD3:
            return key
    return None


FILES = working()


def at(graph: Graph, key: str, name: str) -> Node:
    """The node behind an input."""
    return graph[graph[key]["inputs"][name][0]]


def put(**values: Any) -> Mistake:
    return lambda graph, key: graph[key]["inputs"].update(values)


def between(kind: str, **inputs: Any) -> Mistake:
    """A node on the way of the model."""

    def change(graph: Graph, key: str) -> None:
        model = graph[key]["inputs"]["model"]
        graph["new"] = {"class_type": kind, "inputs": {"model": model, **inputs}}
        graph[key]["inputs"]["model"] = ["new", 0]

    return change


def latent(kind: str, **inputs: Any) -> Mistake:
    def change(graph: Graph, key: str) -> None:
        graph["new"] = {"class_type": kind, "inputs": inputs}
        name = "latent" if "latent" in graph[key]["inputs"] else "latent_image"
        graph[key]["inputs"] |= {name: ["new", 0], "denoise": 1.0}

    return change


def large(graph: Graph, key: str) -> None:
    """Large in the place of the model, loaded as the file has it."""
    graph["model"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": LARGE}}
    graph[key]["inputs"]["model"] = ["model", 0]


def turbo(graph: Graph, key: str) -> None:
    large(graph, key)
    graph["model"]["inputs"]["ckpt_name"] = "sd3.5_large_turbo.safetensors"


def other(name: str) -> Mistake:
    def change(graph: Graph, key: str) -> None:
        large(graph, key)
        graph["model"]["inputs"]["ckpt_name"] = name

    return change


def decoded_by(name: str) -> Mistake:
    def change(graph: Graph, key: str) -> None:
        graph["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": name}}
        graph["decode"] = {
            "class_type": "VAEDecode", "inputs": {"samples": [key, 0], "vae": ["vae", 0]},
        }  # fmt: skip
        for node in [n for k, n in graph.items() if n["class_type"] == "VAEDecode"]:
            node["inputs"]["vae"] = ["vae", 0]

    return change


def prompt(text: str) -> Mistake:
    def change(graph: Graph, key: str) -> None:
        graph["text"] = {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["c", 1]}}
        graph["c"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": LARGE}}
        graph[key]["inputs"]["positive"] = ["text", 0]

    return change


def encoders(kind: str, **inputs: Any) -> Mistake:
    def change(graph: Graph, key: str) -> None:
        prompt('a sign "Moor"')(graph, key)
        graph["c"] = {"class_type": kind, "inputs": inputs}
        graph["text"]["inputs"]["clip"] = ["c", 0]

    return change


def both(*mistakes: Mistake) -> Mistake:
    return lambda graph, key: [mistake(graph, key) for mistake in mistakes]


SKIP = {"layers": "7, 8, 9", "scale": 2.5, "start": 0.01, "end": 0.2}
MISTAKES: dict[str, tuple[Mistake, str, str]] = {
    "cfg 15": (both(large, put(cfg=15.0)), "high cfg", "cfg is 15"),
    "cfg 0": (both(large, put(cfg=0.0)), "zero cfg", "negative prompt alone"),
    "cfg 1": (both(large, put(cfg=1.0)), "low cfg", "prompt hardly counts"),
    "4 steps": (both(large, put(steps=4)), "few steps", "needs 20 or more"),
    "Turbo with cfg": (both(turbo, put(cfg=5.0)), "turbo cfg", "distilled"),
    "Turbo with 40 steps": (both(turbo, put(steps=40)), "turbo steps", "made for 4"),
    "Turbo with skipped layers": (
        both(turbo, between("SkipLayerGuidance", **SKIP)), "turbo slg", "spoils"),
    "karras": (
        both(large, lambda g, k: g[k]["inputs"].update(
            {"schedule" if "schedule" in g[k]["inputs"] else "scheduler": "karras"})),
        "schedule", "karras"),
    "one prompt for both": (
        both(large, put(cfg=4.5),
             lambda g, k: g[k]["inputs"].update(negative=g[k]["inputs"]["positive"])),
        "same prompts", "cancels itself"),
    "an empty prompt": (prompt(""), "empty prompt", "is empty"),
    "a prompt of 700 words": (prompt("harbour, boats " * 350), "long prompt", "T5 tokens"),
    "an empty latent at denoise 0.5": (
        both(latent("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
             put(denoise=0.5)), "denoise of nothing", "grey blur"),
    "a latent of 4 megapixels": (
        both(large, latent("EmptySD3LatentImage", width=2048, height=2048, batch_size=1)),
        "size", "4.00 megapixels"),
    "a side of 1001": (
        both(large, latent("EmptySD3LatentImage", width=1001, height=1024, batch_size=1)),
        "size multiple", "no multiple of 16"),
    "a latent beyond the table": (
        both(large, latent("EmptySD3LatentImage", width=4096, height=256, batch_size=1)),
        "size table", "ends at 3072x3072"),
    "a latent for videos": (
        both(large, latent("EmptyHunyuanLatentVideo", width=848, height=480, length=25)),
        "latent video", "EmptySD3LatentImage"),
    "FLUX in the model's place": (other("flux1-dev.safetensors"), "model", "FLUX"),
    "SDXL in the model's place": (other("sd_xl_base_1.0.safetensors"), "model", "SDXL"),
    "FLUX's VAE": (both(large, decoded_by("ae.safetensors")), "vae name", "FLUX's VAE"),
    "FreeU": (
        both(large, between("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)), "failing", "U-Nets"),
    "HyperTile": (both(large, between("HyperTile", tile_size=256)), "idle", "does nothing"),
    "ModelSamplingDiscrete": (
        both(large, between("ModelSamplingDiscrete", sampling="eps")), "model sampling", "Remove"),
    "Medium's layers on Large": (
        both(large, between("SkipLayerGuidanceDiT", double_layers="7, 8, 9", single_layers="",
                            scale=2.5, start_percent=0.01, end_percent=0.15)),
        "slg large", "SD3.5 Medium's"),
    "skipped layers from 0.8 to 0.2": (
        both(large, between("SkipLayerGuidance", **{**SKIP, "start": 0.8})), "slg window",
        "starts at 0.8"),
    "text encoders for FLUX": (
        both(large, encoders("DualCLIPLoader", clip_name1="t5xxl.safetensors",
                             clip_name2="clip_l.safetensors", type="flux")),
        "encoder type", "type to sd3"),
    "no T5 for letters": (
        both(large, encoders("DualCLIPLoader", clip_name1="clip_g.safetensors",
                             clip_name2="clip_l.safetensors", type="sd3")),
        "t5 missing", "letters"),
    "two caches": (
        both(large, between("EasyCache"), lambda g, k: g["new"].update(
            class_type="LazyCache"), lambda g, k: g.update(more={
                "class_type": "EasyCache", "inputs": {"model": ["new", 0]}}),
             put(model=["more", 0])), "caches", "Keep one"),
    "a cfg++ sampler at 6": (
        both(large, put(cfg=6.0), lambda g, k: g[k]["inputs"].update(
            {"sampler" if "sampler" in g[k]["inputs"] else "sampler_name": "euler_cfg_pp"})),
        "cfg of cfg++", "another scale"),
}  # fmt: skip


def test_there_are_files_and_enough_kinds_of_mistake() -> None:
    assert len(FILES) >= 8 and len(MISTAKES) >= 25


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_in_a_working_file_gets_its_sentence(name: str) -> None:
    mistake, rule, words = MISTAKES[name]
    for path in FILES:
        graph, key = copy.deepcopy(opened(path)), sampler_of(path)
        assert key is not None
        mistake(graph, key)
        said = check(json.loads(json.dumps(graph)), find)[key]
        rules = (rule, "model other") if rule == "model" else (rule,)  # beside a sampler with SD3
        texts = [finding.text for finding in said if finding.rule in rules]
        assert any(words in text for text in texts), f"{path.name}: {[f.rule for f in said]}"
