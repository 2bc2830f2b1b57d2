"""Ours beside ComfyUI's own SD3, diffusers and the machine's limit: python tools/bench.py

Every row is one setting, on identical random weights, in one run: medians of alternating calls
of the network, as ratios to each peer. CPU: real width and fewer blocks; GPU: full size. "peak"
is the machine's own matrix product in the same run. --plot draws how time grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text
from tools import host

TEXT = 154
RUNS = 7


@dataclass(frozen=True)
class Case:
    """A setting: which network, how large a picture, how many at once, what is on.

    `skipped`: layers of SLG. `control`: layers of an 8b ControlNet. `lora`: its rank.
    """

    family: str
    pixels: int
    batch: int = 2
    skipped: tuple[int, ...] = ()
    depth: int = 0
    control: int = 0
    lora: int = 0

    @property
    def name(self) -> str:
        words = [self.family, f"{self.pixels} px", f"batch {self.batch}"]
        words += [f"depth {self.depth}"] if self.depth else []
        words += ["SLG"] if self.skipped else []
        words += ["ControlNet"] if self.control else []
        words += ["LoRA"] if self.lora else []
        return ", ".join(words)


def cases(cuda: bool, quick: bool) -> list[Case]:
    medium, large = (0, 0) if cuda else (4, 2)
    found = [
        Case("Medium", 512, depth=medium),
        Case("Medium", 512, skipped=(7, 8, 9) if cuda else (2,), depth=medium),
        Case("Medium", 512, lora=16, depth=medium),
        Case("Large", 512, control=19 if cuda else 1, depth=large),
    ]
    if quick:
        return found
    found += [Case("Medium", pixels, depth=medium) for pixels in (1024, 1440)]
    return found + [Case("Large", pixels, depth=large) for pixels in (512, 1024)]


def growth() -> dict[str, list[Case]]:
    """What the plot shows: time over pixels, batch and depth."""
    return {
        "pixels": [Case("Medium", p, depth=2) for p in (256, 512, 768, 1024)],
        "batch": [Case("Medium", 512, batch=b, depth=2) for b in (1, 2, 4)],
        "depth": [Case("Medium", 512, depth=d) for d in (1, 2, 4)],
    }


def config_of(case: Case) -> Any:
    from dataclasses import replace

    from sd35_core.network.config import VARIANTS

    full = VARIANTS["sd3.5_medium" if case.family == "Medium" else "sd3.5_large"]
    if not case.depth:
        return full
    dual = tuple(range(round(case.depth * len(full.dual_blocks) / full.depth)))
    return replace(full, depth=case.depth, hidden=full.hidden, dual_blocks=dual)


def weights_of(network: Any, dtype: Any) -> dict[str, Any]:
    """Random weights, small enough for 16 bits, for a network made on "meta"."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.empty(t.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        for key, t in network.state_dict().items()
    }


def inputs_of(case: Case, config: Any, dtype: Any, device: Any) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    side = case.pixels // 8
    shapes = ((config.in_channels, side, side), (TEXT, config.context_dim), (config.pooled_dim,))
    x, context, y = (torch.randn(case.batch, *s, generator=generator) for s in shapes)
    timestep = torch.full((case.batch,), 700.0, device=device)
    x, context, y = (t.to(device, dtype) for t in (x, context, y))
    return [x, timestep, context, y]


def wait(device: Any) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: Any) -> float:
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def peak_product(dtype: Any, device: Any) -> Callable[[], float]:
    """Operations a second of a large matrix product, the best of a few."""
    import torch

    side = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    return lambda: 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(3))


def extra_memory(call: Callable[[], Any], device: Any) -> int | None:
    """Bytes that a call takes at its peak beyond what was held before; None if unknown."""
    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    from tools.full_size import peak_gib

    reset.write_text("5", encoding="ascii")
    before = peak_gib()
    call()
    return int((peak_gib() - before) * 2**30)


