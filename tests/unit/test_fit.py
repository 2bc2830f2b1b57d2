"""A format for each layer, chosen so that the model fits a size."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd35_core.checkpoint.loading import load
from sd35_core.checkpoint.tensor_file import TensorFile
from sd35_core.errors import SettingError
from sd35_core.network.mmditx import MMDiTX
from sd35_core.packing.formats import (
    FP8,
    INT8,
    RAW_FP8,
    VQ2,
    VQ4,
    pack,
    packed_bytes,
    packed_entries,
)
from sd35_core.packing.kitchen import LAYOUTS
from sd35_core.quantization.calibration import Calls, moments_of, recorded
from sd35_core.quantization.fit import TRIED, Choice, check_size, curve, fitted_plan, halves, solved
from sd35_core.quantization.influence import influence
from sd35_core.quantization.plan import Fitted, Plan, fitted_in
from sd35_core.quantization.quantize import network_of, quantize_file

from .models import TINY, random_inputs, random_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "model.safetensors"
    save_file({k: t.half() for k, t in random_weights(TINY).items()}, path)
    return path


@pytest.fixture(scope="module")
def seen(model_file: Path) -> tuple[MMDiTX, Calls]:
    network = load(model_file, dtype=torch.float32)
    with recorded(network) as calls, torch.no_grad():
        for step in range(4):
            network(*random_inputs(TINY, batch=4, seed=step))
    return network, calls


def plan_for(model_file: Path, seen: tuple[MMDiTX, Calls], size: int) -> Fitted:
    network, calls = seen
    tensors, _ = network_of(TensorFile(model_file), "it")
    moved = influence(network, calls, CPU)
    return fitted_plan(tensors, size, moved, halves(network, calls, CPU))


def test_influence_is_what_an_error_of_a_layer_does_to_the_output(
    seen: tuple[MMDiTX, Calls],
) -> None:
    """Measured by rounding a layer's weight and running the whole model."""
    network, calls = seen
    moved = influence(network, calls, CPU)
    layers = dict(network.named_modules())
    assert set(moved) == {
        f"{name}.weight"
        for name, layer in layers.items()
        if isinstance(layer, torch.nn.Linear) and name.startswith("joint_blocks.")
    }
    inputs = calls[0].x, calls[0].timestep, calls[0].context, calls[0].y
    ratios = []
    with torch.no_grad():
        expected = network(*inputs)
        for key in ("joint_blocks.0.x_block.mlp.fc2", "joint_blocks.2.x_block.attn.proj",
                    "joint_blocks.1.context_block.mlp.fc2"):  # fmt: skip
            layer = layers[key]
            assert isinstance(layer, torch.nn.Linear)
            before = layer.weight.clone()
            outputs: list[torch.Tensor] = []
            handle = layer.register_forward_hook(lambda m, i, o, outputs=outputs: outputs.append(o))
            network(*inputs)
            noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
            layer.weight.copy_(before + 0.05 * before.square().mean().sqrt() * noise)
            change = (network(*inputs) - expected).norm() / expected.norm()
            handle.remove()
            layer.weight.copy_(before)
            error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
            ratios.append(float(change / error) / moved[f"{key}.weight"] ** 0.5)
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios


