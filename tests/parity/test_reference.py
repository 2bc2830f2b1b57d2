"""The reference's recorded numbers, through tools/parity.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools import parity

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted((ROOT / "tests" / "data" / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_a_case_holds(path: Path) -> None:
    record, tensors = parity.read(path)
    with torch.no_grad():
        differences = dict(parity.CHECKS[record["kind"]](record, tensors))
    assert differences
    assert max(differences.values()) <= parity.TOLERANCES[record["kind"]], differences


def test_the_tool_counts_and_fails_on_a_wrong_number(tmp_path: Path) -> None:
    source = CASES[0]
    record_text = parity.safe_open(source, framework="pt").metadata()
    tensors = load_file(source)
    save_file(tensors, tmp_path / "right.safetensors", metadata=record_text)
    command = [sys.executable, str(ROOT / "tools" / "parity.py"), str(tmp_path)]
    good = subprocess.run(command, capture_output=True, text=True)
    assert (good.returncode, good.stdout.splitlines()[-1]) == (0, "1 passed, 0 failed")
    key = next(name for name in tensors if name.startswith("out."))
    tensors[key] = tensors[key] + 1e-3
    save_file(tensors, tmp_path / "wrong.safetensors", metadata=record_text)
    bad = subprocess.run(command, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout.splitlines()[-1]) == (1, "1 passed, 1 failed")
