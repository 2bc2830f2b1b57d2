"""Which module may import which, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "sd35_core"
ALLOWED = {
    "__init__": set(),
    "words": set(),
    "whole_file": {"words"},
    "limits": {"errors"},
    "errors": {"words"},
    "latent": set(),
    "config": {"errors"},
    "guidance": {"errors"},
    "sampling": {"errors"},
    "layers": {"config"},
    "recipes": {"guidance"},
    "mmditx": {"config", "errors", "layers"},
    "modulation": {"mmditx"},
    "step_cache": set(),
    "preflight": {"errors", "guidance", "recipes", "sampling", "words"},
    "known_nodes": set(),
    "graph": {"errors", "known_nodes"},
    "panels": {"errors", "graph", "guidance", "preflight", "recipes", "workflow"},
    "headers": {"checkpoint", "config", "errors", "gguf_file", "preflight", "recipes"},
    "workflow": {"errors", "graph", "headers", "known_nodes", "preflight"},
    "packing": {"errors"},
    "checkpoint": {"config", "errors", "layers", "mmditx", "packing"},
    "gguf_file": {"checkpoint", "errors"},
    "controlnet": {"checkpoint", "config", "errors", "layers", "mmditx"},
    "hints": {"controlnet", "errors"},
    "autoencoder": {"errors", "latent", "layers"},
    "text_encoder": {"errors", "layers"},
    "dataset": {"autoencoder", "errors", "hints", "text_encoder"},
    "pipeline": {
        "autoencoder",
        "checkpoint",
        "controlnet",
        "errors",
        "guidance",
        "latent",
        "mmditx",
        "sampling",
        "step_cache",
        "text_encoder",
    },
    "calibration": {"controlnet", "mmditx"},
    "quantization": {
        "calibration",
        "checkpoint",
        "config",
        "controlnet",
        "errors",
        "packing",
        "pipeline",
        "text_encoder",
    },
    "training": {
        "autoencoder",
        "checkpoint",
        "config",
        "controlnet",
        "dataset",
        "errors",
        "latent",
        "layers",
        "mmditx",
        "pipeline",
        "sampling",
        "text_encoder",
    },
}
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(absolute top-level names, names of siblings) that a module imports anywhere."""
    absolute: set[str] = set()
    siblings: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            siblings |= {name.split(".")[0] for name in names if name}
    return absolute, siblings


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda p: p.stem)
def test_the_core_imports_no_host_and_only_downwards(path: Path) -> None:
    absolute, siblings = imports(path)
    assert not absolute & HOST
    assert siblings <= ALLOWED[path.stem]


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda p: p.stem)
def test_nodes_reach_the_host_only_through_its_package(path: Path) -> None:
    assert imports(path)[0] & HOST <= {"comfy_api"}


def test_the_pack_uses_no_pickle_eval_network_or_subprocess() -> None:
    banned = {"pickle", "subprocess", "socket", "urllib", "requests", "http", "ctypes", "marshal"}
    for folder in ("sd35_core", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not imports(path)[0] & banned, path
            names = {
                n.id
                for n in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(n, ast.Name)
            }
            assert not names & {"eval", "exec", "print"}, path


def test_the_automation_needs_no_host_torch_or_pack() -> None:
    for path in (ROOT / "automation").glob("*.py"):
        assert not imports(path)[0] & {*HOST, "torch", "sd35_core", "nodes", "tools"}, path


def test_the_core_imports_with_torch_alone() -> None:
    modules = [f"sd35_core.{path.stem}" for path in CORE.glob("*.py") if path.stem != "__init__"]
    code = (
        "import sys\nfor name in ('comfy', 'PIL', 'einops', 'transformers'):\n"
        "    sys.modules[name] = None\n" + "\n".join(f"import {m}" for m in modules)
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_text_file_is_opened_with_its_encoding() -> None:
    """Windows would take its own; the JSON and the prompts in these files are UTF-8."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert not is_text_without_encoding(node), f"{path}:{node.lineno}"


def is_text_without_encoding(call: ast.Call) -> bool:
    named = {keyword.arg for keyword in call.keywords}
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method in ("read_text", "write_text"):
        return "encoding" not in named and len(call.args) < (1 if method == "read_text" else 2)
    is_open = isinstance(call.func, ast.Name) and call.func.id == "open"
    if not is_open and method != "open":
        return False
    opener = ast.unparse(call.func)
    mode = ast.unparse(call.args[is_open]) if len(call.args) > is_open else "'r'"
    other = opener.startswith(("Image.", "tarfile.", "webbrowser.", "os.", "opener."))
    return not other and "b" not in mode and "encoding" not in named


def sources() -> list[Path]:
    folders = ("sd35_core", "nodes", "automation", "tools", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_file_has_a_name_that_windows_and_macos_can_keep() -> None:
    every = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
    listed = [path for path in every if not path.parts[0].startswith(".")]
    reserved = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}
    for path in listed:
        for part in path.parts:
            assert not set(part) & set('<>:"|?*\\') and part == part.rstrip(". "), path
            assert part.split(".")[0].lower() not in reserved, path
        assert len(str(path)) < 140, path  # Windows ends a path at 260, with its folders
    assert len({str(path).lower() for path in listed}) == len(listed)
