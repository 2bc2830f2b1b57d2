"""Workflows as people share them: old and new canvas files, subgraphs, pictures, odd exports."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from sd35_core.errors import SettingError
from sd35_core.workflow import workflow_file
from sd35_core.workflow.__main__ import main
from sd35_core.workflow.check import check, files_under
from sd35_core.workflow.graph import Budget, TooLargeError
from sd35_core.workflow.reader import setups
from sd35_core.workflow.setup import Model
from sd35_core.workflow.workflow_file import api_graph, read_workflow

Node = dict[str, Any]
UNNAMED = [7, "randomize", 30, 4.5, "euler", "simple", 1.0]
"""A KSampler's widgets in a file that does not name them."""


def node(number: int, kind: str, *widgets: Any, **inputs: Any) -> Node:
    """A node of the canvas; `inputs`: name -> the link, or (link, "w") for a widget's."""
    slots = []
    for name, link in inputs.items():
        both = link if isinstance(link, tuple) else (link, "")
        slots.append({"name": name, "type": name.upper(), "link": both[0]})
        if both[1]:
            slots[-1]["widget"] = {"name": name}
    return {"id": number, "type": kind, "inputs": slots, "widgets_values": list(widgets)}


def canvas(*nodes: Node, links: list[Any], subgraphs: tuple[Any, ...] = ()) -> dict[str, Any]:
    """links: (number, from, slot, to, slot, type)."""
    found: dict[str, Any] = {"nodes": list(nodes), "links": [list(link) for link in links]}
    return {**found, "definitions": {"subgraphs": list(subgraphs)}} if subgraphs else found


