"""ComfyUI's own tests, without and with the pack in its custom_nodes; any difference is ours.

    python tools/host_suites.py [--report FILE]

Runs tests-unit and tests/execution of the archive in a copy of it. Exit 1 when a test ends
otherwise with the pack than without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text
from tools import host, install

SUITES = ("tests-unit", "tests/execution")
Outcomes = dict[str, str]


def outcomes(found: host.Host, folder: Path, suite: str) -> Outcomes:
    """Test -> passed, failed or skipped, of one of the suites in `folder`."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(found.python), "-m", "pytest", suite, "-q", "-p", "no:cacheprovider"]
    quiet = {"capture_output": True, "stdin": subprocess.DEVNULL}
    first = str(found.python.parent)  # these tests start servers with whatever `python` is
    path = os.pathsep.join([first, os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, f"--junitxml={report}"], cwd=folder, env=environment, timeout=3000, **quiet
    )
    if not report.is_file():
        raise host.HostError(f"{suite} did not run:\n{done.stdout.decode()[-2000:]}")
    ended = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{suite}::{case.get('classname')}::{case.get('name')}"
        ended[name] = "skipped" if kinds == {"skipped"} else "failed" if kinds else "passed"
    return ended


def compared(found: host.Host) -> tuple[Outcomes, Outcomes]:
    """The outcomes without the pack and with it."""
    ended = []
    with tempfile.TemporaryDirectory(prefix="sd35-suites-") as temporary:
        folder = Path(temporary) / "ComfyUI"
        shutil.copytree(found.folder, folder)
        for with_pack in (False, True):
            if with_pack:
                host.link_pack(folder / "custom_nodes")
            seen: Outcomes = {}
            for suite in SUITES:
                seen |= outcomes(found, folder, suite)
                install.say(f"{suite} {'with' if with_pack else 'without'} the pack: done")
            ended.append(seen)
    return ended[0], ended[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="ComfyUI's own tests, without and with the pack.")
    parser.add_argument("--report", type=Path, help="write every outcome there, as JSON")
    options = parser.parse_args()
    try:
        found = host.find_comfyui()
        without, beside = compared(found)
    except host.HostError as error:
        print(f"host_suites: {error}", file=sys.stderr)
        return 1
    if options.report:
        text = json.dumps({"without": without, "with": beside}, indent=1)
        write_text(options.report, text, replace=True)
    for name, ended in (("without", without), ("with", beside)):
        counts = ", ".join(
            f"{count} {kind}" for kind, count in sorted(Counter(ended.values()).items())
        )
        print(f"ComfyUI {found.version}, {name} the pack: {counts}")
    changed = [n for n in {**without, **beside} if without.get(n) != beside.get(n)]
    for name in changed:
        print(f"  {name}: {without.get(name)} -> {beside.get(name)}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
