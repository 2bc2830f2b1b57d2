"""The pack among others: loading it changes nothing else, and others' damage does not spread."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from sd35_core.packing.formats import INT8
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantize_file
from tools import host as hosts

from ..conftest import PACK
from ..unit.models import random_weights
from .cases import SMALL

LOAD = Path(__file__).parent / "load_beside.py"
NAUGHTY = """
import comfy.samplers, folder_paths, warnings
comfy.samplers.SAMPLER_NAMES.append("mine")
comfy.samplers.KSampler.sample = None
folder_paths.add_model_folder_path("mine", "models/mine")
warnings.simplefilter("ignore")
NODE_CLASS_MAPPINGS = {}
"""


def loaded(host: hosts.Host, base: Path, pack: Path) -> dict[str, Any]:
    """What loading a pack changed in a ComfyUI of its own."""
    command = [host.python, LOAD, host.folder, base, pack]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=base)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :])


def test_loading_the_pack_changes_nothing_of_the_host(comfyui: hosts.Host, tmp_path: Path) -> None:
    hosts.link_pack(tmp_path / "custom_nodes")
    seen = loaded(comfyui, tmp_path, tmp_path / "custom_nodes" / hosts.PACK_NAME)
    assert seen["loaded"] and seen["changed"] == []
    assert sorted(seen["routes"]) == ["/sd35/migrate", "/sd35/plan", "/sd35/recipes"]


def test_a_pack_that_changes_the_host_would_be_noticed(comfyui: hosts.Host, tmp_path: Path) -> None:
    pack = tmp_path / "custom_nodes" / "naughty"
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text(NAUGHTY, "utf-8")
    changed = "\n".join(loaded(comfyui, tmp_path, pack)["changed"])
    for place in (
        "/comfy.samplers.SAMPLER_NAMES",
        "/comfy.samplers.KSampler.sample",
        "/folder_paths.folder_names_and_paths/mine",
        "/warnings",
    ):
        assert place in changed


def test_with_broken_optional_packages_every_node_loads_and_says_what_is_missing(
    comfyui: hosts.Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workflow: dict[str, Any],
) -> None:
    shadow, models = tmp_path / "shadow", tmp_path / "base" / "models" / "diffusion_models"
    shadow.mkdir()
    models.mkdir(parents=True)
    (shadow / "gguf.py").write_text("raise RuntimeError('gguf does not fit numpy')\n", "utf-8")
    without_kitchen = tuple(map(int, comfyui.version.split("."))) < (0, 30)  # it needs it itself
    if without_kitchen:
        (shadow / "comfy_kitchen.py").write_text("raise ImportError('no kitchen')\n", "utf-8")
    (models / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    save_file(random_weights(SMALL), tmp_path / "small.safetensors")
    quantize_file(tmp_path / "small.safetensors", Plan(8, INT8), out=models / "int8.safetensors")
    monkeypatch.setenv("PYTHONPATH", str(shadow))
    with hosts.Server(comfyui, tmp_path / "base", ["--cpu"]) as server:
        known = hosts.call(server.url, "/object_info")
        nodes = json.loads((PACK / "tests" / "data" / "nodes.json").read_text("utf-8"))
        assert set(nodes) <= set(known) and "KSampler" in known
        hosts.run_prompt(server.url, workflow)
        loader = next(n for n in workflow.values() if n["class_type"] == "SD35Loader")
        expected = {"a.gguf": "gguf does not fit numpy.*pip install"}
        if without_kitchen:
            expected["int8.safetensors"] = "Quantized weights need the package comfy-kitchen"
        for model, says in expected.items():
            loader["inputs"]["model"] = model
            with pytest.raises(hosts.HostError, match=says):
                hosts.run_prompt(server.url, workflow)
