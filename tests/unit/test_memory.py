"""What a set-up takes of a card: the estimate against the memory that it really takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd35_core.checkpoint.gguf_file import GGUFFile
from sd35_core.checkpoint.sizes import Weights, weights_in
from sd35_core.checkpoint.tensor_file import StateDict, TensorFile, read_file
from sd35_core.encoders.autoencoder import TinyAutoencoder
from sd35_core.network.config import VARIANTS, MMDiTXConfig
from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from sd35_core.network.mmditx import MMDiTX
from sd35_core.network.peak import NetworkCall, peak_of_call
from sd35_core.packing.formats import packed_entries
from sd35_core.quantization.plan import Plan
from sd35_core.workflow.__main__ import main
from sd35_core.workflow.check import files_under
from sd35_core.workflow.finding import Finding
from sd35_core.workflow.headers import model_of
from sd35_core.workflow.memory import (
    DECODING,
    GB,
    SAMPLING,
    Phase,
    phases,
    planned_weights,
    unknown_parts,
)
from sd35_core.workflow.reader import setups
from sd35_core.workflow.rules.memory import about_memory
from sd35_core.workflow.setup import Card, Encoders, Latent, Sampling, Setup, Vae
from tools.which_card import README, table

from ..conftest import PACK
from .models import finish_gguf
from .set_ups import Change, Graph, both, medium, node, set_to

MEASURE = """
import gc, json, sys
import torch
from sd35_core.checkpoint.controlnet import load_controlnet
from sd35_core.checkpoint.loading import load
from sd35_core.checkpoint.tensor_file import read_file
from sd35_core.encoders.autoencoder import TinyAutoencoder
from sd35_core.network.config import MMDiTXConfig
from sd35_core.network.mmditx import MMDiTX
from sd35_core.network.modulation_cache import computed

def of_this_process(kind):
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])

def half(*shape):
    return torch.randn(*shape).bfloat16()

@torch.no_grad()
def main(model, control, vae, rows, height, width, steps):
    small = MMDiTX(MMDiTXConfig(2, 64, 64, 64, 8, True, (0,)), dtype=torch.bfloat16)
    small(half(2, 16, 8, 8), torch.zeros(2), half(2, 7, 64), half(2, 64))
    TinyAutoencoder().bfloat16().decode(half(1, 16, 8, 8))  # what libraries take once is outside
    before = of_this_process("VmRSS")
    if vae:
        decoder = TinyAutoencoder().bfloat16()
        decoder.load_state_dict(read_file(vae)[0])
        del decoder.taesd_encoder
        x = half(1, 16, height, width)
        open("/proc/self/clear_refs", "w").write("5")
        decoder.decode(x)
        return of_this_process("VmHWM") - before
    network = load(model)
    steering = load_controlnet(control) if control else None
    x, context, y = half(rows, 16, height, width), half(rows, 154, 4096), half(rows, 2048)
    times, known = torch.full((rows,), 500.0), None
    if steps:
        many = network.conditioning(torch.arange(2.0 * steps), half(2 * steps, 2048))
        kept = computed(network, many)
        for module in [*network.joint_blocks, network.final_layer]:
            for part in (module, *module.children()):
                if hasattr(part, "adaLN_modulation"):
                    part.adaLN_modulation = None
        first = [(text[:rows], image[:rows]) for text, image in kept.blocks]
        known = type(kept)(kept.c[:rows], first, kept.final[:rows])
        del many
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    residuals = steering(network, x, times, y, x[:1]) if steering else []
    network(x, times, context, y, residuals=residuals[:2], modulations=known)
    return of_this_process("VmHWM") - before

