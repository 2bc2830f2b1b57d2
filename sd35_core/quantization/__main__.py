"""Quantize a model or a ControlNet to 8, 4, 3 or 2 bits a weight, or to fit a size.

    python -m sd35_core.quantization FILE.safetensors --bits 4 [--prompts PROMPTS.txt]
    python -m sd35_core.quantization FILE.safetensors --fit 1.5 --prompts PROMPTS.txt

writes a file beside it that SD35Loader or SD35ControlNetLoader takes as any other, and says what
it costs: the error of each layer's output and the size before and after. Fewer than 8 bits are far
better when calibrated with prompts; on the command line that works for models that hold their text
encoders and VAE (the small one); the node SD35Quantize does it for every model.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ..checkpoint.tensor_file import TensorFile
from ..encoders.text_encoder import tokenizer
from ..errors import SD35Error, SettingError
from ..packing.formats import INT8, VQ4
from ..pipeline import Pipeline, Settings
from .calibration import Call, moments_of, recorded
from .fit import check_size, fitted_plan, halves
from .influence import influence
from .plan import EIGHT, FEWER, FOUR, Plan, fitted_in
from .quantize import Done, check_name, log, network_of, quantize_file

BITS = (8, *FEWER)


def drawn(pipeline: Pipeline, prompts: list[str]) -> list[Call]:
    """Calls of a small model's network while it draws prompts."""
    with recorded(pipeline.network) as calls:
        pipeline.draw(prompts, list(range(len(prompts))), Settings(steps=12))
    return calls.chosen()


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        plan = Plan(options.bits, options.eight, options.modulation_bits, options.four)
        if options.out is not None:
            check_name(options.out)
        moments = None
        if options.prompts is not None:
            if options.tokenizer is None:
                raise SettingError("--prompts needs --tokenizer, a folder with CLIP's tokenizer.")
            tensors, size = {}, round((options.fit or 0) * 1e9)
            if options.fit is not None:
                tensors, _ = network_of(TensorFile(options.file), f"'{options.file.name}'")
                check_size(tensors, size)
            lines = options.prompts.read_text(encoding="utf-8").splitlines()
            pipeline = Pipeline.load(options.file, tokenizer(options.tokenizer))
            calls = drawn(pipeline, [line for line in lines if line.strip()])
            seen = pipeline.network, calls, pipeline.device
            moments = moments_of(*seen)
            if options.fit is not None:
                plan = fitted_plan(tensors, size, influence(*seen), halves(*seen), _progress())
                log.info(plan.text())
        elif options.fit is not None:
            raise SettingError("--fit needs --prompts: it measures which layers need their bits.")
        if options.plan is not None:
            plan = fitted_in(options.plan)
        out, report = quantize_file(options.file, plan, moments, _progress(), options.out)
    except (SD35Error, OSError) as error:
        log.error(str(error))
        return 1
    log.info(f"{report.text()}\nWrote {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the file")
    parser.add_argument("--bits", type=int, choices=BITS, default=8)
    parser.add_argument("--eight", choices=list(EIGHT), default=INT8, help="the 8-bit format")
    parser.add_argument("--four", choices=list(FOUR), default=VQ4, help="the 4-bit format")
    parser.add_argument(
        "--modulation-bits", type=int, choices=BITS, default=8, help="of adaLN, at least"
    )
    parser.add_argument(
        "--fit", type=float, metavar="GB", help="choose each layer's bits for the model's size"
    )
    parser.add_argument("--plan", type=Path, help="a file written by --fit, to do the same again")
    parser.add_argument("--prompts", type=Path, help="captions to calibrate with, one a line")
    parser.add_argument("--tokenizer", type=Path, help="CLIP's; ComfyUI's comfy/sd1_tokenizer")
    return parser


def _progress() -> Done:
    from tqdm import tqdm

    bar = tqdm(unit="layer")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


if __name__ == "__main__":
    sys.exit(main())
