"""What automation/README.md shows runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tools import host as hosts

from ..conftest import PACK

README = (PACK / "automation" / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str, folder: Path) -> None:
    (folder / "workflows").symlink_to(PACK / "workflows")
    (folder / "text_to_image.json").symlink_to(PACK / "workflows" / "api" / "text_to_image.json")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(PACK), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr


def test_the_script_without_the_client_saves_the_picture(
    server: hosts.Server, tmp_path: Path
) -> None:
    code = python_blocks()[1]
    assert len(code.splitlines()) <= 30
    run(code.replace("http://127.0.0.1:8188", server.url), tmp_path)
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_example_of_the_client_runs(server: hosts.Server, tmp_path: Path) -> None:
    imports, body = python_blocks()[0].split("\n\n", 1)
    inner = "".join(f"    {line}\n" for line in body.splitlines())
    ask = "    assert picture.startswith(b'\\x89PNG') and texts == {}\n"
    code = f"{imports}\nimport asyncio\nasync def main():\n{inner}{ask}asyncio.run(main())"
    run(code.replace("http://127.0.0.1:8188", server.url), tmp_path)
