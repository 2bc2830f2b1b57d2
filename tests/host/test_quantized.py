"""Packed models and ControlNets under the host: exact against their own unpacked weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_core.checkpoint.loading import load
from sd35_core.packing.formats import INT8, RAW_FP8, VQ2, format_of, packed_under, unpack
from sd35_core.packing.kitchen import MXFP8
from sd35_core.packing.layers import adds_exactly
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantize_file

from ..conftest import NANO
from .cases import (
    KINDS,
    OF_THE_HOST,
    PLANS,
    Conds,
    difference,
    embedder_tensors,
    hooked,
    lora,
    partially_loaded,
    skip_unless_known,
)


def unpacked(path: Path, out: Path) -> Path:
    """A file with the weights that another one's packed layers stand for."""
    tensors = load_file(path)
    layers = [k.removesuffix("comfy_quant") for k in tensors if k.endswith(".comfy_quant")]
    for layer in layers:
        packed = packed_under(tensors, layer)
        weight = unpack(packed, format_of(packed, layer), torch.float32)
        for name in packed:
            del tensors[layer + name]
        tensors[layer + "weight"] = weight
    assert layers
    save_file({k: t.contiguous() for k, t in tensors.items()}, out)
    return out


@pytest.fixture(scope="session")
def dense(quantized: dict[str, Path]) -> dict[str, Path]:
    """The same, unpacked."""
    return {n: unpacked(p, p.with_name(f"{n} dense.safetensors")) for n, p in quantized.items()}


@pytest.fixture
def models(comfy: SimpleNamespace, quantized: Any, dense: Any) -> Any:
    """name -> the packed model and its unpacked twin."""

    def load(name: str) -> tuple[Any, Any]:
        skip_unless_known(name)
        files = (quantized[name], dense[name])
        return tuple(comfy.loading.load_model(str(f), "default") for f in files)

    return load


@pytest.mark.parametrize("name", list(PLANS))
def test_a_packed_model_draws_what_its_unpacked_weights_draw(
    name: str, models: Any, ksampler: Any
) -> None:
    model, twin = models(name)
    assert type(model.model.diffusion_model.joint_blocks[1].x_block.mlp.fc1.weight) is not Tensor
    assert torch.equal(ksampler(model), ksampler(twin))


@pytest.mark.parametrize(("name", "most"), [("fp8", 1e-5), ("int8", 0.05)])
def test_8_bits_in_the_stock_loader_give_the_same_latents(
    name: str, most: float, comfy: SimpleNamespace, quantized: Any, models: Any, ksampler: Any,
    ours: Any,
) -> None:  # fmt: skip
    """Of int8 the stock loader rounds the inputs as well, which cannot be switched off there, and
    on a processor without VNNI torch adds its products wrongly."""
    from comfy.quant_ops import QUANT_ALGOS

    if name == "int8" and INT8 not in QUANT_ALGOS:
        pytest.skip("this ComfyUI's own loader knows no int8")
    stock = comfy.sd.load_diffusion_model(str(quantized[name]))
    seen = ksampler(models(name)[0])
    assert difference(seen, ksampler(stock)) < (most if adds_exactly("cpu") else 2 * most)
    assert 1e-5 < difference(seen, ksampler(ours)) < 0.5


@pytest.mark.parametrize("name", list(OF_THE_HOST))
def test_the_hosts_formats_in_the_stock_loader_are_the_same_weights(
    name: str, comfy: SimpleNamespace, quantized: Any, models: Any, ksampler: Any, ours: Any
) -> None:
    """What the stock loader rounds beside them, inputs of products, makes the rest."""
    model, _ = models(name)
    stock = comfy.sd.load_diffusion_model(str(quantized[name]))
    key = "joint_blocks.1.x_block.mlp.fc1.weight"
    weights = [m.model.diffusion_model.get_parameter(key).dequantize() for m in (model, stock)]
    assert torch.equal(*weights)
    seen = ksampler(model)
    assert difference(seen, ksampler(stock)) < 2 * difference(seen, ksampler(ours))


def test_a_format_that_the_host_is_too_old_for_is_named(
    comfy: SimpleNamespace, quantized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(comfy.quant_algos, MXFP8, raising=False)
    with pytest.raises(Exception, match="does not read the format mxfp8; it reads .*float8_e4m3fn"):
        comfy.loading.load_model(str(quantized["mxfp8"]), "default")


def test_the_hosts_other_formats_load_as_in_the_stock_loader(
    comfy: SimpleNamespace, small: Path, ksampler: Any, tmp_path: Path
) -> None:
    """Formats that the host knows and this pack does not make: fp8 e5m2."""
    tensors = load_file(small)
    for key in [k for k in tensors if k.endswith("mlp.fc1.weight")]:
        prefix = key.removesuffix("weight")
        tensors[key] = tensors[key].to(torch.float8_e5m2)
        tensors[prefix + "weight_scale"] = torch.tensor(1.5)
        text = b'{"format": "float8_e5m2", "full_precision_matrix_mult": true}'
        tensors[prefix + "comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    path = tmp_path / "e5m2.safetensors"
    save_file(tensors, path)
    seen = ksampler(comfy.loading.load_model(str(path), "default"))
    assert difference(seen, ksampler(comfy.sd.load_diffusion_model(str(path)))) < 1e-5


def test_2_bits_in_the_stock_loader_fail_loudly(comfy: SimpleNamespace, quantized: Any) -> None:
    with pytest.raises(Exception, match=VQ2):
        comfy.sd.load_diffusion_model(str(quantized["2 bit"]))


@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("how", ["whole", "partial", "hook"])
def test_a_lora_acts_as_on_the_unpacked_weights(
    name: str, how: str, comfy: SimpleNamespace, models: Any, ksampler: Any, conds: Conds
) -> None:
    def draw(model: Any) -> Tensor:
        if how == "hook":
            return ksampler(model, positive=hooked(comfy, conds))
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora("kohya"), 1.0, 0)
        return ksampler(partially_loaded(patched, 2_000_000) if how == "partial" else patched)

    model, twin = models(name)
    without = ksampler(model)
    seen = draw(model)
    assert difference(seen, draw(twin)) < (1e-6 if how == "hook" else 1e-30)
    assert difference(seen, without) > 1e-3
    assert torch.equal(ksampler(model), without), "the LoRA is gone with its node"


@pytest.mark.parametrize("budget", [1, 200_000, 2_000_000])
def test_partial_loads_give_identical_latents(budget: int, models: Any, ksampler: Any) -> None:
    model, _ = models("2 bit")
    assert torch.equal(ksampler(partially_loaded(model, budget)), ksampler(model))


@pytest.mark.parametrize("name", list(PLANS))
def test_a_saved_model_is_the_same_model(
    name: str, comfy: SimpleNamespace, models: Any, ksampler: Any, tmp_path: Path
) -> None:
    model, _ = models(name)
    saved = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(saved), model)
    again = comfy.loading.load_model(str(saved), "default")
    assert torch.equal(ksampler(again), ksampler(model))


