"""Made-up workflows, in both formats: what the check and the canvas say of them, or a refusal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis comes with python tools/test.py")

from hypothesis import given
from hypothesis import strategies as st

from sd35_core.workflow.check import check, files_under
from sd35_core.workflow.migration import migration_answer
from sd35_core.workflow.panels import answer
from sd35_core.workflow.workflow_file import api_graph, read_workflow

from ..fuzzing import JUNK, TRICKS, WRITTEN, survives
from .stock_workflows import SKIP, stock

NUMBERS = st.sampled_from(
    [0, 1, -1, 5, 10_000, 10**9, 2**63, 2**64, 10**400, 0.5, 1e-300, 5e-324, 1e300, -0.0,
     float("nan"), float("inf")]
)  # fmt: skip
LISTS = st.sampled_from(["7, 8, 9", "0-9999," * 50, "9-1", "-", "1" * 5_000, "٣"])
LINKS = st.tuples(st.sampled_from(["1", "2", "3", "4", "5"]), st.integers(-1, 2)).map(list)
VALUES = (
    JUNK | NUMBERS | LISTS | LINKS | st.sampled_from(TRICKS)
    | st.sampled_from(["normal", "beta", "karras", "exponential", "simple", "none", "dpmpp_2m"])
)  # fmt: skip
CLASSES = st.sampled_from(
    [
        "SD35Loader", "SD35Sampler", "SkipLayerGuidance", "SD35ControlNetApply", "LoraLoader",
        "SD35ControlNetLoader", "CLIPTextEncode", "KSampler", "EmptySD3LatentImage", "VAEEncode",
        "CheckpointLoaderSimple", "SD35StepCache", "SD35Sigmas", "SamplerCustom", "SD35Check",
        "ModelSamplingSD3", "SkipLayerGuidanceDiT", "Reroute", "VAEDecode", "LatentUpscale",
        "SD35SkipLayerSweep", "SamplerCustomAdvanced", "ConditioningZeroOut",
    ]
) | st.text(max_size=6)  # fmt: skip
NAMES = st.sampled_from(
    [
        "model", "positive", "negative", "latent", "steps", "cfg", "shift", "schedule", "denoise",
        "layers", "scale", "start", "end", "control_net", "lora_name", "ckpt_name", "vae", "text",
        "width", "height", "clip", "t5xxl", "sampler", "image", "batch_size", "latent_image",
        "strength", "strength_model", "scheduler", "sampler_name", "sigmas", "guider", "samples",
    ]
)  # fmt: skip
WIDGETS = st.fixed_dictionaries(
    {"steps": st.integers(1, 40) | NUMBERS, "schedule": VALUES, "denoise": NUMBERS},
    optional={"shift": NUMBERS, "cfg": NUMBERS, "model": LINKS, "latent": LINKS,
              "positive": LINKS, "negative": LINKS, "sampler": VALUES},
)  # fmt: skip
SAMPLER = st.fixed_dictionaries({"class_type": st.just("SD35Sampler"), "inputs": WIDGETS})
ANY_NODE = st.fixed_dictionaries(
    {"class_type": CLASSES | JUNK, "inputs": st.dictionaries(NAMES, VALUES, max_size=12)}
)
API = st.dictionaries(
    st.sampled_from(["1", "2", "3", "4", "5"]), SAMPLER | ANY_NODE, max_size=5
)  # fmt: skip
SLOT = st.fixed_dictionaries(
    {"name": NAMES | JUNK}, optional={"link": st.integers(0, 5) | JUNK, "widget": JUNK}
)
NODE = st.fixed_dictionaries(
    {"id": st.integers(0, 5) | JUNK, "type": CLASSES | JUNK},
    optional={
        "inputs": st.lists(SLOT | JUNK, max_size=6) | JUNK,
        "widgets_values": st.lists(VALUES, max_size=10) | JUNK,
        "mode": st.sampled_from([0, 2, 4]) | JUNK,
        "properties": JUNK | st.fixed_dictionaries({"sd35_recipe": VALUES}),
    },
)
INSTANCES = st.sampled_from(
    ["a", "b", "SetNode", "GetNode", "PrimitiveNode", "workflow>g", "workflow/g", "workflow>"]
)
PLACES = st.sampled_from([-10, -20, 0, 1, 2, 3])
INNER_LINK = st.fixed_dictionaries(
    {"id": st.integers(0, 5), "origin_id": PLACES, "origin_slot": st.integers(-1, 2),
     "target_id": PLACES, "target_slot": st.integers(0, 2)}
)  # fmt: skip
INNER = st.fixed_dictionaries(
    {"id": st.integers(0, 3), "type": INSTANCES | CLASSES},
    optional={"inputs": st.lists(SLOT, max_size=3), "widgets_values": st.lists(VALUES, max_size=3)},
)
SUBGRAPH = st.fixed_dictionaries(
    {"id": st.sampled_from(["a", "b"]), "nodes": st.lists(INNER, max_size=4) | JUNK,
     "links": st.lists(INNER_LINK, max_size=5) | JUNK},
    optional={"inputs": st.lists(SLOT, max_size=3) | JUNK},
)  # fmt: skip
GROUP_LINK = st.tuples(*[st.integers(-1, 4) | st.none()] * 4, st.just(1), st.just("MODEL")).map(
    list
)
GROUP = st.fixed_dictionaries(
    {"nodes": st.lists(INNER | JUNK, max_size=4) | JUNK,
     "links": st.lists(GROUP_LINK | JUNK, max_size=5) | JUNK},
    optional={"external": st.lists(GROUP_LINK, max_size=3) | JUNK},
)  # fmt: skip
LINK = st.tuples(*[st.integers(0, 5)] * 5, st.just("MODEL")).map(list)
CANVAS = st.fixed_dictionaries(
    {
        "nodes": st.lists(NODE | INNER | JUNK, max_size=6) | JUNK,
        "links": st.lists(LINK | JUNK, max_size=6) | JUNK,
    },
    optional={
        "definitions": st.fixed_dictionaries({"subgraphs": st.lists(SUBGRAPH, max_size=3)}) | JUNK,
        "extra": st.fixed_dictionaries({"groupNodes": st.dictionaries(st.just("g"), GROUP)}) | JUNK,
    },
)
WORKFLOW = API | CANVAS | st.dictionaries(st.text(max_size=8), JUNK, max_size=4)


@WRITTEN
@given(WORKFLOW)
def test_workflow(tmp_path_factory: pytest.TempPathFactory, workflow: dict[str, Any]) -> None:
    models = tmp_path_factory.getbasetemp() / "models"
    outside = models.parent.resolve()
    find = files_under(models)

    def inside(folder: str, name: str) -> Path | None:
        path = find(folder, name)
        assert path is None or models.resolve() in path.resolve().parents, (path, outside)
        return path

    survives(lambda: check(workflow, inside))


@WRITTEN
@given(WORKFLOW | st.fixed_dictionaries({"prompt": API | JUNK, "nodes": JUNK}), st.integers(0, 30))
def test_plan(workflow: dict[str, Any], cut: int) -> None:
    """What the canvas asks, whole or with a few bytes missing."""
    body = json.dumps(workflow).encode()
    find = files_under(None)
    found = survives(lambda: answer(body[: len(body) - cut], find, 0.5))
    panels = json.loads(found, parse_constant=pytest.fail) if found else {}
    for panel in panels.values():
        words = [text for _, text in panel.get("findings", [])] + [panel.get("error") or ""]
        assert not any(set(text) & {"\n", "\x1b", "\ud800"} for text in words)
        assert len(panel.get("sigmas", ())) <= 10_001


STOCK = [stock(), stock(shift=2.0, skip=SKIP, controlnet="sd3.5_large_canny.safetensors")]
ANYWHERE = st.lists(
    st.tuples(st.sampled_from(["nodes", "links"]), st.integers(0, 11), st.integers(0, 12), VALUES),
    max_size=3,
)
"""What is put where in a sound workflow: a node or link, one of its entries, the value."""


def spoiled(workflow: dict[str, Any], spots: list[tuple[str, int, int, Any]]) -> dict[str, Any]:
    made = copy.deepcopy(workflow)
    for kind, row, entry, value in spots:
        found = made[kind][row % len(made[kind])]
        if isinstance(found, (dict, list)) and found:
            keys = list(found) if isinstance(found, dict) else list(range(len(found)))
            found[keys[entry % len(keys)]] = value
    return made


@WRITTEN
@given(WORKFLOW | st.builds(spoiled, st.sampled_from(STOCK), ANYWHERE))
def test_migration(workflow: dict[str, Any]) -> None:
    """What the canvas is given in its place can be read again."""
    body = json.dumps(workflow).encode()
    found = survives(lambda: migration_answer(body, files_under(None), 0.5))
    if found:
        answer = json.loads(found, parse_constant=pytest.fail)
        assert not set("".join(answer["replaced"] + answer["left"])) & {"\n", "\x1b", "\ud800"}
        if answer["replaced"]:
            api_graph(answer["workflow"])


@WRITTEN
@given(
    WORKFLOW.map(json.dumps).map(str.encode) | st.binary(max_size=40),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"]),
    st.sampled_from([b"", b"tEXt", b"zTXt", b"iTXt", b"prompt:", b"workflow:"]),
    st.binary(max_size=8),
)
def test_file(body: bytes, head: bytes, kind: bytes, more: bytes) -> None:
    """Any file: JSON, a picture, or neither."""
    chunk = len(body).to_bytes(4, "big") + kind + b"prompt\0" + more + body
    for data in (body, head + kind + body, head + chunk):
        found = survives(lambda data=data: read_workflow(data))
        if found is not None:
            survives(lambda found=found: api_graph(found))
