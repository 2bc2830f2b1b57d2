"""Compare sd35_core with recorded numbers of the reference: python tools/parity.py FOLDER.

A case file holds inputs, expected outputs and, in its metadata under `case`, a JSON record with
the configuration and a manifest {state-dict key: shape}. Weights are not stored: they are made
again from NumPy's frozen RandomState. The difference printed is the largest absolute one over
the output's largest absolute value, in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sd35_core.checkpoint.controlnet import controlnet_config
from sd35_core.checkpoint.loading import checked_config
from sd35_core.errors import SD35Error
from sd35_core.network.controlnet import ControlNetEmbedder
from sd35_core.network.latent import from_model, to_model
from sd35_core.network.mmditx import MMDiTX, Twin
from sd35_core.sampling.guidance import SkipLayers, away_from_skipped, guided, step_of
from sd35_core.sampling.samplers import SAMPLERS
from sd35_core.sampling.schedules import make_sigmas

Record = dict[str, Any]
Tensors = dict[str, Tensor]
Difference = tuple[str, float]

TOLERANCES = {"mmditx": 1e-5, "controlnet": 1e-5, "schedule": 1e-5, "trajectory": 1e-4}


def weight(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor of a case's model: a normal draw seeded by its key, scaled by its kind."""
    state = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF)
    values = state.standard_normal(size=shape).astype(np.float32)
    if key.endswith(("ln_q.weight", "ln_k.weight")):
        values = 1 + 0.2 * values
    elif key.endswith("bias"):
        values = 0.1 * values
    elif key == "pos_embed":
        values = 0.5 * values
    elif len(shape) >= 2:
        values = values / math.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def state_dict(record: Record, model: str = "") -> Tensors:
    """The weights of a case's base model, or of its "controlnet_"."""
    seed = record[f"{model}seed"]
    return {k: weight(seed, k, tuple(s)) for k, s in record[f"{model}manifest"].items()}


def read(path: Path) -> tuple[Record, Tensors]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["case"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def model_of(record: Record) -> MMDiTX:
    weights = state_dict(record)
    model = MMDiTX(checked_config(weights))
    model.load_state_dict(weights)
    return model.eval()


def relative(seen: Tensor, expected: Tensor) -> float:
    if seen.shape != expected.shape:
        return math.inf
    difference = (seen - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float(difference) if torch.isfinite(difference) else math.inf


def check_mmditx(record: Record, tensors: Tensors) -> Iterator[Difference]:
    model = model_of(record)
    inputs = [tensors[f"in.{name}"] for name in ("x", "timestep", "context", "y")]
    skipped = frozenset(record["skip_layers"])
    every = [Twin(row, skipped) for row in range(len(inputs[0]))]
    yield "plain", relative(model(*inputs), tensors["out.plain"])
    yield "skip", relative(model(*inputs, twins=every), tensors["out.skip"])


def check_controlnet(record: Record, tensors: Tensors) -> Iterator[Difference]:
    base, weights = model_of(record), state_dict(record, "controlnet_")
    control = ControlNetEmbedder(controlnet_config(weights))
    control.load_state_dict(weights)
    x, sigma, y = (tensors[f"in.{name}"] for name in ("x", "sigma", "y"))
    residuals = control(base, x, 1000 * sigma, y, tensors["in.hint_latent"])
    for i, residual in enumerate(residuals):
        yield f"residual.{i}", relative(residual, tensors[f"out.residual.{i}"])
    spread = [residuals[i] for i in control.config.spread(base.config.depth)]
    velocity = base(x, 1000 * sigma, tensors["in.context"], y, residuals=spread)
    denoised = x - sigma[:, None, None, None] * velocity
    yield "denoised", relative(denoised, tensors["out.denoised"])


def check_trajectory(record: Record, tensors: Tensors) -> Iterator[Difference]:
    model = model_of(record)
    slg = record["slg"]
    skip = SkipLayers(frozenset(slg["layers"]), slg["scale"], slg["start"], slg["end"])
    context = torch.cat([tensors[f"in.{side}.context"] for side in ("neg", "pos", "pos")])
    y = torch.cat([tensors[f"in.{side}.y"] for side in ("neg", "pos", "pos")])
    schedule = tensors["in.sigmas"]

    def denoise(x: Tensor, sigma: Tensor, cfg: float, slg: SkipLayers | None) -> Tensor:
        step = step_of(sigma[0], schedule)
        active = slg is not None and slg.active(step, record["steps"])
        count = 3 if active else 2
        twins = [Twin(2, slg.layers, source=1)] if slg is not None and active else []
        velocity = model(
            x.expand(count, -1, -1, -1),
            (1000 * sigma).expand(count),
            context[:count],
            y[:count],
            twins=twins,
        )
        rows = x - sigma * velocity
        denoised = guided(rows[:1], rows[1:2], cfg)
        if slg is None or not active:
            return denoised
        return away_from_skipped(denoised, rows[1:2], rows[2:], slg.scale)

    settings = {"cfg": (record["cfg"], None), "slg": (record["slg_cfg"], skip)}
    for name, sampler in SAMPLERS.items():
        for kind, (cfg, slg) in settings.items():
            expected = tensors.get(f"out.{name}.{kind}")
            if expected is not None:
                extra = {"cfg": cfg, "slg": slg}
                noise = tensors["in.noise"] * schedule[0]
                latent = sampler(denoise, noise, schedule, extra_args=extra)
                yield f"{name}.{kind}", relative(latent, expected)


def check_schedule(record: Record, tensors: Tensors) -> Iterator[Difference]:
    for key, expected in tensors.items():
        if key.startswith("out.sigmas."):
            shift, steps = key.removeprefix("out.sigmas.shift").split(".steps")
            yield key[4:], relative(make_sigmas(int(steps), float(shift)), expected)
    latent = tensors["in.latent"]
    yield "process_in", relative(to_model(latent), tensors["out.process_in"])
    yield "process_out", relative(from_model(latent), tensors["out.process_out"])


CHECKS = {
    "mmditx": check_mmditx,
    "controlnet": check_controlnet,
    "trajectory": check_trajectory,
    "schedule": check_schedule,
}


def run(folder: Path, kind: str | None) -> tuple[int, int]:
    """Check every case file of a folder, print a line each; (passed, failed)."""
    passed = failed = 0
    for path in sorted(folder.glob("*.safetensors")):
        record, tensors = read(path)
        if kind not in (None, record["kind"]):
            continue
        tolerance = TOLERANCES[record["kind"]]
        try:
            with torch.no_grad():
                name, worst = max(CHECKS[record["kind"]](record, tensors), key=lambda d: d[1])
        except (SD35Error, KeyError, RuntimeError) as error:
            name, worst = f"{type(error).__name__}: {error}", math.inf
        good = worst <= tolerance
        passed, failed = passed + good, failed + (not good)
        verdict = "ok  " if good else "FAIL"
        print(f"{verdict}  {path.name}: {worst:.1e} at most (of {tolerance:.0e}), in {name}")
    return passed, failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare sd35_core with the reference's numbers.")
    parser.add_argument("folder", type=Path, help="folder of .safetensors case files")
    parser.add_argument("--kind", choices=CHECKS, help="only the cases of this kind")
    arguments = parser.parse_args()
    passed, failed = run(arguments.folder, arguments.kind)
    print(f"{passed} passed, {failed} failed")
    if passed + failed == 0:
        print(f"No case file was found in {arguments.folder}.", file=sys.stderr)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
