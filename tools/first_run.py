"""The README's two commands where little is there; Linux, as root.

    python tools/first_run.py [--tests]

In an empty folder whose name has spaces and other letters, with an empty cache, as a user without
rights, without git, compiler or proxy: the demo twice at once and one file of tests; then, with
the network taken away, the demo again and the tests (a few, or with --tests all of them). About
7 GB in /tmp, given back.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import host

NEEDS = ("setpriv", "unshare", "ip")
NOBODY = "65534"
AS_NOBODY = [
    shutil.which("setpriv") or "",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
]
UP = f'{shutil.which("ip")} link set lo up && exec "$0" "$@"'
OFFLINE = [shutil.which("unshare") or "", "--net", "/bin/sh", "-c", UP]
PYTHON = "/usr/bin/python3"
NAME = "a folder, Über 图"
MISSING = re.compile(r"^git|gcc|g\+\+|clang|^[cg]?cc|^c[89]9|^c\+\+|^(ld|as|make|cmake)(\.|$)|-ld")
"""Programs that are not there: git and compilers."""
FEW = ["tests/unit", "tests/host/test_demo.py", "tests/host/test_check.py"]
SECONDS = 3600


class Place:
    """A folder with the pack, as from a zip, and a machine's worth of nothing around it."""

    def __init__(self, root: Path):
        self.root = root
        self.pack = root / NAME
        files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(files, cwd=host.PACK, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            target = self.pack / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(host.PACK / name, target)
        programs = root / "bin"
        programs.mkdir()
        for found in Path("/usr/bin").iterdir():
            if not MISSING.search(found.name):
                (programs / found.name).symlink_to(found)
        self.environment = {
            "PATH": str(programs),
            "HOME": str(root),
            "SD35_CACHE": str(root / "cache"),
            "TMPDIR": str(root),
            "CC": "/bin/false",
            "CXX": "/bin/false",
            "LANG": "C.UTF-8",
            **{k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_"))},
        }
        subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(root)], check=True)
        root.chmod(0o755)

    def start(self, arguments: list[str], online: bool = True) -> subprocess.Popen[str]:
        command = [*AS_NOBODY, PYTHON, *arguments]
        return subprocess.Popen(
            command if online else [*OFFLINE, *command],
            cwd=self.pack,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )


def told(what: str, processes: list[subprocess.Popen[str]]) -> bool:
    """Wait for all, say how they ended, and show the last lines of those that failed."""
    start, good = time.monotonic(), True
    for process in processes:
        output = process.communicate(timeout=SECONDS)[0]
        seconds = time.monotonic() - start
        print(f"{'ok' if not process.returncode else 'FAILED'}: {what} ({seconds:.0f} s)")
        shown = output.splitlines()
        failed = [line for line in shown if line.startswith(("FAILED", "ERROR", "E  "))]
        print("   ", "\n    ".join([*failed[:40], *shown[-15 if process.returncode else -2 :]]))
        good &= not process.returncode
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="The README's commands where little is there.")
    parser.add_argument("--tests", action="store_true", help="every test, not a few")
    tests = ["tools/test.py", *([] if parser.parse_args().tests else FEW)]
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, NEEDS)):
        print(f"first_run: this needs Linux, root, {', '.join(NEEDS)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="sd35-first-") as temporary:
        place = Place(Path(temporary))
        demos = [place.start(["tools/demo.py", "--out", f"{n}.png"]) for n in ("one", "two")]
        good = told("demo, twice at once, empty cache, no git or compiler, no rights", demos)
        pictures = [place.pack / "one.png", place.pack / "two.png"]
        good &= all(p.is_file() and p.read_bytes().startswith(b"\x89PNG") for p in pictures)
        good &= told("one test", [place.start(["tools/test.py", "tests/unit/test_scenes.py"])])
        good &= told("demo, offline", [place.start(["tools/demo.py"], online=False)])
        good &= told("tests, offline", [place.start(tests, online=False)])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