def subgraph(key: str, nodes: list[Node], inputs: list[str], links: list[Any]) -> dict[str, Any]:
    """links: (number, from, slot, to, slot); -10 and -20 are its two ends."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    return {
        "id": key, "name": key, "nodes": nodes, "inputs": [{"name": name} for name in inputs],
        "outputs": [{"name": "out"}], "links": [dict(zip(names, link)) for link in links],
    }  # fmt: skip


LOADER = node(1, "CheckpointLoaderSimple", "sd3.5_large.safetensors")
LATENT = node(4, "EmptySD3LatentImage", 1024, 1024, 1)


def sampler(*widgets: Any, **inputs: Any) -> Node:
    return node(5, "KSampler", *(widgets or UNNAMED), **{"model": 1, "latent_image": 2, **inputs})


LINKS = [(1, 1, 0, 5, 0, "MODEL"), (2, 4, 0, 5, 1, "LATENT")]


def setup(workflow: dict[str, Any], key: str = "5") -> Any:
    return setups(api_graph(workflow), files_under(None))[key]


def test_widgets_without_names_are_read_in_their_known_order() -> None:
    found = setup(canvas(LOADER, LATENT, sampler(), links=LINKS))
    assert found.model and found.model.variant == "sd3.5_large"
    assert (found.sampling.steps, found.sampling.cfg, found.sampling.denoise) == (30, 4.5, 1.0)
    assert (found.sampling.sampler, found.sampling.schedule) == ("euler", "simple")
    assert found.latent and (found.latent.width, found.latent.height) == (1024, 1024)


def test_a_widget_that_was_made_an_input_keeps_its_place_in_an_old_file() -> None:
    """Old files name only such a widget, and keep the values of all."""
    steps = node(9, "PrimitiveNode", 12, "fixed")
    link = (3, 9, 0, 5, 2, "INT")
    old = canvas(LOADER, LATENT, steps, sampler(steps=(3, "w")), links=[*LINKS, link])
    found = setup(old)
    assert (found.sampling.steps, found.sampling.cfg, found.sampling.schedule) == (
        12,
        4.5,
        "simple",
    )


def test_a_new_file_names_all_its_widgets() -> None:
    order = ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
    named = dict.fromkeys(order, (None, "w"))
    found = setup(canvas(LOADER, LATENT, sampler(*UNNAMED, **named), links=LINKS))
    assert (found.sampling.steps, found.sampling.denoise) == (30, 1.0)


@pytest.mark.parametrize("between", ["Reroute", "bypassed", "Set and Get"])
def test_what_only_passes_a_model_on_is_looked_through(between: str) -> None:
    links = [(8, 1, 0, 7, 0, "MODEL"), (1, 7, 0, 5, 0, "MODEL"), LINKS[1]]
    nodes = [node(7, "Reroute", **{"": 8})]
    if between == "bypassed":
        nodes = [{**node(7, "Foreign", model=8), "mode": 4}]
        nodes[0]["inputs"][0]["type"] = "MODEL"
    if between == "Set and Get":
        nodes = [node(6, "SetNode", "m", MODEL=8), node(7, "GetNode", "m")]
        links[0] = (8, 1, 0, 6, 0, "MODEL")
    found = setup(canvas(LOADER, LATENT, *nodes, sampler(), links=links))
    assert found.model and found.model.variant == "sd3.5_large"


def test_a_muted_node_gives_nothing() -> None:
    found = setup(canvas({**LOADER, "mode": 2}, LATENT, sampler(), links=LINKS))
    assert found.model is None


def inside(steps: Any = None, **more: Any) -> dict[str, Any]:
    """A subgraph with the sampler in it; the model and `steps` come from without."""
    links = [(1, -10, 0, 5, 0), (2, 4, 0, 5, 1), (3, -10, 1, 5, 2), (4, 5, 0, -20, 0)]
    return subgraph("sub", [LATENT, sampler(steps=(3, "w"))], ["model", "steps"], links)


def test_a_subgraph_stands_for_its_nodes() -> None:
    """The model by a link, the steps from the widget that the node shows."""
    instance = node(12, "sub", 8, model=1)
    decode = node(13, "VAEDecode", samples=2)
    links = [(1, 1, 0, 12, 0, "MODEL"), (2, 12, 0, 13, 0, "LATENT")]
    workflow = canvas(LOADER, instance, decode, links=links, subgraphs=(inside(),))
    found = setup(workflow, "12:5")
    assert found.model and found.model.variant == "sd3.5_large"
    assert (found.sampling.steps, found.sampling.cfg) == (8, 4.5)
    assert api_graph(workflow)["13"]["inputs"]["samples"] == ["12:5", 0]


def test_a_subgraph_in_a_subgraph_is_read_to_its_ends() -> None:
    outer_links = [(1, -10, 0, 12, 0), (2, 12, 0, -20, 0)]
    outer = subgraph("outer", [node(12, "sub", 9, model=1)], ["model"], outer_links)
    links = [(1, 1, 0, 20, 0, "MODEL")]
    workflow = canvas(LOADER, node(20, "outer", model=1), links=links, subgraphs=(inside(), outer))
    found = setup(workflow, "20:12:5")
    assert found.model and found.model.variant == "sd3.5_large" and found.sampling.steps == 9


@pytest.mark.parametrize("mode", [2, 4])
def test_a_subgraph_that_is_off_is_not_read(mode: int) -> None:
    instance = {**node(12, "sub", 8, model=1), "mode": mode}
    graph = api_graph(canvas(LOADER, instance, links=[LINKS[0]], subgraphs=(inside(),)))
    assert list(graph) == ["1"]


def test_subgraphs_without_end_are_refused() -> None:
    itself = subgraph("a", [node(1, "a")], [], [])
    with pytest.raises(SettingError, match="more than 16 deep"):
        api_graph(canvas(node(1, "a"), links=[], subgraphs=(itself,)))
    laughs = [
        subgraph(f"s{i}", [node(n, f"s{i + 1}") for n in range(10)], [], []) for i in range(10)
    ]
    with pytest.raises(TooLargeError, match="more than 20,000 nodes"):
        api_graph(canvas(node(1, "s0"), links=[], subgraphs=tuple(laughs)), Budget(5))


LOOP = [node(6, "SetNode", "m", MODEL=8), node(7, "GetNode", "m")]


def test_loops_of_set_and_get_end() -> None:
    links = [(8, 7, 0, 6, 0, "MODEL"), (1, 7, 0, 5, 0, "MODEL"), LINKS[1]]
    assert setup(canvas(LATENT, *LOOP, sampler(), links=links)).model is None


def test_an_export_with_gaps_is_read_and_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd3.5_large.x"}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "steps": 4, "cfg": 4.5}},
        "7": {"inputs": {}},
    }
    file = tmp_path / "gaps.json"
    file.write_text(json.dumps(graph), encoding="utf-8")
    assert main([str(file)]) == 0
    said = capsys.readouterr().out
    assert "steps is 4" in said and "Not read: 7, without a class" in said


def picture(kind: str, text: str) -> bytes:
    """A picture with a workflow inside, as programs write it."""
    out, image = io.BytesIO(), Image.new("RGB", (8, 8))
    if kind == "webp":
        exif = image.getexif()
        exif[0x0110], exif[0x010F] = f"prompt:{text}", "workflow:{}"
        image.save(out, "webp", exif=exif)
    else:
        info = PngImagePlugin.PngInfo()
        if kind == "iTXt":
            info.add_itxt("workflow", text, zip=True)
        else:
            info.add_text("prompt", text, zip=kind == "zTXt")
        image.save(out, "png", pnginfo=info)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "webp"])
def test_a_picture_carries_its_workflow(kind: str) -> None:
    graph = {"5": {"class_type": "KSampler", "inputs": {"steps": 4, "text": "ein Füchschen 狐"}}}
    found = read_workflow(picture(kind, json.dumps(graph)))
    assert api_graph(found)["5"]["inputs"] == {"steps": 4, "text": "ein Füchschen 狐"}


def test_a_picture_without_one_or_with_a_bomb_says_so(tmp_path: Path) -> None:
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "png")
    with pytest.raises(SettingError, match="no workflow in this picture"):
        read_workflow(plain.getvalue())
    packed = b"prompt\0\0" + zlib.compress(b"[" * 2**27)
    chunk = len(packed).to_bytes(4, "big") + b"zTXt" + packed + b"\0\0\0\0"
    with pytest.raises(SettingError, match="can't be read as JSON"):
        read_workflow(plain.getvalue()[:33] + chunk)
    with pytest.raises(SettingError):
        read_workflow(plain.getvalue()[:33] + b"\xff\xff\xff\xfftEXtprompt\0{")


def test_many_packed_texts_are_not_all_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small picture could hold thousands that are 16 MB each."""
    unpacked: list[bytes] = []
    whole = workflow_file._inflated
    monkeypatch.setattr(workflow_file, "_inflated", lambda d: unpacked.append(d) or whole(d))
    chunks = b""
    for name in (b"other", *(b"n%d" % n for n in range(50)), b"workflow", b"workflow", b"workflow"):
        packed = name + b"\0\0" + zlib.compress(b'{"1": {"class_type": "A", "inputs": {}}}')
        chunks += len(packed).to_bytes(4, "big") + b"zTXt" + packed + b"\0\0\0\0"
    assert list(api_graph(read_workflow(b"\x89PNG\r\n\x1a\n" + chunks))) == ["1"]
    assert len(unpacked) == 1


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("flux1-dev-fp8.safetensors", "FLUX"), ("sd_xl_base_1.0.safetensors", "SDXL"),
        ("wan2.2_t2v_14B.safetensors", "Wan"), ("qwen_image_fp8.safetensors", "Qwen"),
        ("hidream_i1_fast.safetensors", "HiDream"), ("v1-5-pruned-emaonly.ckpt", "1.5"),
    ],
)  # fmt: skip
def test_a_workflow_for_another_model_is_never_said_to_fit(name: str, family: str) -> None:
    workflow = canvas(node(1, "CheckpointLoaderSimple", name), LATENT, sampler(), links=LINKS)
    (said,) = check(workflow, files_under(None)).values()
    assert said[0].severity == "error" and family in said[0].text