sys.stdout.write(str(main(**json.loads(sys.argv[1]))))
"""


def width_of(hidden: int, dual: bool) -> MMDiTXConfig:
    return MMDiTXConfig(2, hidden, 4096, 2048, 64, True, (0,) if dual else ())


def random_half(*shape: int) -> torch.Tensor:
    return 0.02 * torch.randn(shape, dtype=torch.bfloat16)


def packed_at_random(network: torch.nn.Module, plan: Plan | None) -> StateDict:
    """Weights of a network's shapes, packed by a plan, with codes that were never weights."""
    found: StateDict = {}
    for key, tensor in network.state_dict().items():
        shape = tuple(tensor.shape)
        form = plan.format_of(key, shape) if plan else None
        if form is None:
            found[key] = random_half(*shape)
            continue
        layer = key.removesuffix("weight")
        mark = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
        for name, (dtype, size) in packed_entries(form, shape).items():
            wide = dtype.is_floating_point
            found[layer + name] = (
                random_half(*size).to(dtype) if wide else torch.ones(size).to(dtype)
            )
        found[f"{layer}comfy_quant"] = mark
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Medium's and Large's width, two blocks: 0.4 GB each in 16 bits."""
    folder = tmp_path_factory.mktemp("models")
    wide = {"medium": width_of(1536, True), "large": width_of(2432, False)}
    files = {
        "diffusion_models/medium": (MMDiTX(wide["medium"], device="meta"), None),
        "diffusion_models/medium8": (MMDiTX(wide["medium"], device="meta"), Plan(8)),
        "diffusion_models/large2": (MMDiTX(wide["large"], device="meta"), Plan(2)),
        "controlnet/canny": (
            ControlNetEmbedder(ControlNetConfig("8b", 2, 1536, 2048), device="meta"), None),
        "vae/vae": (TinyAutoencoder(), None),
    }  # fmt: skip
    for name, (network, plan) in files.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(packed_at_random(network, plan), path)
    return folder


def model(name: str, cache: str = "off") -> Change:
    return set_to("1", model=f"{name}.safetensors", modulation_cache=cache, vae="vae.safetensors")


def size(width: int, height: int) -> Change:
    return set_to("4", width=width, height=height)


def steered(graph: Graph) -> None:
    graph["8"] = node("SD35ControlNetLoader", control_net="canny.safetensors")
    graph["9"] = node(
        "SD35ControlNetApply", positive=["2", 0], negative=["3", 0], control_net=["8", 0],
        vae=["1", 2], image=["7", 0], strength=0.8, start=0.0, end=1.0,
    )  # fmt: skip
    graph["5"]["inputs"].update(positive=["9", 0], negative=["9", 1])


@dataclass(frozen=True)
class Case:
    change: Change
    phase: str
    given: dict[str, object]


def case(change: Change, height: int, width: int, phase: str = SAMPLING, **given: object) -> Case:
    plain = {"model": "", "control": "", "vae": "", "rows": 2, "steps": 0}
    return Case(both(change, size(width, height)), phase,
                {**plain, "height": height // 8, "width": width // 8, **given})  # fmt: skip


CASES: dict[str, Case] = {
    "Medium's width": case(model("medium"), 512, 512, model="medium"),
    "with its modulations kept": case(
        both(model("medium", "on"), set_to("5", steps=20)), 512, 512, model="medium", steps=20),
    "in 8 bits, a wide picture": case(model("medium8"), 512, 768, model="medium8"),
    "Large's width in 2 bits, without guidance": case(
        both(model("large2"), set_to("5", cfg=1.0)), 512, 512, model="large2", rows=1),
    "with a ControlNet": case(
        both(model("medium"), steered), 512, 512, model="medium", control="canny"),
    "the VAE": case(model("medium"), 1024, 1024, DECODING, vae="vae"),
}  # fmt: skip
FOLDERS = {"model": "diffusion_models", "control": "controlnet", "vae": "vae"}


def phases_of(change: Change, models: Path, card: Card) -> dict[str, Phase]:
    graph = medium()
    change(graph)
    (setup,) = setups(graph, files_under(models), card=card).values()
    return {phase.name: phase for phase in phases(setup, card)}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux alone")
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_within_10_percent_of_the_peak(name: str, models: Path) -> None:
    """The C library gives freed memory back at once here, or its own store would be measured."""
    found = CASES[name]
    need = phases_of(found.change, models, Card(24 * 10**9))[found.phase]
    given = dict(found.given)
    for kind, folder in FOLDERS.items():
        given[kind] = given[kind] and str(models / folder / f"{given[kind]}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(given)], cwd=PACK, check=True,
        capture_output=True, encoding="utf-8",
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    seen = int(done.stdout)
    share = need.total / seen
    sys.stdout.write(f"{name}: {share:.3f} of {seen / GB:.2f} GB\n")
    assert abs(share - 1) < 0.1, (need, share)


def large(bits: int | None = None, cache: str = "auto") -> Setup:
    """Large at 1024x1024 with guidance, every file at hand."""
    plan = None if bits is None else Plan(bits)
    model = replace(
        model_of(VARIANTS["sd3.5_large"], "sd3.5_large", packed=False),
        weights=planned_weights("sd3.5_large", plan), modulation_cache=cache,
    )  # fmt: skip
    return Setup(
        model=model,
        sampling=Sampling(steps=40, cfg=4.5),
        latent=Latent(1024, 1024, 1),
        encoders=Encoders(weights=11_200_000_000, t5_weights=9_500_000_000, largest=4096 * 10240),
        vae=Vae(168_000_000, 256),
    )


def said(setup: Setup, card: float, keeps_all: bool = False) -> list[Finding]:
    return list(about_memory(replace(setup, card=Card(int(card * GB), keeps_all=keeps_all))))


def test_nothing_is_said_where_all_of_it_fits_or_no_card_is_known() -> None:
    assert said(large(), 24) == [] and list(about_memory(large())) == []
    assert said(large(8), 16) == []


def test_what_does_not_fit_is_named_with_what_would() -> None:
    encoding, sampling = said(large(), 8)
    assert (sampling.severity, encoding.severity) == ("note", "note")
    assert re.search(
        r"The card has 8\.0 GB; sampling takes about 1\d\.\d \(model 1\d\.\d.*slower, not broken\. "
        r"What helps: the model in 4 bits \(SD3\.5 Quantize\), which makes that \d\.\d in all",
        sampling.text,
    )
    assert re.search(r"text encoders take about 11\.4 \(T5 9\.5.*T5 in fp8", encoding.text)
    (tiled,) = said(replace(large(2), latent=Latent(2048, 2048, 1), encoders=None), 8)
    assert "Decoding 2048x2048 takes about 8.8 GB" in tiled.text and "in tiles" in tiled.text


def test_work_that_is_larger_than_the_card_is_a_warning() -> None:
    (found,) = said(replace(large(2), latent=Latent(1536, 1536, 16), encoders=None, vae=None), 8)
    assert found.severity == "warning" and "run out of memory" in found.text


def test_main_memory_keeps_all_models() -> None:
    (found,) = said(large(), 24, keeps_all=True)
    assert "together take about 2" in found.text and found.severity == "warning"
    assert said(large(), 64, keeps_all=True) == []


def test_the_cache_is_used_where_it_makes_the_model_fit() -> None:
    def sampled(card: float, cache: str) -> dict[str, int]:
        (phase,) = phases(
            replace(large(cache=cache), encoders=None, vae=None), Card(int(card * GB))
        )
        return dict(phase.weights)

    assert "modulations" not in sampled(24, "auto") and "modulations" in sampled(16, "auto")
    assert "modulations" in sampled(24, "on") and "modulations" not in sampled(16, "off")


def test_a_block_holds_nothing_that_it_needs_no_more() -> None:
    """Its q, k and v were held beside the MLP: 19 tensors as large as its tokens."""
    call = NetworkCall(rows=2, height=128, width=128, tokens=154)
    tokens = 2 * (64 * 64 + 154) * 2  # rows, and bytes of a number
    for variant in ("sd3.5_medium", "sd3.5_large"):
        shape = VARIANTS[variant]
        assert peak_of_call(shape, call) < 14 * tokens * shape.hidden


def test_each_condition_of_the_work_counts() -> None:
    shape, plain = width_of(1536, True), NetworkCall(2, 64, 64, 154)
    peak = peak_of_call(shape, plain)
    assert peak_of_call(shape, replace(plain, rows=1)) == pytest.approx(peak / 2, rel=0.05)
    assert peak_of_call(shape, replace(plain, number=4)) == pytest.approx(2 * peak, rel=0.1)
    assert peak_of_call(shape, replace(plain, unpacks=True)) > peak
    tokens = 2 * 1024 * 1536 * 2
    steered = peak_of_call(shape, replace(plain, residuals=12)) - peak
    assert steered == 12 * tokens


@pytest.mark.parametrize(
    "latent",
    [Latent(2**64, 64, 1), Latent(64, -8, 1), Latent(64, 64, 2**64), Latent(64, 64, -1), None,
     Latent(), Latent(64, 64, 1, video="x")],
)  # fmt: skip
def test_impossible_sizes_are_not_reckoned_with(latent: Latent | None) -> None:
    setup = replace(large(), latent=latent, encoders=None)
    assert phases(setup, Card(8 * 10**9)) == []
    assert "the size of the latent" in unknown_parts(setup)


def test_the_smallest_and_the_largest_sizes_are_reckoned_with() -> None:
    for side in (8, 24, 2**16):
        setup = replace(large(), latent=Latent(side, side, 1), encoders=None, vae=None)
        (phase,) = phases(setup, Card(8 * 10**9))
        assert phase.work > 0
    strange = replace(large(cache="on"), sampling=Sampling(steps=-5, cfg=1.0), vae=None)
    assert all(size >= 0 for _, size in phases(strange, Card(10**9))[-1].weights)


def test_the_command_draws_a_table_and_names_what_is_not_there(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "workflow.json"
    graph = medium()
    CASES["Medium's width"].change(graph)
    path.write_text(json.dumps(graph), encoding="utf-8")
    arguments = [str(path), "--models", str(models), "--card"]
    assert main([*arguments, "8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"sampling +0\.\d+ +0\.\d+ +0\.\d+   whole \(model 0\.\d+, work", out)
    assert "not counted: the text encoders." in out
    for wrong in ("0", "-1", "nan", "inf"):
        assert main([*arguments, wrong]) == 2 and "--card is" in capsys.readouterr().err


def test_weights_are_told_by_headers_alone(models: Path) -> None:
    for name in ("medium", "medium8", "large2"):
        path = models / "diffusion_models" / f"{name}.safetensors"
        found, tensors = weights_in(TensorFile(path)), read_file(path)[0]
        assert found.stored == sum(tensor.nbytes for tensor in tensors.values())
        assert found.packed == (name != "medium")
        adaln = {key: t for key, t in tensors.items() if "adaLN" in key}
        assert found.resting == sum(tensor.nbytes for tensor in adaln.values())
        biases = [t for key, t in adaln.items() if key.endswith(".bias")]
        assert found.row == sum(map(len, biases))


def test_a_gguf_file_is_told_by_its_header_alone(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "sd3")
    wide, half = torch.zeros(8, 64), torch.zeros(8, 64, dtype=torch.float16)
    finish_gguf(writer, {"a.weight": wide, "b.adaLN_modulation.1.weight": half})
    file = GGUFFile(path)
    assert file.entry("a.weight") == (torch.float32, (8, 64))
    assert [file.entry(key)[0] for key in file] == [file[key].dtype for key in file]
    assert weights_in(file) == Weights(
        whole=2 * 2 * 512, stored=6 * 512, resting=2 * 512, row=8, largest=512
    )
    assert weights_in(file).unpacked_at_use().whole == 6 * 512


def test_the_readme_has_the_table_as_it_is_computed() -> None:
    assert table() in README.read_text(encoding="utf-8"), "run python tools/which_card.py --write"
