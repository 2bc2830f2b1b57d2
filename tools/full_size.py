"""Load and run a full-size SD3.5 Medium with random weights: python tools/full_size.py

2.2 billion parameters in bf16 (4.9 GB on disk, in a temporary folder), two steps at 256x256 on
the CPU. Prints how long loading takes as a ratio to reading the file, both with a cold file
cache, and the peak of the process's memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import host, install

PEAK_GIB = 14.0


def make(path: Path) -> None:
    """A checkpoint of SD3.5 Medium's shapes: small random weights, so that runs stay finite."""
    import torch

    from sd35_core.checkpoint.tensor_file import write_file
    from sd35_core.network.config import VARIANTS
    from sd35_core.network.mmditx import MMDiTX

    generator = torch.Generator().manual_seed(0)
    model = MMDiTX(VARIANTS["sd3.5_medium"], device="meta")
    tensors = {}
    for key, tensor in model.state_dict().items():
        values = torch.empty(tensor.shape, dtype=torch.bfloat16)
        tensors[f"model.diffusion_model.{key}"] = values.normal_(0, 0.02, generator=generator)
    write_file(path, tensors, {})


def forget(path: Path) -> None:
    """Drop a file from the system's file cache, where that can be asked for."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> float:
    """Seconds to read the whole file."""
    buffer = bytearray(64 << 20)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def load(path: Path, loading: Any) -> tuple[float, Any, str]:
    started = time.perf_counter()
    file = loading.read(path)
    model = loading.model_from(file, "default")
    return time.perf_counter() - started, model, loading.summary(file, model, [])


def sample(model: Any, sampler: Any) -> float:
    """Seconds for two steps at 256x256 with cfg."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def cond() -> list[Any]:
        pooled = torch.randn(1, 2048, generator=generator)
        return [[torch.randn(1, 77, 4096, generator=generator), {"pooled_output": pooled}]]

    latent = {"samples": torch.zeros(1, 16, 32, 32)}
    settings = (0, 2, 4.5, 3.0, "dpmpp_2m", "normal", 1.0)
    started = time.perf_counter()
    with torch.no_grad():
        sampler.SD35Sampler.execute(model, cond(), cond(), latent, *settings)
    return time.perf_counter() - started


def peak_gib() -> float:
    """The most memory that this process has held."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # there getrusage also counts what the process was before exec
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure(path: Path, found: host.Host, base: Path) -> int:
    from tools.inprocess import import_pack

    import_pack(found, base)
    import importlib

    loading = importlib.import_module("sd35_pack.nodes.host.loading")
    sampler = importlib.import_module("sd35_pack.nodes.sampler")
    reads, loads = [], []
    model, words = None, ""
    for _ in range(3):
        model = None
        forget(path)
        reads.append(read(path))
        forget(path)
        seconds, model, words = load(path, loading)
        loads.append(seconds)
    ratio = sorted(loads)[1] / sorted(reads)[1]
    taken = sample(model, sampler)
    peak = peak_gib()
    print(words)
    print(f"file {path.stat().st_size / 1e9:.2f} GB, median of 3 runs each, cold file cache")
    print(f"read {sorted(reads)[1]:.1f} s, load {sorted(loads)[1]:.1f} s: ratio {ratio:.2f}")
    print(f"two steps at 256x256 with cfg: {taken:.1f} s")
    print(f"peak memory {peak:.1f} GiB, of {PEAK_GIB:.0f} allowed")
    return 0 if peak < PEAK_GIB else 1


def main() -> int:
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]))
        return 0
    found = host.find_comfyui()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    with tempfile.TemporaryDirectory(prefix="sd35-full-size-") as folder:
        path = Path(folder) / "models" / "diffusion_models" / "medium.safetensors"
        path.parent.mkdir(parents=True)
        print("Writing random weights (4.9 GB) ...", flush=True)
        install.run([sys.executable, __file__, "--make", str(path)], "write the weights")
        return measure(path, found, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