def test_a_model_that_nobody_knows_is_said_to_be_unknown() -> None:
    workflow = canvas(node(1, "CheckpointLoaderSimple", "x.ckpt"), LATENT, sampler(), links=LINKS)
    (said,) = check(workflow, files_under(None)).values()
    assert "model unknown" in {finding.rule for finding in said}


def test_a_sampler_of_another_model_beside_one_of_sd3_is_left_alone() -> None:
    """As where a depth map is drawn with a model of its own."""
    depth = {**sampler(model=9), "id": 6}
    lotus = node(8, "UNETLoader", "lotus-depth-d-v1-1.safetensors", "default")
    links = [*LINKS, (9, 8, 0, 6, 0, "MODEL")]
    said = check(canvas(LOADER, LATENT, sampler(), lotus, depth, links=links), files_under(None))
    assert [finding.severity for finding in said["6"]] == ["note"]
    assert Model().kind == "SD3" and not [f for f in said["5"] if f.severity == "error"]


def test_a_models_folder_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(canvas(LOADER, LATENT, sampler(), links=LINKS)), encoding="utf-8")
    assert main([str(file), "--models", str(tmp_path / "gone")]) == 2
    assert "is no folder" in capsys.readouterr().err


GROUP = {
    "nodes": [
        {"type": "EmptySD3LatentImage", "widgets_values": [512, 512, 1], "inputs": [],
         "outputs": [{"name": "LATENT", "type": "LATENT"}]},
        {"type": "KSampler", "widgets_values": UNNAMED,
         "inputs": [{"name": "model", "type": "MODEL"}, {"name": "latent_image", "type": "LATENT"}],
         "outputs": [{"name": "LATENT", "type": "LATENT"}]},
    ],
    "links": [[None, 0, 1, 0, 3, "MODEL"], [0, 0, 1, 1, 4, "LATENT"]],
    "external": [[{"type": "KSampler", "index": 1}, 0, "LATENT"]],
}  # fmt: skip
"""A group node as ComfyUI saved it before there were subgraphs: a latent and its sampler."""