def measure(case: Case, dtype: Any, device: Any, runs: int) -> dict[str, Any]:
    """One row of the table."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
    from sd35_core.network.mmditx import MMDiTX
    from tools.bench_peers import networks, with_controlnet, with_lora, with_skipped

    config = config_of(case)
    calls = networks(config, weights_of(MMDiTX(config, device="meta"), dtype), device)
    if case.lora:
        calls = with_lora(calls, case.lora, device)
    if case.control:
        shape = ControlNetConfig("8b", case.control, config.hidden, config.pooled_dim)
        weights = weights_of(ControlNetEmbedder(shape, device="meta"), dtype)
        calls = with_controlnet(calls, shape, weights, config.depth, device)
    if case.skipped:
        calls = with_skipped(calls, list(case.skipped))
    inputs = inputs_of(case, config, dtype, device)
    product = peak_product(dtype, device)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    peaks = []
    with torch.inference_mode():
        counter = FlopCounterMode(display=False)
        with counter:
            expected = calls["ours"](*inputs).float()
        memory = {name: extra_memory(lambda c=c: c(*inputs), device) for name, c in calls.items()}
        apart = {
            name: float((call(*inputs).float() - expected).abs().max() / expected.abs().max())
            for name, call in calls.items()
        }
        for _ in range(runs):
            peaks.append(product())
            for name, call in calls.items():
                taken[name].append(seconds(lambda c=call: c(*inputs), device))
    median = {name: statistics.median(times) for name, times in taken.items()}
    tokens = case.batch * ((case.pixels // 16) ** 2 + TEXT)
    own = median["ours"]
    return {
        "case": case.name,
        "seconds": median,
        "ratio": {name: own / other for name, other in median.items() if name != "ours"},
        "tokens_per_second": tokens / own,
        "tera_operations": counter.get_total_flops() / 1e12,
        "share_of_peak": counter.get_total_flops() / own / statistics.median(peaks),
        "extra_MB": {k: None if m is None else m / 1e6 for k, m in memory.items()},
        "largest_difference": apart,
    }


def memory(case: Case, dtype: Any, device: Any, steps: int = 28) -> dict[str, Any]:
    """What sampling holds with the modulation cache on and off, in MB: weights as the host's
    memory manager loads them and a step reads them, the modulations of a run, and what a step
    takes besides."""
    import torch

    from sd35_core.checkpoint.tensor_file import write_file
    from sd35_core.network.mmditx import MMDiTX
    from sd35_core.network.modulation_cache import ModulationCache
    from tools.bench_peers import host_model

    config = config_of(case)
    found: dict[str, Any] = {"case": case.name, "steps": steps}
    extra: int | None = None
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder, "model.safetensors")
        weights = weights_of(MMDiTX(config, device="meta"), dtype)
        write_file(path, gridded(config, weights), {})
        del weights
        for mode in ("off", "on"):
            patcher = host_model(path, mode)
            patcher.load(patcher.load_device, full_load=True)
            inference = patcher.model.get_dtype_inference()
            x, timestep, context, y = inputs_of(case, config, inference, device)
            network, known, kept = patcher.model.diffusion_model, None, 0
            if mode == "on":
                cache = ModulationCache()
                ahead = torch.linspace(1000, 10, steps, device=device)
                known = cache.look_up(network, ahead[:1].expand(len(y)), y, ahead)
                assert cache.kept is not None
                parts = [cache.kept.c, cache.kept.final, *sum(cache.kept.blocks, ())]
                kept = sum(t.numel() * t.element_size() for t in parts)
            options = {"sd35_modulations": known}
            step = partial(network, x, timestep, context, y, transformer_options=options)
            if mode == "off":  # with the cache it takes no more; freed memory hides what it takes
                extra = extra_memory(step, device)
            weights = patcher.loaded_size()
            found[mode] = {
                "weights_MB": weights / 1e6,
                "modulations_MB": kept / 1e6,
                "step_MB": (extra or 0) / 1e6,
                "peak_MB": (weights + kept + (extra or 0)) / 1e6,
            }
            patcher.detach()
            del patcher, network
    found["ratio"] = found["on"]["peak_MB"] / found["off"]["peak_MB"]
    return found


def gridded(config: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """With the position table that real models have."""
    import torch

    from sd35_core.network.layers import grid_positions

    places = torch.arange(config.pos_embed_max_size)
    table = grid_positions(places, places, config.hidden).to(weights["pos_embed"].dtype)
    return {**weights, "pos_embed": table}


def line(row: dict[str, Any]) -> str:
    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
    memory = row["extra_MB"]["ours"]
    held = "" if memory is None else f", {memory:.0f} MB"
    return (
        f"{row['case']:46} {row['seconds']['ours']:7.3f} s, {row['tokens_per_second']:6.0f} "
        f"tokens/s, {row['share_of_peak']:4.0%} of peak{held}; of the time of: {ratios}"
    )


def main() -> int:
    found = host.find_comfyui()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    import torch

    from tools.inprocess import import_pack

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the first rows alone")
    parser.add_argument("--memory", action="store_true", help="the modulation cache on and off")
    parser.add_argument("--plot", type=Path, help="draw growth into this SVG instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    rows: dict[str, list[dict[str, Any]]] = {}
    chosen = growth() if options.plot else {"": cases(options.device == "cuda", options.quick)}
    with tempfile.TemporaryDirectory(prefix="sd35-bench-") as base:
        import_pack(found, Path(base), cpu=options.device == "cpu")
        if options.memory:
            for case in (Case("Medium", 512, depth=12), Case("Large", 512, depth=5)):
                print(json.dumps(memory(case, dtype, options.device), indent=1), flush=True)
            return 0
        for name, wanted in chosen.items():
            for case in wanted:
                row = measure(case, dtype, options.device, options.runs)
                rows.setdefault(name, []).append(row)
                print(line(row), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.plot:
        from tools.bench_plot import drawing

        panels = {
            name: ([float(getattr(case, name)) for case in wanted], rows[name])
            for name, wanted in chosen.items()
        }
        write_text(options.plot, drawing(panels), replace=True)
    if options.json:
        machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        about = {"device": machine, "dtype": options.dtype, "torch": torch.__version__}
        print(json.dumps({**about, "comfyui": found.version, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
