"""ComfyUI's own nodes as this pack's: what goes, what stays and why, and what survives it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sd35_core.errors import SettingError
from sd35_core.workflow.__main__ import main
from sd35_core.workflow.check import files_under
from sd35_core.workflow.migration import Migration, migrated, migration_answer
from sd35_core.workflow.shapes import SHAPES
from sd35_core.workflow.workflow_file import api_graph

from ..conftest import PACK
from .hostile_plans import HOSTILE
from .stock_workflows import SKIP, Board, stock, with_model

MEDIUM, CANNY = "sd3.5_medium.safetensors", "sd3.5_large_controlnet_canny.safetensors"
Json = dict[str, Any]


def done(workflow: Json) -> Migration:
    before = copy.deepcopy(workflow)
    found = migrated(workflow, files_under(None))
    assert workflow == before, "the one that is given stays"
    return found


def medium(**settings: Any) -> Json:
    return with_model(stock(**settings), MEDIUM)


def node(workflow: Json, kind: str) -> Json:
    (found,) = (each for each in workflow["nodes"] if each["type"] == kind)
    return found


def test_the_shapes_are_those_of_the_nodes() -> None:
    contract = json.loads((PACK / "tests" / "data" / "nodes.json").read_text("utf-8"))
    for kind, shape in SHAPES.items():
        inputs = [(i["id"], i["type"], i.get("default")) for i in contract[kind]["inputs"]]
        assert list(shape.inputs) == inputs, kind
        assert list(shape.outputs) == [(o["name"], o["type"]) for o in contract[kind]["outputs"]]


def test_values_places_and_looks_survive() -> None:
    workflow = medium()
    sampler = node(workflow, "KSampler")
    sampler |= {"title": "My sampler", "flags": {"collapsed": True}}
    found = done(workflow)
    made = node(found.workflow, "SD35Sampler")
    for key in ("id", "pos", "size", "color", "bgcolor", "flags", "title", "order", "mode"):
        assert made[key] == sampler[key], key
    assert made["widgets_values"] == [
        585483408983215, "randomize", 8, 4.01, 3.0, "euler", "sgm_uniform", 1.0
    ]  # fmt: skip
    for key in ("groups", "extra", "links", "version", "last_link_id"):
        assert found.workflow[key] == workflow[key]
    assert not found.left and len(found.replaced) == 2


def test_a_prompt_becomes_what_the_canvas_does() -> None:
    workflow = medium(shift=2.0, skip=SKIP, steps=12, controlnet="")
    canvas = api_graph(done(workflow).workflow)
    prompt = {key: {k: v for k, v in n.items() if k != "properties"} for key, n in
              api_graph(workflow).items()}  # fmt: skip
    made = done(prompt).workflow
    assert {k: (n["class_type"], n["inputs"]) for k, n in canvas.items()} == {
        k: (n["class_type"], n["inputs"]) for k, n in made.items()
    }
    assert done({"prompt": prompt}).workflow == {"prompt": made}


def test_a_shift_moves_into_the_sampler_and_its_links_way_points_go() -> None:
    workflow = medium(shift=2.5)
    shift = node(workflow, "ModelSamplingSD3")
    (into,) = (link for link in workflow["links"] if link[3] == shift["id"])
    (out,) = (link for link in workflow["links"] if link[1] == shift["id"])
    workflow["extra"] |= {
        "reroutes": [{"id": 1, "pos": [0, 0], "linkIds": [into[0]]},
                     {"id": 2, "pos": [9, 9], "linkIds": [out[0]]}],
        "linkExtensions": [{"id": into[0], "parentId": 1}, {"id": out[0], "parentId": 2}],
    }  # fmt: skip
    found = done(workflow).workflow
    assert node(found, "SD35Sampler")["widgets_values"][4] == 2.5
    assert not [each for each in found["nodes"] if each["type"] == "ModelSamplingSD3"]
    loader = node(found, "SD35Loader")
    assert [out[0], loader["id"], 0, *out[3:]] in found["links"] and into not in found["links"]
    assert loader["outputs"][0]["links"] == [out[0]]
    assert found["extra"]["reroutes"] == [{"id": 2, "pos": [9, 9], "linkIds": [out[0]]}]
    assert found["extra"]["linkExtensions"] == [{"id": out[0], "parentId": 2}]


def test_a_shift_that_something_else_reads_stays() -> None:
    workflow = medium(shift=2.5)
    muted: Json = {**copy.deepcopy(node(workflow, "KSampler")), "id": 90, "mode": 2}
    shift = node(workflow, "ModelSamplingSD3")
    link = [900, shift["id"], 0, 90, 0, "MODEL"]
    muted["inputs"][0]["link"], muted["outputs"][0]["links"] = 900, []
    shift["outputs"][0]["links"].append(900)
    workflow["nodes"].append(muted)
    workflow["links"].append(link)
    found = done(workflow).workflow
    assert node(found, "ModelSamplingSD3") and link in found["links"]
    assert node(found, "SD35Sampler")["widgets_values"][4] == 2.5
    assert node(found, "KSampler") == muted, "what is muted stays as it is"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": "uni_pc"}, "its sampler is uni_pc"),
        ({"scheduler": "karras"}, "its scheduler is karras"),
        ({"steps": 2000}, "2000 steps"),
        ({"denoise": 0.0}, "denoise is 0"),
        ({"between": "PerturbedAttention"}, "PerturbedAttention (2) before it"),
        ({"skip": {**SKIP, "start_percent": 0.0}}, "acts on steps 0 to"),
        ({"skip": {**SKIP, "layers": "99"}}, "does nothing"),
        ({"skip": SKIP, "controlnet": CANNY}, "beside a ControlNet"),
        ({"skip": SKIP, "sampler": "heun"}, "counts its steps in another way"),
    ],
)
def test_what_would_draw_another_picture_stays_and_says_why(settings: Json, said: str) -> None:
    found = done(medium(**settings))
    assert any(said in line for line in found.left), found.report()
    kinds = [each["type"] for each in found.workflow["nodes"]]
    assert ("SD35Loader" in kinds) == ("between" not in settings)


def test_what_others_do_to_the_model_keeps_its_loader() -> None:
    """Perturbed-Attention Guidance changes nothing on ComfyUI's own model, and acts on ours."""
    found = done(medium(between="PerturbedAttention"))
    assert "CheckpointLoaderSimple (1) stays: PerturbedAttention (2)" in found.report()


