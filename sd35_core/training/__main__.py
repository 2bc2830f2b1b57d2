"""Train a small SD3.5, a ControlNet or a LoRA from pictures with captions.

    python -m sd35_core.training CONFIG.toml
    python -m sd35_core.training lora CONFIG.toml [--keys diffusers|kohya|comfyui]

Rectified flow with logit-normal timesteps (Esser et al. 2024, arXiv:2403.03206). A run can be
stopped at any time (Ctrl-C) and goes on bit for bit where its last checkpoint was written. In the
folder `output` are then state.safetensors, the run itself; model.safetensors, a checkpoint for
SD35Loader; and samples/, pictures on the way. `lora` trains a LoRA of rank 16 where the file names
no other; `--keys` says whose names its file has.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

from ..errors import SD35Error
from .alone import run_alone
from .config import read_config
from .lora import SPELLINGS, checked_spelling
from .watching import log, train


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lora = arguments[:1] == ["lora"]
    name, *rest = arguments[lora:] or [""]
    keys = rest[1:] if lora and rest[:1] == ["--keys"] and len(rest) == 2 else []
    if not name or (rest and not keys):
        log.error(
            "usage: python -m sd35_core.training CONFIG.toml\n"
            f"       python -m sd35_core.training lora CONFIG.toml [--keys {'|'.join(SPELLINGS)}]"
        )
        return 2
    try:
        config = read_config(Path(name), {"lora_rank": 16} if lora else {})
        if keys:
            config = replace(config, lora_keys=checked_spelling(keys[0], "--keys"))
        with run_alone(config) as run:
            train(run)
    except (SD35Error, OSError) as error:
        log.error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
