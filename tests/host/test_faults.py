"""What goes wrong on purpose in a real ComfyUI: a clear sentence, and then the same picture again.

The person cancels, memory or the disk ends, files go away while a prompt waits, the server is
killed while it writes, values are not numbers.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd35_core.checkpoint.tensor_file import TensorFile, write_file
from sd35_core.errors import CheckpointError
from tools import host as hosts

from ..conftest import NANO, PACK
from .cases import Conds, sampled
from .conftest import FOLDERS
from .prompts import Event, Prompt, cancelled, changed, failed, followed, is_step

STEPS, MB = 3, 10**6
MODEL, CONTROL = "copy.safetensors", "copied_canny.safetensors"
CANNY = NANO.parent / "controlnet" / "sd35_nano_canny.safetensors"
NUMBER = count(1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits the server as only Linux can")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with copies of the small model and a ControlNet, to be spoilt."""
    place = tmp_path_factory.mktemp("faults")
    for folder in FOLDERS:
        (place / "models" / folder).mkdir(parents=True)
    shutil.copyfile(NANO, place / "models" / "checkpoints" / MODEL)
    shutil.copyfile(CANNY, place / "models" / "controlnet" / CONTROL)
    (place / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name("greedy.py"), place / "custom_nodes")
    return place


@pytest.fixture(scope="module")
def server(comfyui: hosts.Host, place: Path) -> Iterator[hosts.Server]:
    """A server for these tests alone: they take its memory and its disk away.

    With previews it tells of every step; one thread is faster where others work too.
    """
    arguments = ["--cpu", "--preview-method", "latent2rgb"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with hosts.Server(comfyui, base=place, arguments=arguments) as running:
            yield running


def steered() -> Prompt:
    """A picture, its edges, and a second picture steered by them, with skipped layers and the
    modulation cache: all that could remember a run which did not end.

    The host keeps what it made of a node while the inputs stay the same, so each call's list of
    layers has other spaces, which mean nothing.
    """
    text = (PACK / "workflows" / "api" / "controlnet_canny.json").read_text(encoding="utf-8")
    prompt = json.loads(text)
    prompt["1"]["inputs"].update(model=MODEL, modulation_cache="on")
    prompt["8"]["inputs"]["control_net"] = CONTROL
    prompt["5"]["inputs"]["steps"], prompt["12"]["inputs"]["steps"] = 1, STEPS
    layers = "1" + " " * next(NUMBER)
    prompt["20"] = {
        "class_type": "SkipLayerGuidance",
        "inputs": {"model": ["1", 0], "layers": layers, "scale": 2.0, "start": 0.0, "end": 0.9},
    }
    prompt["12"]["inputs"]["model"] = ["20", 0]
    del prompt["10"]
    return prompt


def drawn(server: hosts.Server) -> np.ndarray:
    """The steered picture, really sampled."""
    seen = set[str]()
    history = hosts.run_prompt(server.url, steered(), lambda node, *_: seen.add(node))
    assert "12" in seen
    (data,) = hosts.pictures(server.url, history)
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def first(server: hosts.Server) -> np.ndarray:
    """The steered picture before anything went wrong."""
    return drawn(server)


@pytest.fixture
def recovers(server: hosts.Server, first: np.ndarray) -> Iterator[None]:
    """After the test the server is alive and draws the same picture as at the beginning."""
    yield
    assert server.alive() and np.array_equal(drawn(server), first)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_can_be_cancelled_at_every_step(
    server: hosts.Server, recovers: None, step: int
) -> None:
    prompt = steered()
    again = {**prompt["12"]["inputs"], "latent": ["12", 0], "denoise": 0.5}
    prompt["21"] = {"class_type": "SD35Sampler", "inputs": again}
    prompt["13"]["inputs"]["samples"] = ["21", 0]  # so that something follows the last step
    ended = cancelled(server, prompt, lambda event: is_step(event, "12", step))
    assert ended == "12" or step >= STEPS - 1


@pytest.mark.parametrize("node", ["1", "9"])
def test_a_run_can_be_cancelled_while_it_loads_and_while_it_makes_a_hint(
    server: hosts.Server, place: Path, recovers: None, node: str
) -> None:
    os.utime(place / "models" / "checkpoints" / MODEL)  # to have it loaded again
    cancelled(
        server,
        steered(),
        lambda event: event["type"] == "executing" and event["data"]["node"] == node,
    )


def quantizing(model: str = MODEL, format: str = "8 bit (int8)") -> Prompt:
    """Quantizes a file; 2 bit draws two steps of a picture before."""
    prompt = {key: node for key, node in steered().items() if key == "1"}
    prompt["1"]["inputs"]["model"] = model
    inputs = {"format": format, "model": ["1", 0], "clip": ["1", 1], "prompts": "a big owl"}
    inputs |= {"side": 128, "steps": 2, "modulation": "8 bit"}
    return {**prompt, "30": {"class_type": "SD35Quantize", "inputs": inputs}}


@pytest.mark.parametrize("what", ["drawing", "packing"])
def test_quantizing_can_be_cancelled_while_it_draws_and_while_it_packs(
    server: hosts.Server, place: Path, recovers: None, what: str
) -> None:
    def begun(event: Event) -> bool:
        steps = 2
        return event["type"] == "progress" and (what == "drawing") == (
            event["data"]["max"] == steps
        )

    before = files_of(place)
    assert cancelled(server, quantizing(format="2 bit"), begun) == "30"
    assert files_of(place) == before


def files_of(place: Path) -> set[Path]:
    """All files under the host's models and outputs."""
    return {p for folder in ("models", "output") for p in (place / folder).rglob("*.*")}


@contextmanager
def limit(server: hosts.Server, what: str, most: int) -> Iterator[None]:
    """Have the system refuse the server more than `most` bytes of something."""
    import resource

    assert server.process is not None
    kind = getattr(resource, what)
    before = resource.prlimit(server.process.pid, kind)
    resource.prlimit(server.process.pid, kind, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, kind, before)


def memory_of(server: hosts.Server) -> int:
    """Bytes of the server's address space."""
    assert server.process is not None
    pages = Path(f"/proc/{server.process.pid}/statm").read_text("utf-8").split()[0]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_no_more_memory_in_mid_sampling_says_what_to_do(
    server: hosts.Server, workflow: Prompt, recovers: None
) -> None:
    prompt = changed(workflow, model=MODEL, modulation_cache="on", steps=6)
    prompt["4"]["inputs"].update(width=256, height=256, batch_size=16)
    prompt["30"] = {"class_type": "Greedy", "inputs": {"model": prompt["5"]["inputs"]["model"]}}
    prompt["5"]["inputs"]["model"] = ["30", 0]
    steps = list[int]()

    def act(event: Event) -> None:
        steps.extend(step for step in range(1, 7) if is_step(event, "5", step))

    message = failed(server, prompt, act)
    assert steps[-1] == 2
    assert "Out of memory while sampling 16 pictures of 256x256 (" in message
    assert "bytes more were asked for). Make the picture or the batch smaller" in message


@linux
def test_no_more_memory_at_loading_says_what_to_do(
    server: hosts.Server, place: Path, recovers: None
) -> None:
    prompt = steered()
    prompt["1"]["inputs"]["model"] = "huge.safetensors"
    with (
        huge(place / "models" / "checkpoints" / "huge.safetensors"),
        limit(server, "RLIMIT_AS", memory_of(server) + 200 * MB),
    ):
        message = failed(server, prompt)
    assert "Out of memory while loading 'huge.safetensors'. Close other programs" in message


@contextmanager
def huge(path: Path) -> Iterator[None]:
    """A file of a tensor of 1 GB, which takes no room on the disk."""
    size = 1000 * MB
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)
    yield
    path.unlink()