def test_saving_or_merging_into_2_bits_is_refused(
    comfy: SimpleNamespace, models: Any, tmp_path: Path
) -> None:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model, twin = models("2 bit")
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora("kohya"), 1.0, 0)
    merged = ModelMergeSimple().merge(model, twin, 0.5)[0]
    for changed in (patched, merged):
        with pytest.raises(Exception, match="can't be saved with a LoRA or a merge"):
            comfy.sd.save_checkpoint(str(tmp_path / "no.safetensors"), changed)


def test_a_merge_of_packed_weights_draws_as_one_of_unpacked(
    comfy: SimpleNamespace, models: Any, ours: Any, ksampler: Any
) -> None:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model, twin = models("2 bit")
    seen, expected = (ksampler(ModelMergeSimple().merge(m, ours, 0.5)[0]) for m in (model, twin))
    assert difference(seen, expected) < 1e-6


@pytest.fixture(scope="session")
def packed_controls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A random ControlNet of each kind at 2 bits, and unpacked."""
    folder = tmp_path_factory.mktemp("controls")
    found = {}
    for name in ("canny 8b", "depth 2b"):
        full = folder / f"{name}.safetensors"
        save_file(embedder_tensors(*KINDS[name]), full)
        out, _ = quantize_file(full, PLANS["2 bit"], out=folder / f"{name} 2 bit.safetensors")
        found[name] = (out, unpacked(out, folder / f"{name} dense.safetensors"))
    return found


@pytest.mark.parametrize("name", ["canny 8b", "depth 2b"])
def test_packed_controlnets_and_bases_steer_as_unpacked_ones(
    name: str, comfy: SimpleNamespace, packed_controls: Any, models: Any, ours: Any, ksampler: Any,
    conds: Conds,
) -> None:  # fmt: skip
    vae = comfy.loading.vae_from(comfy.loading.read(NANO))
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))

    def draw(model: Any, path: Path) -> Tensor:
        host = comfy.host_controlnet
        control = host.controlnet_from(comfy.loading.read(path), host.Options())
        out = comfy.controlnet.SD35ControlNetApply.execute(
            conds.positive, conds.negative, control, vae, picture, 0.8, 0.0, 1.0
        ).result
        return ksampler(model, positive=out[0], negative=out[1])

    packed, dense = packed_controls[name]
    model, twin = models("2 bit")
    assert torch.equal(draw(ours, packed), draw(ours, dense))
    assert torch.equal(draw(model, dense), draw(twin, dense))
    assert difference(draw(ours, packed), ksampler(ours)) > 1e-3


@pytest.mark.parametrize("name", ["canny 8b", "depth 2b"])
def test_raw_fp8_controlnets_load_everywhere(
    name: str, comfy: SimpleNamespace, packed_controls: Any, tmp_path: Path
) -> None:
    """In the host's own loader, which reads no scales, and here: the same weights."""
    from comfy.controlnet import load_controlnet as load_stock

    full = packed_controls[name][0].with_name(f"{name}.safetensors")
    raw, _ = quantize_file(full, Plan(8, RAW_FP8), out=tmp_path / "raw.safetensors")
    host = comfy.host_controlnet
    ours = host.controlnet_from(comfy.loading.read(raw), host.Options()).control_model
    stock = load_stock(str(raw)).control_model
    key, original = "transformer_blocks.1.mlp.fc1.weight", load_file(full)
    seen = ours.state_dict()[key].float()
    assert torch.equal(seen, stock.state_dict()[key].float())
    assert 0.01 < difference(seen, original[key]) < 0.1


def test_quantizing_twice_and_newer_formats_are_refused(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    for path in quantized.values():
        with pytest.raises(Exception, match="quantized already"):
            quantize_file(path, Plan(8))
    tensors = load_file(quantized["2 bit"])
    key = next(k for k in tensors if k.endswith("mlp.fc1.comfy_quant"))
    text = bytes(tensors[key].tolist()).replace(b'"version": 1', b'"version": 2')
    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
    newer = tmp_path / "newer.safetensors"
    save_file(tensors, newer)
    with pytest.raises(Exception, match="version 2. Known here are"):
        load(newer)
