"""Where the tests find a ComfyUI: SD35_HOST or COMFYUI_PATH, as tools/test.py sets them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools import host as hosts

PACK = Path(__file__).resolve().parent.parent
NANO = PACK / "models" / "nano" / "sd35_nano.safetensors"


LONGEST = (
    *("test_ray", "test_panels", "test_canvas", "test_card", "test_load", "test_reach"),
    *("test_judge", "test_training", "test_dataset", "test_packing"),
)
"""Files that take minutes come first, so that none of them is left to one process at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"{name}.py": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def comfyui() -> hosts.Host:
    """The host; tests that need it are skipped without one."""
    if not os.environ.get("COMFYUI_PATH") and not os.environ.get("SD35_HOST"):
        pytest.skip("no ComfyUI: run python tools/test.py, or set COMFYUI_PATH")
    return hosts.find_comfyui()


@pytest.fixture(scope="session")
def clip_files(comfyui: hosts.Host) -> Path:
    """The folder with the files of CLIP's tokenizer."""
    return comfyui.folder / "comfy" / "sd1_tokenizer"