def test_the_solver_finds_the_best_plan() -> None:
    """Against all plans, at every size where the curves allow it, and near it elsewhere."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for number in range(5):
        scale = float(torch.rand(1, generator=generator)) * 10 + 0.1
        sizes = [10 * (number + 1) * bits for bits in (2, 3, 4, 8)]
        layers[f"{number}"] = [
            Choice(form, size, scale * 4.0**-bits)
            for form, size, bits in zip(TRIED, sizes, (2, 3, 4, 8))
        ]
    plans = list(itertools.product(*layers.values()))
    sums = [(sum(c.size for c in plan), sum(c.error for c in plan)) for plan in plans]
    smallest = min(size for size, _ in sums)
    for size in range(smallest, max(size for size, _ in sums) + 1, 25):
        chosen = solved(layers, size)
        assert sum(choice.size for choice in chosen.values()) <= size
        best = min(error for taken, error in sums if taken <= size)
        assert sum(choice.error for choice in chosen.values()) < 1.6 * best + 1e-9
    exact = solved(layers, max(size for size, _ in sums))
    assert {choice.form for choice in exact.values()} == {INT8}
    with pytest.raises(SettingError, match="smallest that can be made of it is"):
        solved(layers, smallest - 1)


def test_what_is_larger_and_no_better_is_never_chosen() -> None:
    worse = [Choice("a", 10, 1.0), Choice("b", 20, 2.0), Choice("c", 30, 0.9), Choice("d", 40, 0.0)]
    assert [choice.form for choice in curve(worse)] == ["a", "d"]


def test_layers_that_matter_get_the_bits(model_file: Path, seen: tuple[MMDiTX, Calls]) -> None:
    whole = model_file.stat().st_size
    plans = [plan_for(model_file, seen, round(share * whole)) for share in (0.3, 0.4, 0.5)]
    assert all(plan.taken <= plan.size for plan in plans)
    errors = [plan.error for plan in plans]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.3 * errors[-1]
    assert len(set(plans[1].forms.values())) > 1


def test_it_is_nearer_than_the_same_bytes_everywhere(
    model_file: Path, seen: tuple[MMDiTX, Calls]
) -> None:
    network, calls = seen
    inputs = random_inputs(TINY, batch=8, seed=9)
    errors = {}
    with torch.no_grad():
        expected = network(*inputs)
        flat, report = quantize_file(model_file, Plan(4, INT8, 4), moments_of(network, calls, CPU))
        plan = plan_for(model_file, seen, report.after)
        out, fit = quantize_file(model_file, plan, moments_of(network, calls, CPU))
        assert fit.after <= report.after * 1.01
        for name, path in (("flat", flat), ("fitted", out)):
            error = load(path, dtype=torch.float32)(*inputs) - expected
            errors[name] = float(error.norm() / expected.norm())
    assert errors["fitted"] < errors["flat"], errors


def test_a_plan_is_kept_in_the_file_and_used_again(
    model_file: Path, seen: tuple[MMDiTX, Calls], tmp_path: Path
) -> None:
    plan = plan_for(model_file, seen, round(0.4 * model_file.stat().st_size))
    first, report = quantize_file(model_file, plan, out=tmp_path / "first.safetensors")
    assert fitted_in(first) == plan
    again, _ = quantize_file(model_file, fitted_in(first), out=tmp_path / "again.safetensors")
    a, b = TensorFile(first), TensorFile(again)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert plan.text().startswith("Plan for ") and "mlp.fc2: " in plan.text()
    assert report.text().startswith("fitted to ")
    with pytest.raises(SettingError, match="keeps no plan"):
        fitted_in(model_file)
    smaller = Fitted({next(iter(plan.forms)): VQ2}, 1, 1, 0.0)
    with pytest.raises(SettingError, match="a model of another size"):
        quantize_file(model_file, smaller, out=tmp_path / "other.safetensors")


def test_a_size_is_that_of_the_file_with_its_table_as_axes(
    seen: tuple[MMDiTX, Calls], tmp_path: Path
) -> None:
    weights = {k: t.half() for k, t in random_weights(TINY).items()}
    rows = torch.randn(2, 16, 64).half()
    table = torch.cat([rows[0][None].expand(16, -1, -1), rows[1][:, None].expand(-1, 16, -1)], -1)
    path = tmp_path / "model.safetensors"
    save_file({**weights, "pos_embed": table.reshape(1, 256, 128).contiguous()}, path)
    plan = plan_for(path, seen, round(0.35 * path.stat().st_size))
    _, report = quantize_file(path, plan, out=tmp_path / "out.safetensors")
    assert report.after == pytest.approx(plan.taken, rel=1e-3)


def test_what_can_not_be_fitted_is_said_before_anything_is_measured(
    model_file: Path, seen: tuple[MMDiTX, Calls], tmp_path: Path
) -> None:
    tensors, _ = network_of(TensorFile(model_file), "it")
    check_size(tensors, model_file.stat().st_size)
    with pytest.raises(SettingError, match="smallest that can be made of it is"):
        check_size(tensors, 1000)
    packed, _ = quantize_file(model_file, Plan(4), out=tmp_path / "packed.safetensors")
    tensors, _ = network_of(TensorFile(packed), "it")
    with pytest.raises(SettingError, match="quantized already"):
        check_size(tensors, 10**9)
    network, calls = seen
    with pytest.raises(SettingError, match="recorded 1 calls"):
        halves(network, calls[:1], CPU)


def test_a_size_is_checked_without_reading_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    prefix = "model.diffusion_model."
    save_file({prefix + k: t.half() for k, t in random_weights(TINY).items()}, path)
    tensors, _ = network_of(TensorFile(path), "it")
    read: list[str] = []
    whole = TensorFile.__getitem__
    monkeypatch.setattr(TensorFile, "__getitem__", lambda f, k: read.append(k) or whole(f, k))
    check_size(tensors, path.stat().st_size)
    assert not [k for k in read if k.endswith("mlp.fc1.weight")] and read


def test_a_plan_without_calibration_says_so_in_the_name() -> None:
    plan = Fitted({}, 2 * 10**9, 0, 0.0)
    assert plan.words(True) == "2gb" and plan.words(False) == "2gb_datafree"


def test_bytes_are_counted_as_they_are_packed() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for form in (*TRIED, FP8, RAW_FP8, *LAYOUTS):
        packed = pack(weight, form)
        size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        assert packed_bytes(form, (64, 256)) == size, form
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()}
        assert packed_entries(form, (64, 256)) == found
    assert packed_bytes(VQ4, (64, 256)) < packed_bytes(INT8, (64, 256))
