"""8-bit and 2-bit weights: formats, layers, calibration, files."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_core.checkpoint.controlnet import load_controlnet
from sd35_core.checkpoint.loading import load
from sd35_core.checkpoint.tensor_file import TensorFile
from sd35_core.errors import CheckpointError, SettingError
from sd35_core.network.config import MMDiTXConfig
from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from sd35_core.network.layers import grid_positions, split_axes
from sd35_core.packing.formats import (
    FORMATS,
    FP8,
    INT8,
    VECTORS,
    VQ2,
    VQ3,
    VQ4,
    pack,
    unpack,
)
from sd35_core.packing.layers import NativeLinear, PackedLinear, int8_product
from sd35_core.quantization import quantize
from sd35_core.quantization.__main__ import main
from sd35_core.quantization.calibration import (
    moments_of,
    recorded,
)
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantize_file, relative_error

from ..conftest import PACK
from .models import random_inputs, random_weights

SMALL = MMDiTXConfig(
    depth=2, hidden=128, context_dim=96, pooled_dim=40, pos_embed_max_size=16, qk_norm=True,
    dual_blocks=(0,),
)  # fmt: skip


@pytest.fixture
def weight() -> Tensor:
    return 0.02 * torch.randn(256, 512, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def moments() -> Tensor:
    """Of correlated inputs, as layers see them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4096, 64, generator=generator) @ torch.randn(64, 512, generator=generator)
    x = x + 0.3 * torch.randn(4096, 512, generator=generator)
    return x.T @ x / len(x)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {f"model.diffusion_model.{k}": t.half() for k, t in random_weights(SMALL).items()}
    tensors["first_stage_model.something"] = torch.arange(4.0)
    save_file(tensors, path, metadata={"title": "tiny"})
    return path


def bits(packed: dict[str, Tensor], weight: Tensor) -> float:
    return 8 * sum(t.numel() * t.element_size() for t in packed.values()) / weight.numel()


@pytest.mark.parametrize(
    ("form", "most"), [(INT8, 0.009), (FP8, 0.03), (VQ2, 0.33), (VQ3, 0.19), (VQ4, 0.1)]
)
def test_a_format_keeps_what_its_bits_allow(form: str, most: float, weight: Tensor) -> None:
    packed = pack(weight, form)
    error = relative_error(weight, unpack(packed, form, torch.float32))
    assert most / 3 < error < most
    again = pack(weight, form)
    assert all(torch.equal(packed[k].float(), again[k].float()) for k in packed)


@pytest.mark.parametrize(("form", "taken"), [(VQ2, 2.13), (VQ3, 3.13), (VQ4, 4.13)])
def test_vectors_take_few_bits_more_than_their_name(form: str, taken: float) -> None:
    weight = torch.randn(1536, 1536, generator=torch.Generator().manual_seed(0))
    assert bits(pack(weight, form), weight) == pytest.approx(taken, abs=0.01)


@pytest.mark.parametrize("form", VECTORS)
def test_calibration_lowers_the_error_of_the_output(
    form: str, weight: Tensor, moments: Tensor
) -> None:
    free = unpack(pack(weight, form), form, torch.float32)
    packed = pack(weight, form, moments)
    calibrated = unpack(packed, form, torch.float32)
    assert relative_error(weight, calibrated, moments) < 0.5 * relative_error(weight, free, moments)
    assert packed["weight"].dtype == torch.uint8
    assert packed["weight"].shape == (256, VECTORS[form].width(512))


@pytest.mark.parametrize("form", VECTORS)
def test_numbers_of_entries_go_into_bytes_and_back(form: str) -> None:
    code = VECTORS[form]
    numbers = torch.randint(code.entries, (5, 64), generator=torch.Generator().manual_seed(0))
    packed = code.to_bytes(numbers)
    assert packed.dtype == torch.uint8 and packed.shape == (5, code.width(64 * code.vector))
    assert torch.equal(code.from_bytes(packed), numbers.int())


