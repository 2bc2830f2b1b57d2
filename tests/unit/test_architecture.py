"""Which module may import which, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools.rooms import CORE, DRAWING, ROOT, between_rooms, circle, drawing, imports, used

ROOMS = {
    "__init__": set(),
    "words": set(),
    "errors": {"words"},
    "limits": {"errors"},
    "whole_file": {"words"},
    "network": {"errors", "limits"},
    "packing": {"errors", "limits"},
    "sampling": {"errors", "limits"},
    "checkpoint": {"errors", "limits", "network", "packing", "whole_file"},
    "encoders": {"checkpoint", "errors", "limits", "network"},
    "pipeline": {"checkpoint", "encoders", "errors", "network", "sampling", "whole_file"},
    "quantization": {
        *("checkpoint", "encoders", "errors", "network", "packing", "pipeline", "whole_file"),
    },
    "training": {
        *("checkpoint", "encoders", "errors", "limits", "network", "packing", "pipeline"),
        *("sampling", "whole_file"),
    },
    "workflow": {
        *("checkpoint", "errors", "limits", "network", "quantization", "sampling", "whole_file"),
        "words",
    },
}
"""Packages and modules of the core -> what they import of each other."""
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server"}


def outside(path: Path) -> set[str]:
    """Top-level names that a module imports."""
    return {name.split(".")[0] for name in imports(path)}


def test_each_room_of_the_core_imports_what_the_drawing_says() -> None:
    assert between_rooms(used(CORE)) == ROOMS


def test_the_drawing_in_the_readme_shows_the_rooms_as_they_are() -> None:
    assert DRAWING.read_text(encoding="utf-8") == drawing(), "run python tools/rooms.py"
    assert f"({DRAWING.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text("utf-8")


def test_no_modules_of_the_core_import_each_other() -> None:
    assert not circle(used(CORE))


def test_the_core_imports_no_host() -> None:
    for path in CORE.rglob("*.py"):
        assert not outside(path) & HOST, path


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("from ...pipeline import draw", {"pipeline"}),
        ("from ... import pipeline", {"pipeline"}),
        ("import sd35_core.pipeline", {"pipeline"}),
        ("from sd35_core import pipeline", {"pipeline"}),
        ("def late():\n    from ..other import deep", {"other"}),
        ("from .sibling import name", {"room.inner.sibling"}),
        ("import torch", set()),
    ],
)
def test_an_import_in_a_package_in_a_package_is_seen(
    planted: str, seen: set[str], tmp_path: Path
) -> None:
    inner = tmp_path / "sd35_core" / "room" / "inner"
    inner.mkdir(parents=True)
    for name in ("__init__", "pipeline", "room/__init__", "room/other", "room/inner/sibling"):
        (tmp_path / "sd35_core" / f"{name}.py").touch()
    (inner / "planted.py").write_text(planted, encoding="utf-8")
    found = used(tmp_path / "sd35_core")["room.inner.planted"]
    assert found == {"room.other" if name == "other" else name for name in seen}


def test_modules_in_a_ring_are_named() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda p: p.stem)
def test_nodes_reach_the_host_only_through_its_package(path: Path) -> None:
    assert outside(path) & HOST <= {"comfy_api"}


def test_the_pack_uses_no_pickle_eval_network_or_subprocess() -> None:
    banned = {"pickle", "subprocess", "socket", "urllib", "requests", "http", "ctypes", "marshal"}
    for folder in ("sd35_core", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not outside(path) & banned, path
            names = {
                n.id
                for n in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(n, ast.Name)
            }
            assert not names & {"eval", "exec", "print"}, path


def test_no_function_or_class_has_the_name_of_another() -> None:
    """So a name that is searched for has one meaning; `main` is each command's own."""
    found: dict[str, Path] = {}
    for path in [*CORE.rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                public = not node.name.startswith("_") and node.name != "main"
                assert not public or node.name not in found, (node.name, path, found[node.name])
                found[node.name] = path


LONGEST = {
    **dict.fromkeys(("sd35_core", "nodes", "automation", "web"), 350),
    **dict.fromkeys(("tools", "tests"), 450),
}
"""Lines of a file."""


def test_every_file_can_be_read_at_once() -> None:
    for folder, most in LONGEST.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".js"):
                assert len(path.read_text(encoding="utf-8").splitlines()) <= most, path


def test_no_test_imports_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert not any(".test_" in name for name in imports(path)), path


LENT = {"sd35_core", "sd35_core.whole_file", "sd35_core.words"}
"""What automation may use of the core, which needs no torch for it."""


