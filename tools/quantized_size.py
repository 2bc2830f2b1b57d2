"""What full-size SD3.5 takes on disk and in memory when packed: python tools/quantized_size.py

`python tools/quantized_size.py Medium "ControlNet 8b"` takes these alone.

Both kinds of ControlNet and Medium are really written with random bf16 weights (up to 10 GB, in a
temporary folder), packed without calibration, and loaded in a process of its own, whose peak of
memory is measured. Large is counted from its shapes, and so are the others, as a check on that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import host

BITS = {
    "8 bit": (8, 8), "4 bit": (4, 4), "3 bit": (3, 3),
    "2 bit, adaLN at 8": (2, 8), "2 bit, adaLN at 2": (2, 2),
}  # fmt: skip


def networks() -> dict[str, Any]:
    """Name -> the network, without memory."""
    from sd35_core.network.config import VARIANTS
    from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
    from sd35_core.network.mmditx import MMDiTX

    return {
        "ControlNet 2b": ControlNetEmbedder(ControlNetConfig("2b", 12, 1536, 1536), device="meta"),
        "ControlNet 8b": ControlNetEmbedder(ControlNetConfig("8b", 19, 2432, 2048), device="meta"),
        "Medium": MMDiTX(VARIANTS["sd3.5_medium"], device="meta"),
        "Large": MMDiTX(VARIANTS["sd3.5_large"], device="meta"),
    }


def counted(network: Any, plan: Any) -> int:
    """Bytes of the weights, from shapes alone; files of few bits have the position table's axes."""
    from sd35_core.network.mmditx import MMDiTX
    from sd35_core.quantization.plan import planned_bytes

    if isinstance(network, MMDiTX) and plan.bits < 8:
        network = MMDiTX(replace(network.config, axes=True), device="meta")
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    return planned_bytes(shapes, plan)


def write(network: Any, path: Path) -> None:
    import torch

    from sd35_core.checkpoint.tensor_file import write_file
    from sd35_core.network.layers import grid_positions

    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.empty(t.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for key, t in network.state_dict().items()
    }
    if "pos_embed" in tensors:
        places = torch.arange(network.config.pos_embed_max_size)
        tensors["pos_embed"] = grid_positions(places, places, network.config.hidden).bfloat16()
    write_file(path, tensors, {})


def load(path: Path) -> int:
    """Load a file and print by how much that raised the peak of memory, over the file's size."""
    from sd35_core.checkpoint.controlnet import load_controlnet
    from sd35_core.checkpoint.layouts import is_controlnet
    from sd35_core.checkpoint.loading import load
    from sd35_core.checkpoint.tensor_file import TensorFile
    from tools.full_size import peak_gib

    before = peak_gib()
    is_control = is_controlnet(TensorFile(path))
    network = load_controlnet(path) if is_control else load(path)
    print(f"{(peak_gib() - before) * 2**30 / path.stat().st_size:.2f}")
    assert network is not None
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--load"]:
        return load(Path(sys.argv[2]))
    found = host.find_comfyui()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    from sd35_core.quantization.plan import Plan
    from sd35_core.quantization.quantize import quantize_file

    chosen = sys.argv[1:] or list(networks())
    with tempfile.TemporaryDirectory(prefix="sd35-quantized-") as folder:
        for name, network in networks().items():
            if name not in chosen:
                continue
            full = sum(2 * tensor.numel() for tensor in network.state_dict().values())
            print(f"{name}: {full / 1e9:.2f} GB at 16 bits", flush=True)
            path = Path(folder, "full.safetensors")
            if name != "Large":
                write(network, path)
            for bits, (weights, modulation) in BITS.items():
                plan = Plan(weights, modulation_bits=modulation)
                size = counted(network, plan)
                words = f"  {bits}: counted {size / 1e9:.2f} GB, {size / full:.1%}"
                if name != "Large":
                    out = quantize_file(path, plan, out=Path(folder, "packed.safetensors"))[0]
                    command = [sys.executable, __file__, "--load", str(out)]
                    peak = subprocess.run(command, capture_output=True, text=True, check=True)
                    words += f"; written {out.stat().st_size / 1e9:.2f} GB"
                    words += f"; memory to load it {peak.stdout.strip()} of the file"
                print(words, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
