"""Run a program that ends when the one who started it is gone, however that ended.

    python bound.py PROGRAM.py [ARGUMENT ...]

Whoever starts it holds its standard input open.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def end_with_starter() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_starter, daemon=True).start()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
