"""Run every test: python tools/test.py [--fast | pytest's arguments]

Gets what is missing first: a ComfyUI with its environment, the pictures that the small model
learned from and, on Debian as root, a Chromium for the tests of the canvas. After that it needs
no network. Without arguments it checks style and types and runs everything, in as many processes
as there are cores; with --fast style and what needs no ComfyUI, for someone who edits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import chromium, host, install
from tools.nano.pictures import emoji_folder


def browser_path() -> str | None:
    """A Chromium for the browser tests: one that is there, or Debian's, installed."""
    found = chromium.find_browser()
    if found is None and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        install.say("Installing chromium for the tests of the canvas")
        for command in (
            ["apt-get", "-qq", "update"],
            ["apt-get", "-qq", "install", "-y", "chromium"],
        ):
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, env=quiet)
        found = chromium.find_browser()
    return found


FAST = ["tests/unit", "tests/parity", "-m", "not slow"]
MOST_PROCESSES = 4
"""Each has a ComfyUI of its own, of about 2 GB."""


def shared_out() -> tuple[list[str], dict[str, str]]:
    """pytest's arguments for one process a core, a file of tests at a time, and the environment
    in which they don't take each other's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(cores or 1, MOST_PROCESSES)
    if processes == 1:
        return [], {}
    share = ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]
    return share, {"OMP_NUM_THREADS": str((cores or 1) // processes)}


def main() -> int:
    try:
        found = host.find_comfyui()
        emoji_folder()
    except host.HostError as error:
        print(f"test: {error}", file=sys.stderr)
        return 1
    browser = browser_path()
    environment = {
        **os.environ,
        **found.environment,
        "COMFYUI_PATH" if found.own else "SD35_HOST": str(found.folder),
        **({"SD35_CHROMIUM": browser} if browser else {}),
    }
    python = str(found.python)
    wanted = sys.argv[1:]
    commands = [[python, "-m", "pytest", *wanted]]
    options, threads = shared_out()
    if wanted in ([], ["--fast"]) or "-n" in wanted:
        environment |= threads
    if wanted in ([], ["--fast"]):
        style = [python, "-m", "ruff"]
        commands = [
            [*style, "check", "."],
            [*style, "format", "--check", "."],
            [python, "-m", "pytest", *options, *(FAST if wanted else [])],
        ]
    types = None
    if not wanted:  # beside the tests: it takes one core for a while
        command = [python, "-m", "pyright", "--pythonpath", python]
        types = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=host.PACK)
    codes = []
    for command in commands:
        install.say("$ " + " ".join(["python", *command[1:]]))
        codes.append(subprocess.call(command, cwd=host.PACK, env=environment))
    if types is not None:
        install.say("$ python -m pyright")
        print(types.communicate()[0], flush=True)
        codes.append(types.returncode)
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main())
