"""What quantization costs: python -m tools.nano.quantization_study

For each format the error of every layer's output on what the layer really sees, beside Q8_0 and
Q2_K of llama.cpp; the cosine of the whole model's output; the picture score on the same 500 unseen
scenes; and what is left of the ControlNets' grip. Writes models/nano/quantization.json and a sheet
of the same pictures in each format. Takes about twenty minutes on two cores.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd35_core.checkpoint.controlnet import load_controlnet
from sd35_core.checkpoint.layouts import diffusion_model
from sd35_core.checkpoint.loading import load
from sd35_core.checkpoint.tensor_file import TensorFile
from sd35_core.network.controlnet import CONTROL_TYPES
from sd35_core.network.latent import to_model
from sd35_core.packing.formats import FP8, INT8, VQ2, pack, unpack
from sd35_core.pipeline import Pipeline
from sd35_core.quantization.calibration import Moments, moments_of, moments_of_controlnet, recorded
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import output_path, quantize_file, relative_error
from sd35_core.training.dataset import encoded_hint
from sd35_core.whole_file import write_picture, write_text

from .blocks import Q2_K_BITS, Q8_0_BITS, q2_k, q8_0
from .control_study import FOLDER, QUICK, Scenes, figures
from .prepare import clip_tokenizer
from .scenes import draw_scene
from .scoring import MODEL, MODEL_FILE, draw, figures_of, judge_all, sheet_of, unseen

FILE = MODEL / "quantization.json"
COUNT = 500
CALIBRATION_SEED = 3_000_000

FORMATS: dict[str, tuple[Plan, bool] | None] = {
    "16 bit": None,
    "int8": (Plan(8, INT8), False),
    "fp8": (Plan(8, FP8), False),
    "2 bit, data-free": (Plan(2), False),
    "2 bit": (Plan(2), True),
    "2 bit, adaLN at 2": (Plan(2, modulation_bits=2), True),
}


def calibration(pipeline: Pipeline) -> list[Any]:
    """Calls of the model on captions of training's kind."""
    captions = [draw_scene(CALIBRATION_SEED + i).caption for i in range(64)]
    with recorded(pipeline.network) as calls:
        pipeline.draw(captions, list(range(64)), replace(QUICK, steps=12))
    return calls.chosen()


def control_moments(pipeline: Pipeline, kind: str) -> Iterable[Moments]:
    """The same for a ControlNet."""
    scenes = Scenes(64, CALIBRATION_SEED)
    control = load_controlnet(FOLDER / f"sd35_nano_{kind}.safetensors", dtype=torch.float32)
    steered = replace(pipeline, control=control)
    hints = to_model(encoded_hint(pipeline.autoencoder, scenes.seen(kind)).float())
    with recorded(control) as calls:
        steered.draw(scenes.captions, list(range(64)), replace(QUICK, steps=12), hints=hints)
    chosen = calls.chosen()
    return moments_of_controlnet(control, pipeline.network, chosen, pipeline.device)


def layer_errors(pipeline: Pipeline, calls: list[Any]) -> dict[str, dict[str, float]]:
    """Mean over the layers of the error of their outputs, and bits a weight."""
    tensors = diffusion_model(TensorFile(MODEL_FILE))
    errors: dict[str, list[float]] = {}
    bits: dict[str, list[float]] = {"Q8_0": [Q8_0_BITS], "Q2_K": [Q2_K_BITS]}

    def packed(form: str, calibrated: bool) -> Callable[[Tensor, Tensor], Tensor]:
        def make(weight: Tensor, moments: Tensor) -> Tensor:
            found = pack(weight, form, moments if calibrated else None)
            stored = sum(t.numel() * t.element_size() for t in found.values())
            bits.setdefault(f"{form}{', calibrated' * calibrated}", []).append(
                8 * stored / weight.numel()
            )
            return unpack(found, form, torch.float32)

        return make

    makers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        INT8: packed(INT8, False),
        FP8: packed(FP8, False),
        "Q8_0": lambda weight, _: q8_0(weight),
        "Q2_K": lambda weight, _: q2_k(weight),
        VQ2: packed(VQ2, False),
        f"{VQ2}, calibrated": packed(VQ2, True),
    }
    for block in moments_of(pipeline.network, calls, pipeline.device):
        for key, moments in block.items():
            weight = tensors[key].float()
            for name, make in makers.items():
                error = relative_error(weight, make(weight, moments), moments)
                errors.setdefault(name, []).append(error)
    return {
        name: {
            "bits": sum(bits[name]) / len(bits[name]),
            "error": sum(found) / len(found),
            "largest": max(found),
        }
        for name, found in errors.items()
    }


@torch.no_grad()
def cosine(file: Path, calls: list[Any]) -> float:
    """Of the whole model's output against the 16-bit model's, over the calibration's calls."""
    full, other = (load(path, dtype=torch.float32) for path in (MODEL_FILE, file))
    products = torch.zeros(3, dtype=torch.float64)
    for x, timestep, context, y, _ in calls:
        a, b = (model(x, timestep, context, y).double().flatten() for model in (full, other))
        products += torch.stack([a @ b, a @ a, b @ b])
    return float(products[0] / (products[1] * products[2]).sqrt())


def main() -> None:
    pipeline = Pipeline.load(MODEL_FILE, clip_tokenizer())
    calls = calibration(pipeline)
    found: dict[str, Any] = {
        "sha256": hashlib.sha256(MODEL_FILE.read_bytes()).hexdigest(),
        "layers": layer_errors(pipeline, calls),
        "formats": {},
    }
    scenes, steered = unseen(COUNT), Scenes(100)
    rows: list[Image.Image] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, how in tqdm(FORMATS.items()):
            file = MODEL_FILE
            if how is not None:
                moments = moments_of(pipeline.network, calls, pipeline.device) if how[1] else None
                file, _ = quantize_file(MODEL_FILE, how[0], moments, out=Path(folder, "m"))
            network = load(file, dtype=torch.float32)
            pictures = draw(replace(pipeline, network=network), scenes, QUICK)
            rows += pictures[:10]
            control = {}
            for kind in CONTROL_TYPES:
                path = FOLDER / f"sd35_nano_{kind}.safetensors"
                if how is not None:
                    moments = control_moments(pipeline, kind) if how[1] else None
                    path, _ = quantize_file(path, how[0], moments, out=Path(folder, kind))
                drawn = steered.draw(pipeline, kind, path, QUICK)
                control[kind] = figures(drawn, steered.shown)["edge F1"]
            named = MODEL_FILE if how is None else output_path(MODEL_FILE, *how)
            found["formats"][name] = {
                "file": named.name,
                "bytes": file.stat().st_size,
                "cosine": cosine(file, calls),
                "score": figures_of(scenes, judge_all(pictures, scenes)),
                "edge F1": control,
            }
            write_text(FILE, json.dumps(found, indent=1) + "\n", replace=True)
    write_picture(MODEL / "quantization.jpg", sheet_of(rows), replace=True, quality=88)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
