"""Train a small SD3.5 from pictures with captions.

    python -m sd35_core.training CONFIG.toml

Rectified flow with logit-normal timesteps (Esser et al. 2024, arXiv:2403.03206). A run can be
stopped at any time (Ctrl-C) and goes on bit for bit where its last checkpoint was written. In the
folder `output` are then state.safetensors, the run itself; model.safetensors, a checkpoint for
SD35Loader; and samples/, pictures on the way.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ..errors import SD35Error
from .config import read_config
from .run import Run, log


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(arguments) != 1:
        log.error("usage: python -m sd35_core.training CONFIG.toml")
        return 2
    try:
        run = Run(read_config(Path(arguments[0])))
        run.resume()
        run.go_on()
    except (SD35Error, OSError) as error:
        log.error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