@pytest.mark.parametrize("name", ["flux1-dev.safetensors", "sd_xl_base.safetensors"])
def test_a_workflow_of_another_model_stays_as_it_is(name: str) -> None:
    workflow = with_model(stock(), name)
    found = done(workflow)
    assert found.workflow == workflow and not found.replaced
    assert "nothing to replace" in found.report()


def test_a_model_that_nobody_knows_is_not_touched() -> None:
    found = done(with_model(stock(), "mine.safetensors"))
    assert not found.replaced and all("is not known" in line for line in found.left)


def test_three_loaders_become_one() -> None:
    board = Board()
    model = board.add("UNETLoader", {"unet_name": MEDIUM, "weight_dtype": "fp8_e4m3fn"}), 0
    names = {"clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors",
             "clip_name3": "clip_g.safetensors"}  # fmt: skip
    clip = board.add("TripleCLIPLoader", names), 0
    text = board.add("CLIPTextEncode", {"text": "x"}, clip=clip), 0
    latent = board.add("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}), 0
    settings = {"seed": 1, "control": "fixed", "steps": 4, "cfg": 4.0, "sampler_name": "euler",
                "scheduler": "beta", "denoise": 1.0}  # fmt: skip
    board.add("KSampler", settings, model=model, positive=text, negative=text, latent_image=latent)
    found = done(board.made()).workflow
    loader = node(found, "SD35Loader")
    assert loader["widgets_values"] == [
        MEDIUM, "clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors", "none",
        "fp8_e4m3fn", "auto",
    ]  # fmt: skip
    assert [1, 1, 1, 3, 0, "CLIP"] in found["links"] and loader["outputs"][1]["links"] == [1]
    assert "TripleCLIPLoader" not in [each["type"] for each in found["nodes"]]


def in_a_subgraph(workflow: Json, instances: int = 1, **first: Any) -> Json:
    """All nodes inside, the sampler's steps and sampler promoted; `first`: what the first shows."""
    inner = copy.deepcopy(workflow)
    names = ("steps", "sampler_name")
    sampler = node(inner, "KSampler")
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(keys, link)) for link in inner["links"]]
    inputs = []
    for place, name in enumerate(names):
        slot = next(n for n, s in enumerate(sampler["inputs"]) if s["name"] == name)
        sampler["inputs"][slot]["link"] = 500 + place
        links.append(dict(zip(keys, (500 + place, -10, place, sampler["id"], slot, "COMBO"))))
        inputs.append({"name": name, "type": "COMBO", "linkIds": [500 + place]})
    definition = {"id": "sub", "name": "sub", "nodes": inner["nodes"], "links": links,
                  "inputs": inputs, "outputs": [], "widgets": []}  # fmt: skip
    outer = [
        {"id": n + 1, "type": "sub", "inputs": [{"name": x, "widget": {"name": x}, "link": None}
                                                for x in names],
         "outputs": [], "widgets_values": [7, "euler"],
         "properties": {"proxyWidgets": [[str(sampler["id"]), x] for x in names]}}
        for n in range(instances)
    ]  # fmt: skip
    outer[0]["widgets_values"] = [first.get("steps", 7), first.get("sampler_name", "euler")]
    return {"nodes": outer, "links": [], "definitions": {"subgraphs": [definition]}, "version": 0.4}


