"""What the pack reaches at run time: the host's folders, no others; no network, no process."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sd35_core.packing.formats import INT8
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantize_file
from tools import host as hosts
from tools import workflows

from ..conftest import NANO, PACK

API = PACK / "workflows" / "api"
TRICKS = (
    "../secret.safetensors",
    "../../secret.safetensors",
    "diffusion_models/../../secret.safetensors",
    "..\\secret.safetensors",
    "{secret}",
    "file://{secret}",
    "//secret.safetensors",
    "sub/../../../secret.safetensors",
    "~/secret.safetensors",
    "secret.safetensors\0",
    "/dev/zero",
    "/proc/self/mem",
)
Events = list[tuple[str, str]]


@pytest.fixture(scope="module")
def watched(
    comfyui: hosts.Host, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[hosts.Server, Path]]:
    """A server whose audit events from this pack are written down, and where."""
    base = tmp_path_factory.mktemp("watched")
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    shutil.copy(NANO, models / "copy.safetensors")
    quantize_file(NANO, Plan(8, INT8), out=models / "int8.safetensors")
    shutil.copy(NANO, base / "secret.safetensors")
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name("watcher.py"), base / "custom_nodes" / "a_watcher.py")
    hosts.link_pack(base / "custom_nodes")
    record = base / "events.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SD35_WATCH", str(record))
        with hosts.Server(comfyui, base, ["--cpu"]) as server:
            yield server, record


def events(record: Path) -> Events:
    return [tuple(json.loads(line)) for line in record.read_text("utf-8").splitlines()]


def outside(record: Path, *roots: Path) -> Events:
    """Files that were opened elsewhere than under the given folders."""
    real = [root.resolve() for root in roots]
    return [
        (kind, path)
        for kind, path in events(record)
        if kind in ("read", "write")
        and not any(Path(path).is_relative_to(root) for root in real)
        and not path.endswith(".pyc")
    ]


def test_drawing_and_quantizing_need_no_network_process_or_pickle(
    watched: tuple[hosts.Server, Path], comfyui: hosts.Host
) -> None:
    server, record = watched
    prompts = [json.loads(path.read_text("utf-8")) for path in sorted(API.glob("*.json"))]
    for prompt in prompts:
        if not workflows.files_of(prompt):
            hosts.run_prompt(server.url, short(workflows.drawn(prompt)))
    loader = {"class_type": "SD35Loader", "inputs": loader_inputs("copy.safetensors")}
    quantize = {"class_type": "SD35Quantize", "inputs": {"format": "2 bit", "model": ["1", 0]}}
    hosts.run_prompt(server.url, {"1": loader, "2": quantize})
    plan = json.loads((PACK / "workflows" / "text_to_image.json").read_text("utf-8"))
    assert hosts.call(server.url, "/sd35/plan", plan)

    seen = [kind for kind, _ in events(record)]
    stopped = [kind for kind in seen if kind not in ("read", "write")]
    assert stopped == ["socket.getaddrinfo", "subprocess.Popen", "pickle.find_class", "compile"]
    assert seen.count("read") > 10 and seen.count("write") >= 1
    written = [path for kind, path in events(record) if kind == "write"]
    assert all(Path(path).is_relative_to(server.base.resolve()) for path in written)
    python = Path(comfyui.python).parent.parent, Path(sysconfig.get_path("stdlib"))
    system = Path("/proc"), Path("/sys"), Path("/usr"), Path("/etc")
    assert outside(record, server.base, comfyui.folder, PACK, *python, *system) == []


@pytest.mark.parametrize("name", TRICKS)
def test_a_name_never_leads_out_of_the_models_folders(
    watched: tuple[hosts.Server, Path], name: str
) -> None:
    server, record = watched
    secret = server.base / "secret.safetensors"
    name = json.dumps(name.format(secret=secret))
    for file in ("sd35_nano.safetensors", "sd35_nano_canny.safetensors", "from model file"):
        for workflow in (API, API.parent):
            text = (workflow / "controlnet_canny.json").read_text("utf-8")
            assert json.dumps(file) in text
            prompt = json.loads(text.replace(json.dumps(file), name))
            if workflow is not API:
                assert hosts.call(server.url, "/sd35/plan", prompt)
                continue
            with pytest.raises(hosts.HostError, match="not in list"):
                hosts.run_prompt(server.url, prompt)
    assert str(secret) not in [path for _, path in events(record)]
    assert not [path for _, path in events(record) if path.startswith("/dev/zero")]


def loader_inputs(model: str = "sd35_nano.safetensors") -> dict[str, Any]:
    parts = dict.fromkeys(("clip_l", "clip_g", "t5xxl", "vae"), "from model file")
    return {"model": model, **parts, "weight_dtype": "default"}


def short(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same with six steps."""
    for node in prompt.values():
        if isinstance(node["inputs"].get("steps"), int):
            node["inputs"]["steps"] = 6
    return prompt
