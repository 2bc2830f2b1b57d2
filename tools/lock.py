"""Write tools/requirements/VERSION.txt: all that ComfyUI and the tests need, pinned by hash.

    pip install uv
    python tools/lock.py [VERSION ... | newest | release]

One file for a version of ComfyUI serves Python 3.10 and newer on Windows, Linux and macOS.
tools/host.py installs from it, so nothing reaches a machine that was not seen when it was written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text
from tools import host, install

TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
"""A set that fits together; left to itself PyPI gives torch and torchaudio for different CUDAs."""
TEST_TOOLS = [
    *("pytest", "pytest-xdist"),
    "ruff",
    "pyright[nodejs]",
    "playwright",
    "gguf==0.19.0",
    "hypothesis",
    *("aiohttp", "filelock", "fsspec", "ray", "tqdm"),  # of automation
    *("pytest-aiohttp", "pytest-asyncio", "websocket-client"),  # of ComfyUI's own tests
]
RELEASE = ["cyclonedx-bom"]
"""Of the release action; it writes the bill of materials."""
NEWEST = ["comfyui-frontend-package", "comfy-kitchen"]
"""What goes before a ComfyUI's own, as new as PyPI has it."""
NOT_NEEDED = ("comfyui-workflow-templates",)


def needed(version: str) -> list[str]:
    """What requirements.txt of a ComfyUI asks for, with torch pinned, and the tests' tools."""
    if version == "release":
        return RELEASE
    if version == "newest":
        return NEWEST
    text = (install.source(version)[0] / "requirements.txt").read_text(encoding="utf-8")
    names = [line.split("#")[0].strip() for line in text.splitlines()]
    return [*TORCH, *TEST_TOOLS, *(n for n in names if n and not n.startswith(NOT_NEEDED))]


def lock(version: str) -> Path:
    target = install.lock_file(version)
    with tempfile.TemporaryDirectory() as temporary:
        source, made = Path(temporary) / "requirements.in", Path(temporary) / target.name
        write_text(source, "\n".join(needed(version)), replace=False)
        if target.is_file():
            write_text(made, target.read_text(encoding="utf-8"), replace=False)  # its pins are kept
        options = ["--universal", "--python-version", "3.10", "--generate-hashes", "-q"]
        if version == "newest":
            options += ["--upgrade", "--no-deps"]
        plain = ["--no-annotate", "--no-header", "--only-binary", ":all:", "--no-cache"]
        install.run(
            ["uv", "pip", "compile", *options, *plain, str(source), "-o", str(made)], "lock"
        )
        write_text(target, made.read_text(encoding="utf-8"), replace=True)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description="Pin what ComfyUI and the tests need.")
    parser.add_argument("versions", nargs="*", default=[*install.VERSIONS, "newest", "release"])
    try:
        for version in parser.parse_args().versions:
            print(lock(version))
    except host.HostError as error:
        print(f"lock: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
