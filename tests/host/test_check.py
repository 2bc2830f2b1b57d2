"""SD35Check in a running ComfyUI: what it says, when it stops, and that it disturbs nothing."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd35_core.workflow.reader import about_tokens
from tools import host as hosts

FEW = {"steps": 12, "seed": 77}
NOTHING = "Nothing to say: this set-up fits SD3.5."
MEMORY = r"Memory: about 0\.\d+ of \d+(\.\d)? GB, most in .*\(.*model 0\.\d+, .*\)\."


def checked(workflow: dict[str, Any], strict: str = "report", **sampler: Any) -> dict[str, Any]:
    """The workflow with SD35Check before its sampler."""
    prompt = copy.deepcopy(workflow)
    inputs = prompt["5"]["inputs"]
    inputs.update({**FEW, **sampler})
    names = ("model", "positive", "negative", "latent")
    prompt["90"] = {
        "class_type": "SD35Check",
        "inputs": {**{name: inputs[name] for name in names}, "vae": ["1", 2], "strict": strict},
    }
    inputs.update({name: ["90", slot] for slot, name in enumerate(names)})
    return prompt


def between(
    prompt: dict[str, Any], kind: str, name: str = "model", takes: str = "model", **inputs: Any
) -> None:
    """Put a node, with its input `takes`, before an input of SD35Check."""
    prompt["80"] = {
        "class_type": kind,
        "inputs": {takes: prompt["90"]["inputs"][name], **inputs},
    }
    prompt["90"]["inputs"][name] = ["80", 0]


def pixels(server: hosts.Server, history: dict[str, Any]) -> np.ndarray:
    (data,) = hosts.pictures(server.url, history)
    return np.asarray(Image.open(io.BytesIO(data)))


def said(server: hosts.Server, prompt: dict[str, Any]) -> str:
    history = hosts.run_prompt(server.url, prompt)
    (text,) = history["outputs"]["90"]["text"]
    return text


def test_a_right_set_up_gets_no_words_and_its_picture_unchanged(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    plain = copy.deepcopy(workflow)
    plain["5"]["inputs"].update(FEW)
    expected = pixels(server, hosts.run_prompt(server.url, plain))
    history = hosts.run_prompt(server.url, checked(workflow, "stop at warnings"))
    (text,) = history["outputs"]["90"]["text"]
    assert re.fullmatch(f"{NOTHING}\n{MEMORY}", text)
    assert np.array_equal(pixels(server, history), expected)


def test_widgets_after_the_node_change_what_it_says_though_its_inputs_stay(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    assert NOTHING in said(server, checked(workflow))
    assert "cfg is 15" in said(server, checked(workflow, cfg=15.0))
    assert "shift is 5" in said(server, checked(workflow, shift=5.0))


def test_the_same_prompt_again_is_not_sampled_again(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    prompt = checked(workflow, seed=501)
    hosts.run_prompt(server.url, prompt)
    seen: list[int] = []
    hosts.run_prompt(server.url, prompt, lambda node, done, total: seen.append(done))
    assert seen == []


def test_strict_stops_before_sampling_with_the_same_words(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    seen: list[int] = []
    prompt = checked(workflow, "stop at warnings", cfg=15.0)
    with pytest.raises(hosts.HostError, match="Stopped before sampling.*\n.*cfg is 15") as caught:
        hosts.run_prompt(server.url, prompt, lambda node, done, total: seen.append(done))
    assert "SD35Check (90)" in str(caught.value) and seen == []
    assert "cfg is 15" in said(server, checked(workflow, "stop at errors", cfg=15.0))
    assert NOTHING in said(server, checked(workflow))


@pytest.fixture(scope="module")
def loras(base: Path) -> None:
    key = "lora_unet_{}_attn_qkv.lora_{}.weight"

    def write(name: str, layer: str) -> None:
        tensors = {
            key.format(layer, "up"): torch.randn(768, 4),
            key.format(layer, "down"): torch.randn(4, 256),
        }
        save_file(tensors, base / "models" / "loras" / name)

    write("for nano.safetensors", "joint_blocks_1_x_block")
    write("for another.safetensors", "double_blocks_1_img")


def lora(name: str) -> Any:
    return lambda p: between(p, "LoraLoaderModelOnly", lora_name=name, strength_model=0.1)


WRONG: dict[str, tuple[Any, str]] = {
    "skipped layers on no step": (
        lambda p: between(p, "SkipLayerGuidance", layers="1", scale=2.0, start=0.01, end=0.05),
        "acts on none of the 12 steps"),
    "a hook that nothing calls": (
        lambda p: between(
            p, "PatchModelAddDownscale", block_number=3, downscale_factor=2.0, start_percent=0.0,
            end_percent=0.35, downscale_after_skip=True, downscale_method="bicubic",
            upscale_method="bicubic"),
        "PatchModelAddDownscale.* does nothing on SD3.5"),
    "a LoRA for another model": (lora("for another.safetensors"), "none of its 1 layers"),
    "a size that the model never saw": (
        lambda p: p["4"]["inputs"].update(width=256, height=256), "256x256"),
    "a zeroed prompt": (
        lambda p: between(p, "ConditioningZeroOut", "positive", "conditioning"), "all zeros"),
    "one prompt for both": (
        lambda p: p["90"]["inputs"].update(negative=["2", 0]), "guidance cancels itself"),
    "another prediction": (
        lambda p: between(p, "ModelSamplingDiscrete", sampling="eps", zsnr=False),
        "puts SD3.5's own in its place"),
    "a shift twice": (lambda p: between(p, "ModelSamplingSD3", shift=3.0), "counts"),
    "a ControlNet at strength 0": (lambda p: control(p, strength=0.0), "its strength is 0"),
    "a ControlNet with nothing to follow": (lambda p: control(p), "one colour all over"),
    "a ControlNet and a wide picture": (
        lambda p: control(p, width=256), "256x128, the latent 128x128"),
}  # fmt: skip


def control(prompt: dict[str, Any], width: int = 128, **inputs: Any) -> None:
    """A ControlNet that sees an empty picture."""
    prompt["70"] = {
        "class_type": "SD35ControlNetLoader",
        "inputs": {"control_net": "sd35_nano_canny.safetensors", "depth_maps": "near is bright",
                   "reference": "Stability AI"},
    }  # fmt: skip
    prompt["71"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": width, "height": 128, "batch_size": 1, "color": 0},
    }
    check = prompt["90"]["inputs"]
    prompt["72"] = {
        "class_type": "SD35ControlNetApply",
        "inputs": {"positive": check["positive"], "negative": check["negative"],
                   "control_net": ["70", 0], "vae": ["1", 2], "image": ["71", 0],
                   "strength": 1.0, "start": 0.0, "end": 1.0, **inputs},
    }  # fmt: skip
    check.update(positive=["72", 0], negative=["72", 1])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_on_the_server(
    server: hosts.Server, workflow: dict[str, Any], loras: None, name: str
) -> None:
    change, words = WRONG[name]
    prompt = checked(workflow)
    change(prompt)
    assert re.search(words, said(server, prompt))


def test_a_lora_that_fits_is_described_and_nothing_is_wrong_with_it(
    server: hosts.Server, workflow: dict[str, Any], loras: None
) -> None:
    prompt = checked(workflow)
    lora("for nano.safetensors")(prompt)
    nothing, words, memory = said(server, prompt).splitlines()
    assert nothing == NOTHING and re.fullmatch(MEMORY, memory)
    assert "names of kohya, rank 4" in words and "1 of 1 layers match" in words


def test_objects_are_judged_where_the_workflow_says_nothing(
    comfy: SimpleNamespace, ours: Any, stock: Any, conds: Any
) -> None:
    facts = __import__("sd35_pack.nodes.host.facts", fromlist=["setups_at"])
    check = __import__("sd35_pack.sd35_core.workflow.check", fromlist=["findings"])
    empty = {"samples": torch.zeros(1, 16, 16, 16)}

    def rules(model: Any = ours, positive: Any = conds.positive, latent: Any = empty) -> set[str]:
        (seen,) = facts.setups_at({}, None, model, positive, conds.negative, latent)
        return {finding.rule for finding in check.findings(seen)}

    def changed(**extra: Any) -> Any:
        ((encoded, before),) = conds.positive
        return [[encoded, {**before, **extra}]]

    assert rules() == set() and rules(stock) == set()
    assert rules(positive=changed(pooled_output=None)) == {"pooled missing"}
    assert rules(positive=changed(pooled_output=torch.zeros(1, 2048))) == {"pooled empty"}
    assert rules(positive=changed(pooled_output=torch.ones(1, 1280))) == {"pooled width"}
    narrow = [[torch.ones(1, 77, 2048), conds.positive[0][1]]]
    assert rules(positive=narrow) == {"prompt width"}
    broken = torch.full((1, 16, 16, 16), float("nan"))
    assert rules(latent={"samples": broken}) == {"latent numbers"}
    assert rules(latent={"samples": torch.ones(1, 4, 16, 16)}) == {"latent channels"}
    assert rules(latent={"samples": torch.zeros(1, 16, 15, 16)}) == {"size multiple"}


@pytest.mark.parametrize(
    "text",
    [
        "a portrait of an old fisherman, soft window light, 85mm photograph",
        "an isometric drawing of a tiny kitchen; copper pans, terracotta floor, morning",
        'a sign that says "OPEN" above a bakery door in Montmartre',
        "An extraordinarily photorealistic depiction of a Mediterranean archaeological museum",
    ],
)
def test_tokens_are_guessed_close_to_t5s_own(comfy: SimpleNamespace, text: str) -> None:
    from comfy.text_encoders.sd3_clip import T5XXLTokenizer

    counted = len(T5XXLTokenizer(min_length=1).tokenize_with_weights(text)[0])
    assert abs(about_tokens(text) - counted) <= 0.25 * counted


def test_the_canvas_gets_answers_about_the_open_workflow(server: hosts.Server) -> None:
    from ..conftest import PACK

    path = PACK / "workflows" / "controlnet_canny.json"
    plan = hosts.call(server.url, "/sd35/plan", hosts.json.loads(path.read_text("utf-8")))
    panel = plan["12"]
    assert panel["recipe"] == "sd35_nano" and panel["changed"] == [] and panel["findings"] == []
    assert len(panel["sigmas"]) == 29 and panel["sigmas"][0] == 1.0
    (band,) = panel["bands"]
    assert band["name"] == "canny ControlNet" and band["steps"] == list(range(28))
    recipes = hosts.call(server.url, "/sd35/recipes")
    assert recipes["sd3.5_medium_slg"]["skip"] == {
        "layers": "7, 8, 9", "scale": 2.5, "start": 0.01, "end": 0.2,
    }  # fmt: skip


def test_one_click_fits_a_fresh_skip_layer_guidance_to_the_small_model(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    fresh = {"model": ["1", 0], "layers": "7, 8, 9", "scale": 2.5, "start": 0.01, "end": 0.2}
    workflow["20"] = {"class_type": "SkipLayerGuidance", "inputs": fresh}
    workflow["5"]["inputs"]["model"] = ["20", 0]
    before = hosts.call(server.url, "/sd35/plan", workflow)
    panel = before["5"]
    assert "no layer 7" in before["20"]["error"] and panel["model_recipe"] == "sd35_nano_slg"
    assert [c for c in panel["changed"] if c[0] == "20"] == [["20", "layers", "7, 8, 9", "1"]]
    recipe = hosts.call(server.url, "/sd35/recipes")["sd35_nano_slg"]
    workflow["20"]["inputs"].update(recipe["skip"])
    workflow["5"]["inputs"].update(recipe["sampler"])
    after = hosts.call(server.url, "/sd35/plan", workflow)
    assert not after["20"]["error"] and not after["5"]["findings"] and not after["5"]["changed"]
    assert workflow["20"]["inputs"]["scale"] == 2.5, "a recipe without it would turn it off"


def test_the_canvas_gets_answers_about_a_workflow_of_megabytes(server: hosts.Server) -> None:
    node = {"id": 1, "type": "Note", "inputs": [], "widgets_values": ["x" * 2**20]}
    sampler = {"id": 2, "type": "SD35Sampler", "inputs": [], "widgets_values": []}
    plan = hosts.call(server.url, "/sd35/plan", {"nodes": [node, sampler], "links": []})
    assert list(plan) == ["2"]


@pytest.mark.parametrize("properties", [[1], "text", {"sd35_recipe": ["sd3.5_large"]}])
def test_foreign_properties_are_no_recipe(server: hosts.Server, properties: Any) -> None:
    sampler = {"id": 2, "type": "SD35Sampler", "inputs": [], "properties": properties}
    plan = hosts.call(server.url, "/sd35/plan", {"nodes": [sampler], "links": []})
    assert plan["2"]["recipe"] is None


@pytest.mark.parametrize("body", [[], {}, {"nodes": 1, "links": []}, {"1": {"inputs": {}}}])
def test_the_canvas_gets_an_error_for_what_is_no_workflow(server: hosts.Server, body: Any) -> None:
    with pytest.raises((hosts.HostError, OSError)):
        hosts.call(server.url, "/sd35/plan", body)
    assert server.alive()
