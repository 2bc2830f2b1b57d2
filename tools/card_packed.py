"""Unpacks what `tools/card.py --pack` packed, and runs it: python card.py

It lies there as card.py, beside card.tar.xz; the machine needs Python and torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "unpacked"


def main() -> int:
    if not (FOLDER / "complete.txt").is_file():
        with tarfile.open(HERE / "card.tar.xz") as archive:
            archive.extractall(FOLDER, filter="data")
        (FOLDER / "complete.txt").touch()
    pack = next(path.parent.parent for path in FOLDER.glob("*/tools/card.py"))
    found = [str(FOLDER / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "COMFYUI_PATH": str(FOLDER / "ComfyUI"),
        "PYTHONPATH": os.pathsep.join(found),
    }
    out = os.environ.get("OUT") or str(HERE)
    command = [sys.executable, str(pack / "tools" / "card.py"), "--out", out, *sys.argv[1:]]
    return subprocess.call(command, env=environment)


if __name__ == "__main__":
    sys.exit(main())
