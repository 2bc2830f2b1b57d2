"""ComfyUI's own formats of packed weights, by its package comfy-kitchen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sd35_core.checkpoint.loading import load
from sd35_core.checkpoint.tensor_file import TensorFile
from sd35_core.errors import CheckpointError, SettingError
from sd35_core.packing import kitchen
from sd35_core.packing.formats import check_packed, pack, unpack
from sd35_core.packing.kitchen import CONVROT_INT8, CONVROT_W4A4, LAYOUTS, MXFP8, NVFP4
from sd35_core.packing.layers import PackedLinear
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantize_file, relative_error

from .models import TINY, random_inputs, random_weights

pytest.importorskip("comfy_kitchen")
WORST = {CONVROT_INT8: 0.012, MXFP8: 0.04, NVFP4: 0.12, CONVROT_W4A4: 0.18}


@pytest.fixture(params=[(192, 512), (2432, 2432), (96, 64)], ids=str)
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    return 0.03 * torch.randn(request.param, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", LAYOUTS)
def test_a_layer_is_packed_and_runs(form: str, weight: torch.Tensor) -> None:
    rows, columns = weight.shape
    packed = pack(weight, form)
    assert check_packed(packed, (rows, columns), "it") == form
    other = unpack(packed, form, torch.float32)
    assert WORST[form] / 4 < relative_error(weight, other) < WORST[form]
    layer = PackedLinear(columns, rows, bias=False, device="meta")
    layer.load_state_dict(packed, assign=True)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), F.linear(x, other))


def test_widths_that_256_does_not_divide_are_turned_by_64() -> None:
    assert [kitchen.group_for(columns) for columns in (1536, 2432, 64)] == [256, 64, 64]


@pytest.mark.parametrize("form", LAYOUTS)
def test_a_layer_of_another_shape_is_damaged(form: str) -> None:
    packed = pack(torch.randn(192, 512), form)
    with pytest.raises(CheckpointError, match="weight of shape"):
        check_packed(packed, (192, 1024), "it")
    del packed["weight_scale"]
    with pytest.raises(CheckpointError, match="weight_scale missing"):
        check_packed(packed, (192, 512), "it")


def test_groups_are_read_where_comfyui_reads_them() -> None:
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    packed = pack(weight, CONVROT_INT8)
    expected = unpack(packed, CONVROT_INT8, torch.float32)

    def marked(inner: str) -> dict[str, torch.Tensor]:
        text = f'{{"format": "int8_tensorwise", "params": {{"convrot": true{inner}}}}}'
        return {**packed, "comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)}

    elsewhere = marked(', "convrot_groupsize": 64')
    assert check_packed(elsewhere, (64, 192), "it") == CONVROT_INT8
    assert torch.equal(unpack(elsewhere, CONVROT_INT8, torch.float32), expected)
    for wrong in ("", ', "convrot_groupsize": 48', ', "convrot_groupsize": null'):
        with pytest.raises(CheckpointError, match="groups of"):
            check_packed(marked(wrong), (64, 192), "it")


def test_a_width_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingError, match="30 outputs and 512 inputs"):
        pack(torch.randn(30, 512), NVFP4)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(torch.randn(32, 64), NVFP4)
    monkeypatch.setattr(kitchen, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="the package comfy-kitchen, which is not installed"):
        pack(torch.randn(32, 64), NVFP4)
    with pytest.raises(CheckpointError, match="is packed as nvfp4"):
        check_packed(packed, (32, 64), "it")


@pytest.mark.parametrize(
    "plan", [Plan(8, CONVROT_INT8), Plan(8, MXFP8), Plan(4, four=NVFP4), Plan(4, four=CONVROT_W4A4)]
)
def test_a_file_is_packed_and_loads(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({k: t.half() for k, t in random_weights(TINY).items()}, path)
    out, report = quantize_file(path, plan)
    assert {layer.form for layer in report.layers} >= {plan.eight if plan.bits == 8 else plan.four}
    assert "pos_embed" in TensorFile(out), "as other programs expect it"
    inputs = random_inputs(TINY)
    with torch.no_grad():
        full, small = load(path, dtype=torch.float32), load(out, dtype=torch.float32)
        a, b = full(*inputs).flatten(), small(*inputs).flatten()
    assert torch.cosine_similarity(a, b, dim=0) > (0.999 if plan.bits == 8 else 0.95)


@pytest.mark.parametrize("key", ["scaled_fp8", "joint_blocks.0.x_block.attn.qkv.scale_weight"])
def test_scales_that_are_not_read_are_not_left_out(key: str, tmp_path: Path) -> None:
    """ComfyUI's scaled fp8 before it had comfy_quant: without its scales the weights are wrong."""
    path = tmp_path / "scaled.safetensors"
    save_file({**random_weights(TINY), key: torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="an older form of ComfyUI's"):
        load(path)
