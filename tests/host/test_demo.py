"""tools/demo.py as a person runs it, against a running host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import host as hosts

from ..conftest import PACK


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PACK / "tools" / "demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_draws_what_is_asked_for_and_says_where(server: hosts.Server, tmp_path: Path) -> None:
    pictures = {}
    for prompt in ("a big owl on a purple background", "a big owl on a lime background"):
        out = tmp_path / "neue Bilder" / f"{prompt}.png"
        done = demo("--host", server.url, "--prompt", prompt, "--seed", "1", "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert f"Saved {out}" in done.stdout
        assert "step 28 of 28" in done.stderr
        pictures[prompt] = np.asarray(Image.open(out)).astype(int)
    purple, lime = pictures.values()
    assert np.abs(purple - lime).mean() > 10


def test_a_picture_that_is_there_is_replaced_only_when_that_is_asked_for(
    server: hosts.Server, tmp_path: Path
) -> None:
    out = tmp_path / "mine.png"
    out.write_bytes(b"mine")
    asked = ["--host", server.url, "--out", str(out), "--seed", "1"]
    done = demo(*asked)
    assert done.returncode == 1 and "add --replace" in done.stderr and "step" not in done.stderr
    assert out.read_bytes() == b"mine"
    assert demo(*asked, "--replace").returncode == 0
    with Image.open(out) as image:
        assert image.size == (128, 128)
    done = demo("--host", server.url, "--replace")
    assert done.returncode == 2 and "--replace needs --out" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workflow", str(PACK / "workflows" / "text_to_image.json")], "is a canvas workflow"),
        (["--workflow", str(PACK / "pyproject.toml")], "can't be read as JSON"),
        (["--workflow", "nowhere.json"], "can't be read as JSON"),
        (["--out", str(PACK / "tools")], "is a folder"),
        (["--out", str(PACK / "README.md")], "is there already"),
    ],
)
def test_a_workflow_of_another_kind_is_explained(
    server: hosts.Server, arguments: list[str], words: str
) -> None:
    done = demo("--host", server.url, *arguments)
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_host_that_is_not_there_is_explained(tmp_path: Path) -> None:
    done = demo("--host", f"http://127.0.0.1:{hosts.free_port()}")
    assert done.returncode == 1 and "No ComfyUI answers" in done.stderr
    done = demo("--host", str(tmp_path))
    assert done.returncode == 1 and "is no ComfyUI" in done.stderr
