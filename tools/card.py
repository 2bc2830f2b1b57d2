"""What only a real card can tell, in ten minutes: python tools/card.py [--out FOLDER]

Writes a JSON and a Markdown table, named by date and device, into docs/cards: the tests that need
a card, waits at each step, and seconds and peak memory of a step at full size, beside ComfyUI's
own SD3 in the same run. Without CUDA it runs to its end on the processor, in small.

    python tools/card.py --pack FOLDER [--python 3.12]

packs, for a machine with torch and no network, the pack, ComfyUI and the packages that they need
(at most 60 MiB); there: python FOLDER/card.py
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text
from tools import host, install
from tools.card_pack import NANO, in_folder, pack

SECONDS = 600
"""For everything; a part gets what is left."""
OWN = "ComfyUI's own"


# What is measured


def tests(out: Path, _: bool) -> dict[str, Any]:
    """The scenes of tests/host/test_card.py on CUDA, against the CPU."""
    report = out.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "tests/host/test_card.py", "-q", "-k", "real",
               "-p", "no:cacheprovider", f"--junitxml={report}"]  # fmt: skip
    done = subprocess.run(command, cwd=host.PACK, capture_output=True, text=True)
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        ended = "skipped" if "skipped" in kinds else "failed" if kinds else "passed"
        counts[ended] += 1
        if ended == "failed":
            why = " ".join(str(child.get("message", "")) for child in case)
            failed.append(f"{case.get('name')}: {why[:200]}")
    return {**counts, "which failed": failed[:20], "exit": done.returncode}


def waits(_: Path, small: bool) -> dict[str, Any]:
    """How often a step waits for the card, by torch's own warnings."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "there is no card with CUDA"}

    def counted(case: Case, steps: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                case.draw(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in seen)

    found = {}
    for case in cases("Medium", small):
        if case.name in (OWN, "bf16", "bf16, cache", "bf16, SLG"):
            case.draw(2)
            found[case.name] = (counted(case, 8) - counted(case, 4)) / 4
    return found


def bench(out: Path, small: bool) -> dict[str, Any]:
    """Seconds of a step at 1024x1024 with cfg, and the most memory that the card held."""
    import torch
    from comfy import model_management as management

    rows = []
    for family in ("Medium", "Large"):
        for case in cases(family, small):
            started = time.perf_counter()
            management.unload_all_models()
            management.soft_empty_cache()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            row: dict[str, Any] = {"family": family, "case": case.name}
            try:
                case.draw(2)
                less, more = (case.seconds(steps) for steps in (2, 6))
                row["seconds"] = (more - less) / 4
            except Exception as error:  # a case that fails is a result
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            if torch.cuda.is_available():
                row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
            rows.append(row)
            case.forget()
            write_text(out, json.dumps({"rows": rows}), replace=True)  # for lack of time
            print(f"{family} {row} ({time.perf_counter() - started:.0f} s)", flush=True)
    return {"rows": rows}


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "tests": tests, "waits": waits, "bench": bench,
}  # fmt: skip


# What is drawn