def test_a_subgraph_keeps_what_it_shows_outside() -> None:
    workflow = in_a_subgraph(medium(), instances=2)
    found = done(workflow)
    assert not found.left
    (inner,) = found.workflow["definitions"]["subgraphs"]
    assert {"SD35Loader", "SD35Sampler"} <= {each["type"] for each in inner["nodes"]}
    assert inner["inputs"] == workflow["definitions"]["subgraphs"][0]["inputs"]
    graph = api_graph(found.workflow)
    (key,) = (k for k, n in graph.items() if n["class_type"] == "SD35Sampler" and k[0] == "1")
    assert graph[key]["inputs"]["steps"] == 7 and graph[key]["inputs"]["sampler"] == "euler"
    shown = found.workflow["nodes"][0]["properties"]["proxyWidgets"]
    assert [name for _, name in shown] == ["steps", "sampler"]


def test_a_subgraph_whose_instances_differ_keeps_its_sampler() -> None:
    found = done(in_a_subgraph(medium(), instances=2, sampler_name="uni_pc"))
    (inner,) = found.workflow["definitions"]["subgraphs"]
    kinds = {each["type"] for each in inner["nodes"]}
    assert "KSampler" in kinds and "SD35Loader" in kinds
    assert "several places that differ" in found.report()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_workflow_is_answered_or_refused(name: str) -> None:
    try:
        migration_answer(json.dumps(HOSTILE[name]).encode(), files_under(None), 0.5)
    except SettingError as error:
        assert len(str(error)) > 20


def test_the_command_writes_a_new_file_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "stock.json", tmp_path / "ours.json"
    file.write_text(json.dumps(medium(sampler="uni_pc")), encoding="utf-8")
    assert main([str(file), "--migrate", str(out)]) == 0
    said = capsys.readouterr().out
    assert "is SD3.5 Loader now" in said and "stays: its sampler is uni_pc" in said
    assert node(json.loads(out.read_text("utf-8")), "SD35Loader")
    assert main([str(file), "--migrate", str(out)]) == 2, "it is there already"
    assert main([str(out), "--migrate", str(tmp_path / "again.json")]) == 1