def grouped(*widgets: Any, kind: str = "workflow>draw") -> dict[str, Any]:
    instance = node(9, kind, *widgets, model=1)
    instance["inputs"][0]["name"] = "KSampler model"
    decode = node(10, "VAEDecode", samples=2)
    links = [(1, 1, 0, 9, 0, "MODEL"), (2, 9, 0, 10, 0, "LATENT")]
    return {
        **canvas(LOADER, instance, decode, links=links),
        "extra": {"groupNodes": {"draw": GROUP}},
    }


@pytest.mark.parametrize("kind", ["workflow>draw", "workflow/draw"])
def test_a_group_node_stands_for_its_nodes(kind: str) -> None:
    graph = api_graph(grouped(1024, 768, 2, 3, "fixed", 40, 3.5, "euler", "beta", 1.0, kind=kind))
    drawn = graph["9:1"]["inputs"]
    assert drawn["model"] == ["1", 0] and drawn["latent_image"] == ["9:0", 0]
    assert (drawn["steps"], drawn["cfg"], drawn["scheduler"]) == (40, 3.5, "beta")
    assert graph["9:0"]["inputs"] == {"width": 1024, "height": 768, "batch_size": 2}
    assert graph["10"]["inputs"]["samples"] == ["9:1", 0]
    assert setups(graph, files_under(None))["9:1"].model is not None


def test_a_group_nodes_own_widgets_stay_where_the_files_do_not_fit() -> None:
    graph = api_graph(grouped("odd"))
    assert graph["9:1"]["inputs"]["steps"] == 30


def test_groups_of_groups_end() -> None:
    many = {"nodes": [{"type": "Note", "inputs": []}] * 10_000, "links": []}
    nodes = [node(i, "workflow>many") for i in range(10_000)]
    with pytest.raises(TooLargeError):
        api_graph({**canvas(*nodes, links=[]), "extra": {"groupNodes": {"many": many}}}, Budget(1))


def test_a_workflow_of_res4lyf_is_read_as_theirs() -> None:
    loader = node(1, "SD35Loader", "sd3.5_medium.safetensors", "default", "clip_g.safetensors",
                  ".none", "t5xxl.safetensors", ".use_ckpt_vae")  # fmt: skip
    values = (0.5, "multistep/res_2m", "bong_tangent", 30, -1, 1, 9, 7, "fixed", "standard", True)
    drawing = node(5, "ClownsharKSampler_Beta", *values, model=1, latent_image=2)
    graph = api_graph(canvas(loader, LATENT, drawing, links=LINKS))
    (setup,) = setups(graph, files_under(None)).values()
    assert (setup.sampling.steps, setup.sampling.cfg) == (30, 9.0)
    assert setup.model is not None and setup.model.variant == "sd3.5_medium"
    assert setup.model.of_res4lyf and not setup.model.own
    assert [finding.rule for finding in check(graph, files_under(None))["5"]] == ["high cfg"]


@pytest.mark.parametrize("of_groups", [False, True])
def test_links_without_end_are_refused_before_they_fill_the_memory(of_groups: bool) -> None:
    """Few nodes, and in each the same many links."""
    if of_groups:
        many = {"nodes": [node(0, "Note")], "links": [[0, 0, 0, 0, 1, "MODEL"]] * 50_000}
        outer = {
            **canvas(*(node(i, "workflow>many") for i in range(200)), links=[]),
            "extra": {"groupNodes": {"many": {**many, "nodes": [LATENT] * 5_000}}},
        }
    else:
        inner = subgraph("a", [], [], [(i, 0, 0, 0, 0) for i in range(50_000)])
        outer = canvas(*(node(i, "a") for i in range(200)), links=[], subgraphs=(inner,))
    with pytest.raises(TooLargeError, match="200,000 links"):
        api_graph(outer)


@pytest.mark.parametrize(("mode", "said"), [("unsample", []), ("standard", ["low cfg"])])
def test_a_way_back_to_noise_goes_without_guidance(mode: str, said: list[str]) -> None:
    values = (0.5, "multistep/res_2m", "bong_tangent", 30, -1, 1, 1, 7, "fixed", mode, True)
    drawing = node(5, "ClownsharKSampler_Beta", *values, model=1, latent_image=2)
    graph = api_graph(canvas(LOADER, LATENT, drawing, links=LINKS))
    assert [finding.rule for finding in check(graph, files_under(None))["5"]] == said