def test_relative_error_is_that_of_outputs(weight: Tensor) -> None:
    x = torch.randn(1000, 512, generator=torch.Generator().manual_seed(2))
    other = weight + 0.001 * torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    expected = (x @ (other - weight).T).norm() / (x @ weight.T).norm()
    found = relative_error(weight, other, x.T @ x / len(x))
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_gptq_equals_nearest_entries_where_inputs_are_independent(weight: Tensor) -> None:
    """With moments that are the identity there is no error to take over."""
    free, calibrated = pack(weight, VQ2), pack(weight, VQ2, torch.eye(512))
    assert torch.equal(free["weight"], calibrated["weight"])


def test_rows_of_zeros_stay_zero(weight: Tensor) -> None:
    weight[3] = 0
    for form in FORMATS:
        assert unpack(pack(weight, form), form, torch.float32)[3].abs().max() < 1e-6


def test_a_width_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingError, match="192 inputs, which are no multiple of 128"):
        pack(torch.randn(64, 192), VQ2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_a_linear_layer_with_its_weight(
    form: str, bias: bool, weight: Tensor
) -> None:
    layer = PackedLinear(512, 256, bias=bias, device="meta")
    state = dict(pack(weight, form))
    if bias:
        state["bias"] = torch.randn(256)
    layer.load_state_dict(state, assign=True)
    x = torch.randn(2, 5, 512)
    expected = F.linear(x, unpack(state, form, torch.float32), state.get("bias"))
    assert torch.equal(layer(x), expected)
    assert layer.state_dict().keys() == state.keys()


def test_the_processors_int8_product_is_near(weight: Tensor) -> None:
    layer = NativeLinear(512, 256, bias=False, device="meta")
    layer.load_state_dict(pack(weight, INT8), assign=True)
    x = torch.randn(2, 20, 512)
    expected = F.linear(x, weight)
    assert (layer(x) - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(256, 100, dtype=torch.uint8)}, r"weight of shape \[256, 100\]"),
        ({"weight_codebook": None}, "weight_codebook missing"),
        ({"weight_scale": torch.full((256, 4), torch.nan)}, "scales that are NaN"),
        ({"comfy_quant": {"format": "int3"}}, "packed as int3, version 1"),
        ({"comfy_quant": {"format": INT8, "convrot": True}}, "int8_tensorwise with convrot"),
        ({"comfy_quant": {"format": VQ2, "version": 2}}, "version 2. Known here are"),
        ({"comfy_quant": {}}, "does not say how it is packed"),
        ({"comfy_quant": None}, "size mismatch"),
    ],
)
def test_a_damaged_layer_is_refused(change: dict, words: str, weight: Tensor) -> None:
    state = {**pack(weight, VQ2), **change}
    if isinstance(state["comfy_quant"], dict):
        text = json.dumps(state["comfy_quant"]).encode()
        state["comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    state = {k: t for k, t in state.items() if t is not None}
    layer = PackedLinear(512, 256, bias=False, device="meta")
    with pytest.raises((CheckpointError, RuntimeError), match=words):
        layer.load_state_dict(state, assign=True)


def test_a_position_table_of_columns_and_rows_is_stored_as_these(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    places = torch.arange(SMALL.pos_embed_max_size)
    table = grid_positions(places, places, SMALL.hidden).half()
    save_file({**{k: t.half() for k, t in random_weights(SMALL).items()}, "pos_embed": table}, path)
    whole = load(path)
    for plan, stored in ((Plan(8), "pos_embed"), (Plan(2), "pos_embed_axes")):
        out, report = quantize_file(path, plan)
        file, packed = TensorFile(out), load(out)
        assert [k for k in file if k.startswith("pos_embed")] == [stored]
        assert packed.config == whole.config
        assert torch.equal(packed.positions(4, 6), whole.positions(4, 6))
        assert torch.equal(packed.positions(16, 15), whole.positions(16, 15))
    table[0, 5, 7] += 1
    assert split_axes(table) is None


@pytest.mark.parametrize("values", [(5, INT8, 8), (8, "int4", 8), (2, INT8, 6), (4, INT8, 8, VQ2)])
def test_a_plan_that_does_not_exist_is_refused(values: tuple[Any, ...]) -> None:
    with pytest.raises(SettingError):
        Plan(*values)


@pytest.mark.parametrize(
    ("plan", "share"),
    [
        (Plan(8), 0.6),
        (Plan(8, FP8), 0.6),
        (Plan(4, INT8, 4), 0.45),
        (Plan(3), 0.5),
        (Plan(2), 0.45),
        (Plan(2, INT8, 2), 0.35),
    ],  # fmt: skip
)
def test_a_file_is_packed_and_loads(plan: Plan, share: float, model_file: Path) -> None:
    out, report = quantize_file(model_file, plan)
    assert report.after / report.before < share
    file = TensorFile(out)
    assert file.metadata["title"] == "tiny" and "sd35_quantization" in file.metadata
    assert torch.equal(file["first_stage_model.something"], torch.arange(4.0))
    full, small = load(model_file, dtype=torch.float32), load(out, dtype=torch.float32)
    inputs = random_inputs(SMALL)
    with torch.no_grad():
        a, b = full(*inputs).flatten(), small(*inputs).flatten()
    assert torch.cosine_similarity(a, b, dim=0) > (0.999 if plan.bits == 8 else 0.7)
    packed = {k.rsplit(".", 1)[0] for k in file if k.endswith(".comfy_quant")}
    prefix = "model.diffusion_model."
    precise = ("x_embedder", "t_embedder", "y_embedder", "context_embedder", "final_layer")
    assert packed and not any(
        name.startswith(tuple(prefix + p for p in precise)) for name in packed
    )


def test_a_controlnet_keeps_its_last_products_at_8_bits(tmp_path: Path) -> None:
    config = ControlNetConfig("2b", 2, 128, 128)
    torch.manual_seed(0)
    control = ControlNetEmbedder(config)
    tensors = {**control.state_dict(), "control_type": torch.tensor([2], dtype=torch.int32)}
    path = tmp_path / "control.safetensors"
    save_file(tensors, path)
    out, report = quantize_file(path, Plan(2))
    forms = {layer.name: layer.form for layer in report.layers}
    assert forms["controlnet_blocks.0.weight"] == INT8
    assert forms["transformer_blocks.1.mlp.fc1.weight"] == VQ2
    assert load_controlnet(out).config.control_type == "depth"


def test_calibration_helps_the_whole_model(model_file: Path) -> None:
    network, inputs = load(model_file, dtype=torch.float32), random_inputs(SMALL, batch=64)
    with recorded(network) as calls, torch.no_grad():
        expected = network(*inputs)
    moments = moments_of(network, calls.chosen(), torch.device("cpu"))
    errors = []
    for given in (None, moments):
        out, report = quantize_file(model_file, Plan(2), given)
        assert ("datafree" in out.name) == (given is None) != report.calibrated
        with torch.no_grad():
            errors.append(float((load(out, dtype=torch.float32)(*inputs) - expected).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_a_layer_is_on_the_disk_before_the_next_is_packed(model_file: Path) -> None:
    """So that a large model needs memory for one layer alone."""
    sizes = []

    def look(done: int, total: int) -> None:
        (partial,) = model_file.parent.glob(".sd35-*.partial")
        sizes.append(partial.stat().st_size)

    _, report = quantize_file(model_file, Plan(4), on_layer=look)
    grown = [after - before for before, after in zip(sizes, sizes[1:])]
    layers = report.layers[1:]
    assert all(0.9 * layer.after < size <= layer.after for layer, size in zip(layers, grown))


def test_nothing_is_written_when_it_is_stopped_or_quantized_twice(model_file: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    before = set(model_file.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        quantize_file(model_file, Plan(2), on_layer=stop)
    assert set(model_file.parent.iterdir()) == before
    out, _ = quantize_file(model_file, Plan(8))
    with pytest.raises(SettingError, match="quantized already"):
        quantize_file(out, Plan(2))


def test_the_command_line_writes_beside_the_file(
    model_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sd35")
    assert main([str(model_file), "--bits", "2"]) == 0
    assert (model_file.parent / "model_2bit_adaln8_datafree.safetensors").is_file()
    assert "2 bits (without calibration)" in caplog.text
    assert main([str(model_file.with_name("gone.safetensors"))]) == 1
    assert "gone.safetensors" in caplog.text
    assert load_file(model_file)


def test_a_file_that_another_wrote_is_never_replaced(model_file: Path) -> None:
    """The new one has a number, which a second run takes again; what this wrote is replaced."""
    name = model_file.with_name("model_int8.safetensors")
    first, report = quantize_file(model_file, Plan(8))
    again, _ = quantize_file(model_file, Plan(8))
    assert (first, again, report.note) == (name, name, "")
    save_file({"mine": torch.ones(1)}, name)
    mine, second = name.read_bytes(), name.with_name("model_int8_2.safetensors")
    for _ in range(2):
        out, report = quantize_file(model_file, Plan(8))
        assert out == second and name.read_bytes() == mine
        said = (
            "'model_int8.safetensors' is there already and was not written by SD3.5 Quantize; "
            "wrote 'model_int8_2.safetensors'."
        )
        assert report.text().endswith(said)
    assert {p.name for p in model_file.parent.iterdir()} == {model_file.name, name.name, out.name}


def not_a_model(path: Path, source: Path) -> None:
    path.write_bytes(b"no model")


def a_link_to_the_source(path: Path, source: Path) -> None:
    path.symlink_to(source)


def a_dangling_link(path: Path, source: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def a_pipe(path: Path, source: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path, source: Path) -> None:
    path.mkdir()


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes as POSIX has them")
@pytest.mark.parametrize(
    "put", [not_a_model, a_link_to_the_source, a_dangling_link, a_pipe, a_folder]
)
def test_whatever_has_the_name_stays_as_it_is(
    put: Callable[[Path, Path], None], model_file: Path
) -> None:
    name, source = model_file.with_name("model_int8.safetensors"), model_file.read_bytes()
    put(name, model_file)
    kind = stat.S_IFMT(name.lstat().st_mode)
    assert quantize_file(model_file, Plan(8))[0].name == "model_int8_2.safetensors"
    assert model_file.read_bytes() == source and stat.S_IFMT(name.lstat().st_mode) == kind
    assert not name.with_name("nowhere").exists()


def test_a_name_that_was_asked_for_is_refused_before_the_work(
    model_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = model_file.with_name("mine.safetensors")
    out.write_bytes(b"mine")
    with monkeypatch.context() as patch:
        patch.delattr(quantize, "quantized")
        assert main([str(model_file), "--out", str(out)]) == 1
        assert main([str(model_file), "--out", str(model_file)]) == 1
    assert "mine.safetensors' is there already and was not written by SD3.5 Q" in caplog.text
    assert "Choose another name, or move that file away" in caplog.text
    assert out.read_bytes() == b"mine"
    for _ in range(2):
        assert main([str(model_file), "--out", str(out.with_name("new"))]) == 0


def test_a_name_that_is_taken_during_the_work_stays_with_who_took_it(model_file: Path) -> None:
    name = model_file.with_name("model_int8.safetensors")

    def taken(done: int, total: int) -> None:
        name.write_bytes(b"mine")

    with pytest.raises(CheckpointError, match="int8.safetensors' is there already and was not rep"):
        quantize_file(model_file, Plan(8), on_layer=taken)
    assert name.read_bytes() == b"mine"


PRODUCT = """
import torch
from sd35_core.packing.layers import int8_product
x, codes = torch.ones(33, 512), torch.full((256, 512), 127, dtype=torch.int8)
print(int8_product(x, codes, torch.full((256, 1), 1 / 127)).sub(512).abs().max().item())
"""


@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX2", "AVX512_CORE"])
def test_an_int8_product_is_right_without_instructions_for_it(instructions: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT], cwd=PACK, check=True, capture_output=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}, encoding="utf-8",
    )  # fmt: skip
    assert float(done.stdout) < 0.01


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_an_int8_product_has_as_many_rows_as_cuda_asks_for(
    rows: int, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, seen = torch._int_mm, []  # pyright: ignore[reportPrivateImportUsage]

    def as_on_cuda(x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return product(x, y)

    monkeypatch.setattr(torch, "_int_mm", as_on_cuda)
    packed, x = pack(weight, INT8), torch.randn(rows, 512)
    out = int8_product(x, packed["weight"], packed["weight_scale"])
    assert out.shape == (rows, 256) and seen[0] > 16
    assert (out - F.linear(x, weight)).norm() / F.linear(x, weight).norm() < 0.03
