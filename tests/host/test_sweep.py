"""SD35SkipLayerSweep in a running ComfyUI: its pictures, its sheet and what it refuses."""

from __future__ import annotations

import copy
import importlib
import io
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools import host as hosts

SIDE, STRIP, GAP = 256, 28, 8
"""Of the sheet of 128x128 pictures, in pixels."""


def with_sweep(workflow: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The workflow's own picture (7), and a sweep (10) with its sheet (11) and pictures (12)."""
    prompt = copy.deepcopy(workflow)
    prompt["5"]["inputs"].update(seed=61, steps=6)
    window = {"start": 0.0, "end": 0.6}
    settings = {"over": "layers", "layers": "1; 2, 3", "scales": "2.5", **window, **inputs}
    prompt["10"] = {
        "class_type": "SD35SkipLayerSweep",
        "inputs": {**prompt["5"]["inputs"], "vae": ["1", 2], **settings},
    }
    for key, output in (("11", 0), ("12", 1)):
        save = {"images": ["10", output], "filename_prefix": f"sweep{key}"}
        prompt[key] = {"class_type": "SaveImage", "inputs": save}
    return prompt


def with_guidance(prompt: dict[str, Any], layers: str, scale: float) -> None:
    """Add a picture (23) of SkipLayerGuidance and SD35Sampler with the sweep's settings."""
    sweep, guidance = prompt["10"]["inputs"], {"model": ["1", 0], "layers": layers, "scale": scale}
    guidance |= {"start": sweep["start"], "end": sweep["end"]}
    prompt["20"] = {"class_type": "SkipLayerGuidance", "inputs": guidance}
    sampler = {**prompt["5"]["inputs"], "model": ["20", 0]}
    prompt["21"] = {"class_type": "SD35Sampler", "inputs": sampler}
    decode = {"samples": ["21", 0], "vae": ["1", 2]}
    prompt["22"] = {"class_type": "VAEDecode", "inputs": decode}
    save = {"images": ["22", 0], "filename_prefix": "guided"}
    prompt["23"] = {"class_type": "SaveImage", "inputs": save}


def saved(server: hosts.Server, prompt: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """The pictures by the key of the node that saved them."""
    history = hosts.run_prompt(server.url, prompt)
    return {
        key: [
            np.asarray(Image.open(io.BytesIO(data)))
            for data in hosts.pictures(server.url, {"outputs": {key: output}})
        ]
        for key, output in history["outputs"].items()
    }


def cell(sheet: np.ndarray, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """(label, picture) of a place on the sheet."""
    y, x = GAP + row * (STRIP + SIDE + GAP), GAP + column * (SIDE + GAP)
    below = y + STRIP
    return sheet[y:below, x : x + SIDE], sheet[below : below + SIDE, x : x + SIDE]


def enlarged(picture: np.ndarray) -> np.ndarray:
    return picture.repeat(2, 0).repeat(2, 1)


def test_a_sweep_over_layers_gives_the_pictures_of_the_single_nodes(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    prompt = with_sweep(workflow, layers="1; none; 2,  3;1; 0; 0-3;")
    with_guidance(prompt, "1", 2.5)
    seen = saved(server, prompt)
    pictures, (plain,), (guided,) = seen["12"], seen["7"], seen["23"]
    assert [p.shape for p in pictures] == [(128, 128, 3)] * 5
    assert np.array_equal(pictures[0], plain)
    assert np.array_equal(pictures[1], guided)
    assert not np.array_equal(plain, guided)


def test_a_sweep_over_scales_gives_the_pictures_of_the_single_nodes(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    prompt = with_sweep(workflow, over="scales", layers="1, 2", scales="0, 1.5; 4.")
    with_guidance(prompt, "1-2", 4.0)
    seen = saved(server, prompt)
    assert len(seen["12"]) == 3
    for picture, alone in zip(seen["12"][::2], (seen["7"][0], seen["23"][0])):
        assert np.array_equal(picture, alone)


def test_the_sheet_shows_every_picture_under_a_label(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    seen = saved(server, with_sweep(workflow, layers="0; 1; 2; 3"))
    (sheet,), pictures = seen["11"], seen["12"]
    assert sheet.shape == (2 * (STRIP + SIDE + GAP) + GAP, 3 * (SIDE + GAP) + GAP, 3)
    labels = []
    for i, picture in enumerate(pictures):
        label, shown = cell(sheet, *divmod(i, 3))
        assert np.array_equal(shown, enlarged(picture))
        assert label.max() > 200 and np.median(label) < 50
        labels.append(label.tobytes())
    assert len(set(labels)) == 5
    nothing = np.concatenate(cell(sheet, 1, 2))
    assert nothing.min() == nothing.max() < 50


def test_a_batch_makes_a_row_of_each_setting(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    prompt = with_sweep(workflow, layers="1; 2; 3")
    prompt["4"]["inputs"]["batch_size"] = 2
    with_guidance(prompt, "3", 2.5)
    seen = saved(server, prompt)
    (sheet,), pictures = seen["11"], seen["12"]
    assert sheet.shape == (4 * (STRIP + SIDE + GAP) + GAP, 2 * (SIDE + GAP) + GAP, 3)
    assert np.array_equal(pictures[:2], seen["7"]) and np.array_equal(pictures[6:], seen["23"])
    for i, picture in enumerate(pictures):
        assert np.array_equal(cell(sheet, *divmod(i, 2))[1], enlarged(picture))


def test_the_node_tells_what_it_drew(server: hosts.Server, workflow: dict[str, Any]) -> None:
    saved(server, with_sweep(workflow, layers="2; 1-3", seed=62))
    told = "3 pictures of seed 62: none; layer 2; layers 1-3. The guidance covers 3 of 6 steps."
    assert told in server.log_tail()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"layers": "1; 2, x"}, "layers is '2, x': 'x' is not a layer number"),
        ({"layers": "1; 7"}, "layers is '7', but this model has layers 0 to 3"),
        ({"layers": "none;"}, "layers is 'none;' and scales is '2.5': only the picture without"),
        ({"scales": "0"}, "scales is '0': only the picture without guidance"),
        ({"scales": "strong"}, "scales is 'strong': 'strong' is not a number from 0 to 10"),
        ({"scales": "-1"}, "'-1' is not a number"),
        ({"scales": "nan"}, "'nan' is not a number"),
        ({"scales": "10.5"}, "'10.5' is not a number from 0 to 10"),
        ({"scales": ""}, "scales is '', which is 0 scales; a sweep over layers takes one"),
        ({"scales": "1; 2"}, "which is 2 scales; a sweep over layers takes one"),
        ({"over": "scales"}, "layers is '1; 2, 3', which is 2 sets of layers; a sweep over scales"),
        ({"over": "cfg"}, "over: 'cfg' not in"),
        ({"start": 0.5, "end": 0.2}, "start is 0.5 and end is 0.2: none of the 6 steps"),
        ({"start": 0.51, "end": 0.6}, "none of the 6 steps lies between"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(
    server: hosts.Server, workflow: dict[str, Any], inputs: dict[str, Any], words: str
) -> None:
    prompt = with_sweep(workflow, **inputs)
    del prompt["7"]
    with pytest.raises(hosts.HostError) as caught:
        hosts.run_prompt(server.url, prompt)
    assert "SD35SkipLayerSweep (10):" in str(caught.value) and words in str(caught.value)
    assert server.alive()


def test_more_than_64_pictures_are_refused(server: hosts.Server, workflow: dict[str, Any]) -> None:
    prompt = with_sweep(workflow)
    prompt["4"]["inputs"]["batch_size"] = 22
    del prompt["7"]
    with pytest.raises(hosts.HostError, match="3 settings and a latent batch of 22 make 66 pict"):
        hosts.run_prompt(server.url, prompt)


def test_an_interrupted_sweep_leaves_the_server_ready(
    server: hosts.Server, workflow: dict[str, Any]
) -> None:
    errors: list[str] = []
    started = threading.Event()

    def begun(node: str, done: int, total: int) -> None:
        if node == "10":
            started.set()

    def run() -> None:
        prompt = with_sweep(workflow, steps=1000, end=0.01)
        try:
            hosts.run_prompt(server.url, prompt, begun)
        except hosts.HostError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    hosts.call(server.url, "/interrupt", {})
    thread.join(60)
    assert errors == ["The run was interrupted."]
    assert len(saved(server, with_sweep(workflow, layers="1", steps=2, end=1.0))["12"]) == 2


def test_a_long_label_is_made_smaller_and_a_short_one_is_not_enlarged(
    comfy: SimpleNamespace,
) -> None:
    label = importlib.import_module("sd35_pack.nodes.sheet").label
    long = label("|" + " " * 100 + "|", STRIP, SIDE)
    assert long[:, : SIDE // 2].max() > 0.3 and long[:, SIDE // 2 :].max() > 0.3
    short = label("none", STRIP, SIDE)
    assert short[:, : SIDE // 2].max() > 0.8 and short[:, SIDE // 2 :].max() < 0.2
