"""How well the small model draws what a caption says: python tools/score.py [--sheet OUT.png]

Draws one picture per caption with fixed seeds, 0, 1, 2 ..., and prints how many show what was
asked. Captions come from a file, one a line, or are scenes that training never showed. Nothing
judges but a comparison with renderings of every possible scene (tools/nano/judge.py). Needs no
server; `--help` lists the settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import host


def main() -> int:
    if not host.started_again():
        return host.start_again(host.find_comfyui().python, __file__)
    from tools.nano.scoring import main as score

    return score()


if __name__ == "__main__":
    sys.exit(main())
