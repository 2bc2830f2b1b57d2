"""tools/score.py as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tools.nano.scoring import main

from ..conftest import NANO, PACK


def score(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PACK / "tools" / "score.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def captions(tmp_path: Path, comfy: SimpleNamespace) -> Path:
    file = tmp_path / "captions.txt"
    file.write_text(
        "a big avocado on a pink background\n\na panda and a pig on a blue background\n"
        "three apples on a sky blue background\na picture of a large frog, white background\n",
        encoding="utf-8",
    )
    return file


def test_it_draws_a_file_of_captions_and_counts_what_is_right(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    done = score("--captions", str(captions), "--sheet", str(sheet), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    colours = [picture["caption"].split()[-2] for picture in found["pictures"]]
    assert colours == ["pink", "blue", "blue", "white"]
    figures = found["figures"]
    assert figures["all"]["pictures"] == 4 and figures["two things"]["pictures"] == 1
    assert figures["all"]["thing"] >= 0.75 and figures["all"]["colour"] == 1
    assert Image.open(sheet).size == (4 * 128, 128)
    assert main(["--captions", str(captions), "--json"]) == 0
    assert capsys.readouterr().out == done.stdout, "the same seeds give the same pictures"


def test_settings_reach_the_picture(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--captions", str(captions), "--steps", "6"]
    variants = {
        "plain": [],
        "cfg": ["--cfg", "1"],
        "slg": ["--slg", "1-2", "--slg-end", "0.8"],
        "euler": ["--sampler", "euler", "--schedule", "beta"],
        "negative": ["--negative", "a big avocado on a pink background"],
        "without": ["--without", "clip_g"],
        "seed": ["--seed", "7", "--model", str(NANO)],
        "size": ["--size", "160x96"],
    }
    sheets = {}
    for name, more in variants.items():
        sheet = tmp_path / f"{name}.png"
        assert main([*few, *more, "--sheet", str(sheet)]) == 0
        assert "all (4): right thing" in capsys.readouterr().out
        sheets[name] = Image.open(sheet).tobytes()
    assert len(set(sheets.values())) == len(variants)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--captions", "nowhere.txt"], "nowhere.txt"),
        (["--slg", "9"], "there is no layer 9"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", str(PACK / "workflows")], "holds 0 safetensors files"),
    ],
)
def test_what_cannot_work_is_said(arguments: list[str], words: str) -> None:
    done = score(*arguments)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_a_caption_outside_the_grammar_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a cat on a red background\na gearbox on a red background\n", encoding="utf-8")
    done = score("--captions", str(file))
    assert done.returncode == 1 and "line 2" in done.stderr and "'gearbox'" in done.stderr
