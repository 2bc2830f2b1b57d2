"""Batches run as programs, and what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..conftest import PACK

JOBS = 8


def started(
    table: Path, *options: str, before: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACK), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "automation", "batch", str(table)]
    return subprocess.Popen(
        [*command, "--out", str(table.parent / "out"), *options],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        preexec_fn=before,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=240)
    assert "Traceback" not in error, error
    return process.returncode, out, error


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()
    ]


def check_files(folder: Path) -> None:
    """Every picture of the manifest is there, as it says, and nothing else."""
    named = {f["name"]: f["sha256"] for entry in lines(folder) for f in entry.get("files", ())}
    seen = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.png")}
    assert seen == named
    assert not list(folder.glob(".*.partial"))
