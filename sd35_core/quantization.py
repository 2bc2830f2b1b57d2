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
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .calibration import Moments, moments_of, recorded
from .checkpoint import (
    MARK,
    OTHER_MODELS,
    PREFIXES,
    Part,
    StateDict,
    TensorFile,
    checked_config,
    diffusion_model,
    is_controlnet,
    metadata_of,
    shapes_of,
    with_axes,
    write_file,
)
from .config import Shape
from .controlnet import config_of, controlnet
from .errors import SD35Error, SettingError
from .packing import FP8, INT8, RAW_FP8, VERSION, VQ2, is_packed, pack, unpack
from .pipeline import Pipeline, Settings
from .text_encoder import tokenizer
from .whole_file import free_name

log = logging.getLogger("sd35")

PRECISE = {
    r"x_embedder\.": "the only way in for the picture; 0.1 % of the weights",
    r"pos_embed": "places of patches: a table, not a product, and a ControlNet's way in",
    r"t_embedder\.": "noise level; every block depends on it",
    r"y_embedder\.": "pooled text; every block depends on it",
    r"context_embedder\.": "the only way in for the prompt",
    r"final_layer\.": "the only way out",
}
"""Layers that are never packed, by their names, and why."""
MODULATION = r"adaLN_modulation\."
EIGHT_AT_LEAST = {
    MODULATION: "scales, shifts and gates act on every token",
    r"controlnet_blocks\.": "a ControlNet's last product; at 2 bits a third of it is error",
}
"""Layers that a 2-bit file keeps at 8 bits, and why."""


EIGHT = {INT8: "int8", FP8: "fp8", RAW_FP8: "rawfp8"}
"""The 8-bit formats, and what a file in each is called."""
WRITTEN = "sd35_quantization"
"""The key of the metadata of files that this writes."""


@dataclass(frozen=True)
class Plan:
    """What the layers of a file become; `eight` is the format of those with 8 bits."""

    bits: int = 8
    eight: str = INT8
    modulation_bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (2, 8) or self.modulation_bits not in (2, 8):
            raise SettingError(
                f"bits is {self.bits} and modulation bits is {self.modulation_bits}; "
                "each can be 8 or 2."
            )
        if self.eight not in EIGHT:
            raise SettingError(f"The 8-bit format is '{self.eight}'; known are {', '.join(EIGHT)}.")

    def format_of(self, name: str, shape: Shape) -> str | None:
        """A format for the tensor `name` (a key of Stability's), or None: it stays as it is."""
        if len(shape) != 2 or not name.endswith(".weight"):
            return None
        if any(re.match(pattern, name) for pattern in PRECISE):
            return None
        careful = [pattern for pattern in EIGHT_AT_LEAST if re.search(pattern, name)]
        if self.modulation_bits == 2 and MODULATION in careful:
            careful.remove(MODULATION)
        return self.eight if self.bits == 8 or careful else VQ2


@dataclass(frozen=True)
class Layer:
    """What became of a layer. error: relative root mean square of its output on the calibration's
    inputs; without calibration of its weight."""

    name: str
    form: str
    error: float
    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """What became of a file, in bytes."""

    plan: Plan
    calibrated: bool
    layers: list[Layer]
    before: int
    after: int
    note: str = ""
    """Why the file has another name than it would have."""

    def text(self, most: int = 5) -> str:
        """For people: the whole, each kind of layer, and the layers with the largest errors."""
        how = "calibrated" if self.calibrated else "without calibration"
        lines = [
            f"{self.plan.bits} bits ({how}): {self.before / 1e6:,.1f} MB -> "
            f"{self.after / 1e6:,.1f} MB, {self.after / self.before:.1%}."
        ]
        kinds: dict[tuple[str, str], list[float]] = {}
        for layer in self.layers:
            kind = re.sub(r"^.*?\.\d+\.", "", layer.name).removesuffix(".weight")
            kinds.setdefault((kind, layer.form), []).append(layer.error)
        what = "output" if self.calibrated else "weights"
        lines += [
            f"{kind} ({form}): error of the {what} {sum(e) / len(e):.4f}, largest {max(e):.4f}"
            for (kind, form), e in kinds.items()
        ]
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:most]
        lines.append(
            "Largest: " + ", ".join(f"{layer.name} {layer.error:.4f}" for layer in worst) + "."
        )
        lines += [self.note] if self.note else []
        return "\n".join(lines)


Done = Callable[[int, int], object]


