"""Read workflows that others made, and count: python tools/strangers.py FOLDER [--models DIR]

Every JSON, PNG and WebP under the folder is checked as `python -m sd35_core.workflow` does. Said
are how many were read, refused (with why) and said to fit SD3.5, the findings by rule, and any
traceback, which is a fault of this pack.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.errors import SettingError
from sd35_core.workflow.check import LARGEST_FILE, SECONDS, check, files_under
from sd35_core.workflow.finding import Finding
from sd35_core.workflow.holdings import FindFile
from sd35_core.workflow.workflow_file import read_workflow

KINDS = (".json", ".png", ".webp")


def looked_at(path: Path, find: FindFile) -> dict[str, list[Finding]]:
    """Sampler -> findings. Raises SettingError, and whatever is a fault."""
    if path.stat().st_size > LARGEST_FILE:
        raise SettingError("It is too large for a workflow.")
    return check(read_workflow(path.read_bytes()), find, SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=Path, help="ComfyUI's models folder")
    parser.add_argument("--list", action="store_true", help="what was said of each file")
    options = parser.parse_args()
    find = files_under(options.models)
    files = sorted(p for p in options.folder.rglob("*") if p.suffix.lower() in KINDS)
    counts, rules, refusals = Counter(), Counter(), Counter()
    for path in files:
        name = path.relative_to(options.folder)
        try:
            found = looked_at(path, find)
        except SettingError as error:
            counts["refused"] += 1
            refusals[str(error)[:80]] += 1
            found = {}
        except Exception:  # which is what this looks for
            counts["with a traceback"] += 1
            print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr)
            continue
        else:
            counts["read"] += 1
        counts["without a sampler that is known"] += not found
        counts["with a sampler and nothing to say"] += bool(found) and not any(found.values())
        for key, said in found.items():
            rules.update(f"{finding.severity}: {finding.rule}" for finding in said)
            if options.list:
                print(f"{name}, sampler {key}: {[str(finding) for finding in said]}")
    print(f"{len(files)} files: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    for title, counted in (("Findings", rules), ("Refused because", refusals)):
        print(f"{title}:", *(f"\n  {n:4} {what}" for what, n in counted.most_common(20)))
    return 1 if counts["with a traceback"] else 0


if __name__ == "__main__":
    sys.exit(main())