DELETED = "is not in ComfyUI's (diffusion_models or checkpoints|controlnet) folder any more. Put it"
SPOILT = {
    "the model is deleted": (MODEL, None, DELETED),
    "the ControlNet is deleted": (CONTROL, None, DELETED),
    "half of the model is there": (MODEL, "half", r"\([\d,]+ bytes\).*download it again"),
    "the model is another kind of file": (MODEL, "other", "it is a ControlNet"),
    "the model is another model": (MODEL, "changed", ""),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_changes_while_its_prompt_waits(
    server: hosts.Server,
    place: Path,
    workflow: Prompt,
    first: np.ndarray,
    recovers: None,
    case: str,
) -> None:
    name, how, words = SPOILT[case]
    original = NANO if name == MODEL else CANNY
    (path,) = (place / "models").rglob(name)
    waiting: list[str] = []

    def act(event: Event) -> None:
        if event["type"] == "progress" and not waiting:
            answer = hosts.call(server.url, "/prompt", {"prompt": steered()})
            waiting.append(answer["prompt_id"])
            spoil(path, how)
            hosts.call(server.url, "/interrupt", {})

    long = changed(workflow, steps=1000, seed=next(NUMBER))
    try:
        assert followed(server.url, long, act)["type"] == "execution_interrupted"
        history = ended(server, waiting[0])
    finally:
        shutil.copyfile(original, path)
    if words:
        assert re.search(f"'{name}'.*{words}", hosts.failure(history)), history
    else:
        (data,) = hosts.pictures(server.url, history)
        assert not np.array_equal(np.asarray(Image.open(io.BytesIO(data))), first)


def spoil(path: Path, how: str | None) -> None:
    """Delete a model's file, or put something else in its place."""
    path.unlink()
    if how == "half":
        path.write_bytes(NANO.read_bytes()[: NANO.stat().st_size // 2])
    elif how == "other":
        shutil.copyfile(CANNY, path)
    elif how == "changed":
        file = TensorFile(NANO)
        key = "model.diffusion_model.final_layer.linear.bias"
        write_file(path, {**file, key: file[key] + 1}, file.metadata)


def ended(server: hosts.Server, prompt_id: str) -> dict[str, Any]:
    """The history of a prompt, once it has ended."""
    while True:
        history = hosts.call(server.url, f"/history/{prompt_id}").get(prompt_id)
        if history is not None and history.get("status", {}).get("status_str"):
            return history
        time.sleep(0.05)


def test_a_file_that_changes_while_it_is_read_is_never_half_one_and_half_the_other(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, path)
    file = TensorFile(path)
    assert not file["a"].any()
    time.sleep(0.02)
    save_file({"b": torch.ones(4), "a": torch.ones(4)}, path)
    with pytest.raises(CheckpointError, match="replaced by another file.*queue again"):
        file["b"]
    path.unlink()
    with pytest.raises(CheckpointError, match="'model.safetensors' is not there.*Put it back"):
        file["b"]


@linux
def test_a_full_disk_leaves_no_file_of_a_quantized_model(
    server: hosts.Server, place: Path, recovers: None
) -> None:
    before, prompt = files_of(place), quantizing()
    with limit(server, "RLIMIT_FSIZE", 4 * MB):
        message = failed(server, prompt)
    assert "copy_int8.safetensors' could not be written (30 MB)" in message
    assert "Make room on the disk" in message and files_of(place) == before
    hosts.run_prompt(server.url, prompt)
    (written,) = files_of(place) - before
    assert len(TensorFile(written)) > 0
    ordinary = place / "ordinary"
    ordinary.touch()
    assert written.stat().st_mode == ordinary.stat().st_mode, "who reads others reads this one"
    written.unlink()


@linux
def test_a_full_disk_leaves_no_half_picture(
    server: hosts.Server, place: Path, recovers: None
) -> None:
    size = {"width": 1024, "height": 1024, "batch_size": 1, "color": 0}
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": size},
        "2": {
            "class_type": "ImageAddNoise",
            "inputs": {"image": ["1", 0], "seed": next(NUMBER), "strength": 1.0},
        },
        "3": {
            "class_type": "SaveImage",
            "inputs": {"images": ["2", 0], "filename_prefix": "full/disk"},
        },
    }
    before = files_of(place)
    with limit(server, "RLIMIT_FSIZE", 1 * MB):
        message = failed(server, prompt)
    assert "File too large" in message and files_of(place) == before
    hosts.run_prompt(server.url, prompt)
    (written,) = files_of(place) - before
    assert Image.open(written).size == (1024, 1024)


def test_a_server_killed_while_it_writes_leaves_nothing_under_the_files_name(
    server: hosts.Server, comfyui: hosts.Host, place: Path, recovers: None
) -> None:
    folder = place / "models" / "checkpoints"
    fat, out = folder / "fat.safetensors", folder / "fat_int8.safetensors"
    file = TensorFile(NANO)
    filler = {"text_encoders.filler.weight": torch.zeros(300 * MB, dtype=torch.uint8)}
    write_file(fat, {**file, **filler}, file.metadata)
    before = files_of(place)
    with hosts.Server(comfyui, base=place, arguments=["--cpu"]) as other:
        hosts.call(other.url, "/prompt", {"prompt": quantizing(fat.name)})
        deadline = time.monotonic() + 60
        begun: list[Path] = []
        while not begun or begun[0].stat().st_size < 10 * MB:
            assert time.monotonic() < deadline, other.log_tail()
            time.sleep(0.001)
            begun = list(folder.glob(".sd35-*.partial"))
        assert other.process is not None
        other.process.kill()
        other.process.wait()
    (partial,) = begun
    assert files_of(place) - before == {partial}
    assert partial.stat().st_size < 300 * MB, "it was whole already"
    listed = hosts.call(server.url, "/object_info/SD35Loader")
    assert fat.name in json.dumps(listed) and out.name not in json.dumps(listed)
    os.utime(partial, (0, 0))  # a day later
    hosts.run_prompt(server.url, quantizing(fat.name))
    assert files_of(place) - before == {out} and set(TensorFile(out)) >= filler.keys()
    fat.unlink()
    out.unlink()


NAN = float("nan")


def test_a_latent_that_holds_no_numbers_is_refused_before_sampling(
    server: hosts.Server, workflow: Prompt, recovers: None
) -> None:
    prompt = changed(workflow, model=MODEL, steps=1000)
    blank = {"samples": ["4", 0], "multiplier": NAN}
    prompt["40"] = {"class_type": "LatentMultiply", "inputs": blank}
    prompt["41"] = {
        "class_type": "LatentBatch",
        "inputs": {"samples1": ["4", 0], "samples2": ["40", 0]},
    }
    prompt["5"]["inputs"]["latent"] = ["41", 0]
    message = failed(server, prompt)
    assert "4,096 of 8,192 values of the latent are not numbers" in message
    assert "Look for the node that made it" in message


def test_a_result_of_no_numbers_is_an_error(
    server: hosts.Server, workflow: Prompt, recovers: None
) -> None:
    message = failed(server, changed(workflow, model=MODEL, steps=1, cfg=NAN))
    assert "1 of 1 pictures would be black: 4,096 of 4,096 values" in message
    assert "(cfg nan, dtype torch." in message and "Use another weight_dtype" in message


def test_a_broken_picture_beside_a_whole_one_is_a_warning(
    comfy: SimpleNamespace, ours: Any, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    whole = sampled(comfy, ours, conds)

    def break_first(arguments: dict[str, Any]) -> torch.Tensor:
        denoised = arguments["denoised"].clone()
        denoised[0, 0, 0, 0] = NAN
        return denoised

    broken = ours.clone()
    broken.set_model_sampler_post_cfg_function(break_first)
    with caplog.at_level(logging.WARNING, "sd35"):
        seen = sampled(comfy, broken, conds)
    assert "1 of 2 pictures would be black" in caplog.text
    assert seen[0].isnan().any() and torch.equal(seen[1], whole[1])


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 128, 8, 8), (1, 16, 3, 16, 16)])
@pytest.mark.parametrize("own", [True, False])
def test_a_latent_of_another_model_says_so(
    shape: tuple[int, ...], own: bool, comfy: SimpleNamespace, ours: Any, ksampler: Any, conds: Any
) -> None:
    latent = {"samples": torch.ones(shape)}
    with pytest.raises(Exception, match="made for another model.*EmptySD3LatentImage"):
        if own:
            settings = (latent, 5, 3, 4.0, 3.0, "dpmpp_2m", "beta", 1.0)
            comfy.sampler.SD35Sampler.execute(ours, conds.positive, conds.negative, *settings)
        else:
            ksampler(ours, latent=latent)