def quantized(
    tensors: Mapping[str, Tensor],
    plan: Plan,
    moments: Iterable[Moments] | None = None,
    on_layer: Done = lambda done, total: None,
) -> tuple[StateDict, Report]:
    """Pack the tensors of a model or a ControlNet (Stability's keys, no prefix).

    moments: the layers' second moments, block by block, as `moments_of` gives them. `on_layer`
    hears how many layers are done, and may raise to stop. Raises SettingError for a model that is
    packed already or does not fit.
    """
    if is_packed(tensors):
        raise _quantized_already()
    forms = {k: f for k, s in shapes_of(tensors).items() if (f := plan.format_of(k, s)) is not None}
    found: StateDict = {}
    layers: list[Layer] = []

    def take(key: str, second: Tensor | None) -> None:
        weight = tensors[key] if second is None else tensors[key].to(second.device)
        if weight.dtype.itemsize == 1:
            raise _quantized_already()
        packed = pack(weight, forms[key], second)
        prefix = key.removesuffix("weight")
        found.update({prefix + name: tensor.cpu() for name, tensor in packed.items()})
        error = relative_error(weight, unpack(packed, forms[key], torch.float32), second)
        layers.append(Layer(key, forms[key], error, _bytes([weight]), _bytes(packed.values())))
        on_layer(len(layers), len(forms))

    for block in moments or ():
        for key, second in block.items():
            if key in forms:
                take(key, second)
    taken = {layer.name for layer in layers}
    for key in forms:
        if key not in taken:
            take(key, None)
    rest = {key: tensors[key] for key in tensors if key not in forms}
    found |= with_axes(rest) if plan.bits == 2 else rest
    before = _bytes(rest.values()) + sum(layer.before for layer in layers)
    report = Report(plan, moments is not None, layers, before, _bytes(found.values()))
    return found, report


def _quantized_already() -> SettingError:
    return SettingError(
        "This model is quantized already; quantizing it again would add up the errors. Start from "
        "the original file."
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def relative_error(weight: Tensor, other: Tensor, moments: Tensor | None = None) -> float:
    """Root mean square of (other - weight) x over that of weight x; without moments of x, of
    independent inputs."""
    weight = weight.float()
    difference = other.to(weight) - weight
    if moments is None:
        return float(difference.norm() / weight.norm().clamp(min=1e-30))
    moments = moments.to(weight)
    lost, whole = ((w @ moments * w).sum() for w in (difference, weight))
    return float((lost / whole.clamp(min=1e-30)).clamp(min=0).sqrt())


def output_path(path: Path, plan: Plan, calibrated: bool) -> Path:
    """Beside the original, with what it is in its name."""
    if plan.bits == 8:
        words = EIGHT[plan.eight]
    else:
        words = f"2bit_adaln{plan.modulation_bits}" + ("" if calibrated else "_datafree")
    return path.with_name(f"{path.stem}_{words}.safetensors")


def is_another(path: Path) -> bool:
    """Whether something is there that this did not write, so that it may not be replaced."""
    return os.path.lexists(path) and WRITTEN not in metadata_of(path)


def check_name(out: Path) -> None:
    """Raise SettingError where a file may not have the name that was asked for."""
    if is_another(out):
        raise SettingError(
            f"'{out}' is there already and was not written by SD3.5 Quantize. Choose another name, "
            "or move that file away."
        )


def quantize_file(
    path: Path,
    plan: Plan,
    moments: Iterable[Moments] | None = None,
    on_layer: Done = lambda done, total: None,
    out: Path | None = None,
) -> tuple[Path, Report]:
    """Quantize the diffusion model or the ControlNet in a file and write it, as one whole.

    What else the file holds (text encoders, VAE) is written as it is. A file of that name is
    replaced if this wrote it; otherwise the new one has a number, or is refused where `out` says
    its name. Raises CheckpointError or SettingError; the original and an older file of the same
    name are then as they were.
    """
    if out is not None:
        check_name(out)
    wanted = out or output_path(path, plan, moments is not None)
    out = free_name(wanted, is_another)
    free = not os.path.lexists(out)
    file, source = TensorFile(path), f"'{path.name}'"
    prefix = next((p for p in PREFIXES if p + MARK in file), "")
    if is_controlnet(file):
        tensors = controlnet(file, source)
        config_of(tensors, source)
    else:
        tensors = Part(file, prefix) if prefix + MARK in file else diffusion_model(file, source)
        checked_config(tensors, source)
    packed, report = quantized(tensors, plan, moments, on_layer)
    others = [k for k in file if k.startswith(OTHER_MODELS) or not k.startswith(prefix)]
    whole = {prefix + key: tensor for key, tensor in packed.items()}
    whole |= {key: file[key] for key in others}
    about = {**asdict(plan), "calibrated": report.calibrated, "version": VERSION}
    write_file(out, whole, {**file.metadata, WRITTEN: about}, replace=not free)
    if out != wanted:
        note = f"'{wanted.name}' is there already and was not written by SD3.5 Quantize; wrote"
        report = replace(report, note=f"{note} '{out.name}'.")
    return out, report


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