def test_the_automation_needs_no_host_torch_or_pack() -> None:
    for path in (ROOT / "automation").glob("*.py"):
        assert not outside(path) & {*HOST, "torch", "nodes", "tools"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [node.module if node.module in LENT - {"sd35_core"} else n for n in names]
            assert {name for name in names if name and name.startswith("sd35_core")} <= LENT, path
    modules = [f"automation.{path.stem}" for path in (ROOT / "automation").glob("[!_]*.py")]
    code = (
        "import sys\n" + "\n".join(f"import {m}" for m in ["automation.__main__", *modules])
        + "\nprint(*(m for m in sys.modules if m.split('.')[0] in ('torch', 'sd35_core')))"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
    )
    assert set(done.stdout.split()) == LENT


def test_the_core_imports_with_torch_alone() -> None:
    modules = [f"sd35_core.{module}" for module in used(CORE) if not module.endswith("__")]
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
    folders = ("sd35_core", "nodes", "automation", "examples", "tools", "tests")
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


WRITER = "sd35_core/whole_file.py"
NOT_FILES = {
    # What another program writes into while it runs.
    "automation/cluster.py Host._start: open",
    "tools/host.py Server.__enter__: open",
    # Locks, and a file of lines that are added.
    "tools/install.py locked: open",
    "automation/manifest.py Manifest._append: open",
    # The system's own: a switch, not a file.
    "tools/bench.py extra_memory: write_text",
    # A folder that is filled under another name and then gets its own.
    "tools/install.py _fetch_source: rename",
    "tools/nano/pictures.py _fetch: write_bytes",
    "tools/nano/pictures.py _fetch: rename",
    # Copies of folders and files for one run, in temporary folders or beside ComfyUI's nodes.
    "tools/host.py link_pack: symlink_to",
    "tools/host.py link_pack: copytree",
    "tools/host.py Server._command: copytree",
    "tools/host_suites.py compared: copytree",
    "tools/first_run.py Place.__init__: copy",
    "tools/first_run.py Place.__init__: symlink_to",
    "tools/bench_batch.py measure: copy",
    # `save` of other things than pictures: a file that a server has, into a Place.
    "automation/batch.py _do: save",
}
"""Calls that look like writing a file and are allowed to: streams, copies, and no files at all."""
WRITING = {
    *("write_text", "write_bytes", "save", "save_file", "savefig", "tofile", "dump"),
    *("rename", "renames", "link", "symlink", "symlink_to", "hardlink_to", "fdopen"),
    *("NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile", "mkstemp"),
    *("copy", "copy2", "copyfile", "copyfileobj", "copytree", "move"),
}
OPENERS = {"webbrowser", "opener", "Image", "tarfile"}
"""What else has an `open`."""


def writes(text: str) -> set[str]:
    """FUNCTION: CALL for every call in a module's text that may write a file its own way."""
    found: set[str] = set()

    def walk(node: ast.AST, inside: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = f"{inside}.{node.name}".lstrip(".")
        if isinstance(node, ast.Call) and (name := writing(node)):
            found.add(f"{inside}: {name}")
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(ast.parse(text), "")
    return found


def writing(call: ast.Call) -> str:
    """The name of what is called, if that may write a file."""
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    given = len(call.args) + len(call.keywords)
    if name == "open" and owner not in OPENERS:
        number = 0 if method and owner not in ("io", "os", "codecs", "gzip") else 1
        modes = call.args[number : number + 1]
        modes += [keyword.value for keyword in call.keywords if keyword.arg in ("mode", "flags")]
        plain = [m.value for m in modes if isinstance(m, ast.Constant)]
        read = len(plain) == len(modes) and not any(set(str(m)) & set("wxa+") for m in plain)
        return "" if read else name
    if name == "replace":  # of os, or of a Path: of a text it takes two, of a dataclass it is bare
        return name if owner == "os" or (method and given == 1) else ""
    if name == "screenshot":
        return name if any(keyword.arg == "path" for keyword in call.keywords) else ""
    if name == "save" and not given:  # of a training
        return ""
    if name in ("copy", "link", "symlink", "move") and owner not in ("os", "shutil"):  # of others
        return ""
    if name == "write_text" and not method:  # whole_file's
        return ""
    return name if name in WRITING else ""


def test_every_file_is_written_by_one_module() -> None:
    folders = ("sd35_core", "nodes", "automation", "tools")
    found = set()
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(folders) and name != WRITER:
            found |= {f"{name} {each}" for each in writes(path.read_text(encoding="utf-8"))}
    assert found == NOT_FILES


@pytest.mark.parametrize(
    "planted",
    [
        "path.write_text('x', encoding='utf-8')",
        "Path('x').write_bytes(b'')",
        "open(path, 'w', encoding='utf-8')",
        "open(path, mode='xb')",
        "path.open('ab')",
        "path.open(mode)",
        "io.open(path, 'r+')",
        "os.open(path, os.O_CREAT)",
        "os.fdopen(handle, 'wb')",
        "os.replace(a, b)",
        "os.rename(a, b)",
        "partial.replace(path)",
        "partial.rename(path)",
        "tempfile.NamedTemporaryFile()",
        "tempfile.mkstemp()",
        "Image.fromarray(x).save(path)",
        "save_file(tensors, path)",
        "safetensors.torch.save_file(tensors, path)",
        "torch.save(tensors, path)",
        "json.dump(x, file)",
        "shutil.copy(a, b)",
        "page.screenshot(path='x.png')",
    ],
)
def test_a_file_written_another_way_is_found(planted: str) -> None:
    assert writes(f"class A:\n    def f(self):\n        return {planted}")
    harmless = (
        "text.replace('a', 'b')", "replace(config, a=1)", "path.open('rb')", "open(path)",
        "dictionary.copy()", "run.save()", "write_text(path, text, replace=True)",
        "copy.deepcopy(x)", "Image.open(path)", "page.screenshot(clip=x)",
    )  # fmt: skip
    assert not writes("\n".join(harmless))