class Case:
    """A model in some set-up, made when it is first drawn with."""

    def __init__(self, name: str, make: Callable[[], Any], pixels: int, **settings: Any):
        self.name, self.make, self.pixels, self.settings = name, make, pixels, settings
        self.model: Any = None

    def draw(self, steps: int) -> None:
        import torch

        import nodes as stock

        self.model = self.model or self.make()
        generator = torch.Generator().manual_seed(0)

        def cond() -> list[Any]:
            pooled = torch.randn(1, 2048, generator=generator)
            return [[torch.randn(1, 154, 4096, generator=generator), {"pooled_output": pooled}]]

        latent = {"samples": torch.zeros(1, 16, self.pixels // 8, self.pixels // 8)}
        pair = self.settings.get("controlled", lambda *both: both)(cond(), cond())
        with torch.no_grad():
            stock.common_ksampler(
                self.model, 0, steps, 4.0, "euler", "simple", *pair, latent, disable_noise=False
            )

    def seconds(self, steps: int) -> float:
        started = time.perf_counter()
        self.draw(steps)
        return time.perf_counter() - started

    def forget(self) -> None:
        self.model = None


def config_of(family: str, small: bool) -> Any:
    from dataclasses import replace

    from sd35_core.network.config import VARIANTS

    config = VARIANTS[f"sd3.5_{family.lower()}"]
    if not small:
        return config
    return replace(config, depth=4, hidden=256, dual_blocks=config.dual_blocks[:2],
                   pos_embed_max_size=32)  # fmt: skip


def cases(family: str, small: bool) -> Iterator[Case]:
    """Every set-up of a model; each file is deleted before the next is written."""
    import comfy.sd
    import torch
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from sd35_pack.nodes import controlnet, guidance  # pyright: ignore[reportMissingImports]
    from sd35_pack.nodes.host import (  # pyright: ignore[reportMissingImports]
        controlnet as host_controlnet,
    )
    from sd35_pack.nodes.host import loading  # pyright: ignore[reportMissingImports]

    from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder

    config, pixels = config_of(family, small), 128 if small else 1024
    layers = "1, 2" if small else "7, 8, 9"

    def ours(path: Path, cache: str = "off", dtype: str = "default") -> Any:
        return loading.load_model(str(path), dtype, cache)

    def stock(path: Path) -> Any:
        return comfy.sd.load_diffusion_model(str(path))

    def with_lora(model: Any) -> Any:
        lora = {}
        for index in range(config.depth):
            name = f"lora_unet_joint_blocks_{index}_x_block_attn_qkv"
            lora[f"{name}.lora_up.weight"] = 0.01 * torch.randn(3 * config.hidden, 16)
            lora[f"{name}.lora_down.weight"] = torch.randn(16, config.hidden)
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]

    def skipping(model: Any) -> Any:
        return guidance.SkipLayerGuidance.execute(model, layers, 2.5, 0.0, 1.0)[0]

    def stock_skipping(model: Any) -> Any:
        return SkipLayerGuidanceDiT.execute(model, 2.5, 0.0, 1.0, double_layers=layers)[0]

    def compiled(model: Any) -> Any:
        if hasattr(TorchCompileModel, "execute"):
            return TorchCompileModel.execute(model, "inductor")[0]
        return TorchCompileModel().patch(model, "inductor")[0]

    def steered(folder: Path) -> Callable[..., Any]:
        kind = "8b" if family == "Large" else "2b"
        pooled = config.pooled_dim if kind == "8b" else config.hidden
        count = next(n for n in (19, 12, 4, 2) if config.depth % n == 0)
        shape = ControlNetConfig(kind, count, config.hidden, pooled)
        path = folder / "controlnet.safetensors"
        write_random(path, ControlNetEmbedder(shape, device="meta").state_dict(), None)
        vae = loading.vae_from(loading.read(host.PACK / NANO))
        picture = torch.rand(1, pixels, pixels, 3)

        def attach(positive: Any, negative: Any) -> Any:
            loaded = host_controlnet.controlnet_from(
                loading.read(path), host_controlnet.Options("near is bright", "Stability AI")
            )
            apply = controlnet.SD35ControlNetApply.execute
            return apply(positive, negative, loaded, vae, picture, 0.8, 0.0, 1.0).result

        return attach

    with in_folder() as folder:
        path = folder / "bf16.safetensors"
        write_model(path, config, None)
        yield Case(OWN, lambda: stock(path), pixels)
        yield Case("bf16", lambda: ours(path), pixels)
        yield Case("bf16, cache", lambda: ours(path, "on"), pixels)
        yield Case("bf16, SLG", lambda: skipping(ours(path)), pixels)
        yield Case(f"{OWN}, SLG", lambda: stock_skipping(stock(path)), pixels)
        yield Case("bf16, LoRA", lambda: with_lora(ours(path)), pixels)
        yield Case("bf16, ControlNet", lambda: ours(path), pixels, controlled=steered(folder))
        if torch.cuda.is_available():
            yield Case("bf16, compiled", lambda: compiled(ours(path)), pixels)
            yield Case(f"{OWN}, compiled", lambda: compiled(stock(path)), pixels)
        yield Case("fp8 widget", lambda: ours(path, dtype="fp8_e4m3fn"), pixels)
        yield Case("fp8 fast widget", lambda: ours(path, dtype="fp8_e4m3fn_fast"), pixels)
        path.unlink()
        own = (("4 bit", "sd35_vq4"), ("3 bit", "sd35_vq3"), ("2 bit", "sd35_vq2"))
        for name, form in (("int8", "int8_tensorwise"), *own):
            packed = folder / f"{form}.safetensors"
            write_model(packed, config, form)
            yield Case(name, lambda packed=packed: ours(packed), pixels)
            yield Case(f"{name}, LoRA", lambda packed=packed: with_lora(ours(packed)), pixels)
            packed.unlink()


def write_model(path: Path, config: Any, form: str | None) -> None:
    import torch

    from sd35_core.network.layers import grid_positions
    from sd35_core.network.mmditx import MMDiTX

    shapes = MMDiTX(config, device="meta").state_dict()
    places = torch.arange(config.pos_embed_max_size)
    table = grid_positions(places, places, config.hidden).bfloat16()
    write_random(path, shapes, form, {"pos_embed": table})


def write_random(path: Path, shapes: Any, form: str | None, known: Any = None) -> None:
    """A file of random numbers; `form`: the blocks' matrices packed so, with random codes."""
    import torch

    from sd35_core.checkpoint.tensor_file import write_file
    from sd35_core.packing.formats import pack

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = dict(known or {})
    for key, tensor in shapes.items():
        if key in tensors:
            continue
        matrix = tensor.ndim == 2 and "blocks." in key and key.endswith(".weight")
        if not (form and matrix):
            values = torch.empty(tensor.shape, dtype=torch.bfloat16)
            tensors[key] = values.normal_(0, 0.02, generator=generator)
            continue
        sample = pack(0.02 * torch.randn(256, tensor.shape[1], generator=generator), form)
        for suffix, part in sample.items():
            rows = suffix in ("weight", "weight_scale")
            repeated = (
                part.repeat(tensor.shape[0] // 256 + 1, 1)[: tensor.shape[0]] if rows else part
            )
            tensors[key.removesuffix("weight") + suffix] = repeated
    write_file(path, tensors, {})


# The report


def machine() -> dict[str, str]:
    import torch

    cuda = torch.cuda.is_available()
    found = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "memory": f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
        if cuda
        else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    return {**found, "ComfyUI": host.find_comfyui().version}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    about = report["machine"]
    lines = [f"# {about['device']}, {about['date']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if value]
    if report["small"]:
        lines += [
            "",
            "**In small, to show that the program runs: these are no figures of a card.**",
        ]
    lines += ["", "## Tests on the card", "", *(f"- {k}: {v}" for k, v in report["tests"].items())]
    lines += ["", "## Waits at each step", "", *(f"- {k}: {v}" for k, v in report["waits"].items())]
    columns = "| model | set-up | s | of ComfyUI's own | peak GB |"
    lines += ["", "## A step at 1024x1024 with cfg", "", columns, "| --- | --- | --- | --- | --- |"]
    rows = report["bench"].get("rows", ())
    own = {row["family"]: row.get("seconds") for row in rows if row["case"] == OWN}
    for row in rows:
        seconds, base = row.get("seconds"), own[row["family"]]
        figures = [seconds, seconds and base and seconds / base, row.get("peak_GB")]
        words = [row.get("error", "") if f is None else f"{f:.3f}" for f in figures]
        lines.append(f"| {row['family']} | {row['case']} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def run(out: Path, small: bool) -> int:
    """Each part in a program of its own, so that one that dies ends no other."""
    started, report = time.monotonic(), {"machine": machine(), "small": small}
    with in_folder() as folder:
        for part in PARTS:
            left = SECONDS - (time.monotonic() - started)
            result = folder / f"{part}.json"
            command = [sys.executable, __file__, "--part", part, "--out", str(result)]
            command += ["--small"] if small else []
            install.say(f"{part}: at most {left:.0f} s")
            try:
                subprocess.run(command, timeout=max(left, 1))
            except subprocess.TimeoutExpired:
                install.say(f"{part}: ended for lack of time")
            report[part] = (
                json.loads(result.read_text("utf-8")) if result.is_file() else {"ended": "early"}
            )
    name = "".join(c if c.isalnum() else "-" for c in report["machine"]["device"]).strip("-")
    stem = f"{report['machine']['date']}-{name}"
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{stem}.json", json.dumps(report, indent=1), replace=True)
    write_text(out / f"{stem}.md", table(report), replace=True)
    print(f"{out / stem}.json and .md, after {time.monotonic() - started:.0f} s")
    return 1 if report["tests"].get("failed") else 0


def measure(part: str, out: Path, small: bool) -> int:
    import torch

    from tools.inprocess import import_pack

    if part != "tests":
        with in_folder() as base:
            import_pack(host.find_comfyui(), base, cpu=not torch.cuda.is_available())
            write_text(out, json.dumps(PARTS[part](out, small)), replace=True)
        return 0
    write_text(out, json.dumps(tests(out, small)), replace=True)
    return 0


# Packing


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=host.PACK / "docs" / "cards")
    parser.add_argument("--small", action="store_true", help="small models, to try the program")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="pack for another machine")
    parser.add_argument("--python", default="3.12", help="that machine's, for --pack")
    parser.add_argument("--has", default="", help="packages there besides torch's: scipy,av,...")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("torch") is None and not host.started_again():
        return host.start_again(host.find_comfyui().python, __file__)
    import torch

    if options.part:
        return measure(options.part, options.out, options.small)
    if options.pack:
        return pack(options.pack, options.python, set(options.has.lower().split(",")))
    os.environ.setdefault("COMFYUI_PATH", str(host.find_comfyui().folder))
    return run(options.out, options.small or not torch.cuda.is_available())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except host.HostError as error:
        print(f"card: {error}", file=sys.stderr)
        sys.exit(1)
