"""Which ComfyUI the tools take, and what its programs are started with."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tools import install


def pins(version: str) -> dict[str, tuple[int, ...]]:
    """Package -> its version; every one of them has hashes."""
    text = install.lock_file(version).read_text(encoding="utf-8")
    found = re.findall(r"^([\w-]+)==([\d.]+).*?\\\n    --hash=sha256:[0-9a-f]{64}", text, re.M)
    return {name: tuple(map(int, number.split("."))) for name, number in found}


def test_the_newest_front_end_is_pinned_by_hash_and_newer_than_the_hosts_own() -> None:
    newest, own = pins("newest"), pins(install.DEFAULT_VERSION)
    assert set(newest) == {"comfyui-frontend-package", "comfy-kitchen"}
    assert all(newest[name] > own[name] for name in newest)


def test_its_packages_stand_before_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    host = install.Host(tmp_path, tmp_path, own=False, overlay=tmp_path)
    assert host.environment == {"PYTHONPATH": f"{tmp_path}{os.pathsep}elsewhere"}
    assert install.Host(tmp_path, tmp_path, own=False).environment == {}


def test_a_version_that_is_not_known_is_named() -> None:
    with pytest.raises(install.HostError, match=r"0\.1\.0 is not known; known are 0\.30\.0"):
        install.get("0.1.0-newest")
