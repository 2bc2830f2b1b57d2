"""Quantize a model or a ControlNet to 8 or 2 bits a weight.

    python -m sd35_core.quantization FILE.safetensors --bits 2 [--prompts PROMPTS.txt]

writes a file beside it that SD35Loader or SD35ControlNetLoader takes as any other, and says what
it costs: the error of each layer's output and the size before and after. 2 bits need calibration
with prompts to be of use; on the command line that works for models that hold their text encoders
and VAE (the small one); the node SD35Quantize does it for every model.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from ..encoders.text_encoder import tokenizer
from ..errors import SD35Error, SettingError
from ..packing.formats import INT8
from ..pipeline import Pipeline, Settings
from .calibration import Moments, moments_of, recorded
from .plan import EIGHT, Plan
from .quantize import Done, check_name, log, quantize_file


def calibrated(pipeline: Pipeline, prompts: list[str]) -> Iterable[Moments]:
    """The moments of a small model's layers while it draws prompts."""
    with recorded(pipeline.network) as calls:
        pipeline.draw(prompts, list(range(len(prompts))), Settings(steps=12))
    return moments_of(pipeline.network, calls.chosen(), pipeline.device)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the file")
    parser.add_argument("--bits", type=int, choices=(8, 2), default=8)
    parser.add_argument("--eight", choices=list(EIGHT), default=INT8, help="the 8-bit format")
    parser.add_argument(
        "--modulation-bits", type=int, choices=(8, 2), default=8, help="of adaLN, in a 2-bit file"
    )
    parser.add_argument("--prompts", type=Path, help="captions to calibrate with, one a line")
    parser.add_argument("--tokenizer", type=Path, help="CLIP's; ComfyUI's comfy/sd1_tokenizer")
    options = parser.parse_args(arguments)
    try:
        plan = Plan(options.bits, options.eight, options.modulation_bits)
        if options.out is not None:
            check_name(options.out)
        moments = None
        if options.prompts is not None:
            if options.tokenizer is None:
                raise SettingError("--prompts needs --tokenizer, a folder with CLIP's tokenizer.")
            lines = options.prompts.read_text(encoding="utf-8").splitlines()
            pipeline = Pipeline.load(options.file, tokenizer(options.tokenizer))
            moments = calibrated(pipeline, [line for line in lines if line.strip()])
        out, report = quantize_file(options.file, plan, moments, _progress(), options.out)
    except (SD35Error, OSError) as error:
        log.error(str(error))
        return 1
    log.info(f"{report.text()}\nWrote {out}")
    return 0


def _progress() -> Done:
    from tqdm import tqdm

    bar = tqdm(unit="layer")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


if __name__ == "__main__":
    sys.exit(main())
