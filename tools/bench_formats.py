"""How fast packed weights are: python tools/bench_formats.py [--json] [--device cuda]

One block of SD3.5 Medium at full width (dual attention, batch 2, 1024 image and 154 text tokens)
with each format, as a ratio to the same block in bf16 in the same run: medians of alternating
runs. `native` is the processor's own int8 product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import host
from tools.bench import seconds

HIDDEN, TOKENS, TEXT = 1536, 1024, 154


def blocks(device: Any) -> dict[str, Any]:
    """The block by format, with the same random weights."""
    import torch

    from sd35_core.network.layers import JointBlock
    from sd35_core.packing.formats import FP8, INT8, VQ2, VQ3, VQ4, pack
    from sd35_core.packing.kitchen import LAYOUTS
    from sd35_core.packing.layers import NativeOperations, PackedOperations

    generator = torch.Generator().manual_seed(0)
    described = (HIDDEN, True)
    with torch.device("meta"):
        keys = JointBlock(*described, torch.nn, dual=True, last=False).state_dict()
    weights = {
        key: 0.02 * torch.randn(t.shape, generator=generator).bfloat16() for key, t in keys.items()
    }
    formats = {
        "bf16": None, "int8": INT8, "int8 native": INT8, "fp8": FP8,
        "4 bit": VQ4, "3 bit": VQ3, "2 bit": VQ2, **{form: form for form in LAYOUTS},
    }  # fmt: skip
    found = {}
    for name, form in formats.items():
        operations = NativeOperations if "native" in name else PackedOperations
        state = {}
        for key, weight in weights.items():
            if form is None or weight.ndim != 2:
                state[key] = weight
                continue
            prefix = key.removesuffix("weight")
            state |= {prefix + suffix: t for suffix, t in pack(weight, form).items()}
        block = JointBlock(*described, operations, dual=True, last=False, device="meta")
        block.load_state_dict(state, assign=True)
        found[name] = block.to(device).requires_grad_(False)
    return found


def measure(device: Any, runs: int) -> dict[str, dict[str, float]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    shapes = ((2, TEXT, HIDDEN), (2, TOKENS, HIDDEN), (2, HIDDEN))
    inputs = [torch.randn(s, generator=generator).bfloat16().to(device) for s in shapes]
    by_format = blocks(device)
    timed: dict[str, list[float]] = {name: [] for name in by_format}
    with torch.inference_mode():
        for run in range(runs + 1):
            for name, block in by_format.items():
                taken = seconds(lambda b=block: b(*inputs), device)
                if run:
                    timed[name].append(taken)
    base = statistics.median(timed["bf16"])
    return {
        name: {
            "ratio": statistics.median(taken) / base,
            "ms": 1000 * statistics.median(taken),
            "MB": sum(t.numel() * t.element_size() for t in by_format[name].state_dict().values())
            / 1e6,
        }
        for name, taken in timed.items()
    }


def main() -> int:
    found = host.find_comfyui()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    table = measure(options.device, options.runs)
    if options.json:
        print(json.dumps(table, indent=1))
        return 0
    print(f"{'format':12} time / bf16     ms      MB   ({options.device})")
    for name, row in table.items():
        print(f"{name:12} {row['ratio']:11.2f} {row['ms']:6.0f} {row['MB']:7.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
