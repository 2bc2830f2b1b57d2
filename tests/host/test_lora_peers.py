"""A LoRA as others have it: peft's gradients on diffusers' transformer, and one file in ComfyUI's
loader, on its model and on ours, and in diffusers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_core.network.config import MMDiTXConfig
from sd35_core.network.mmditx import MMDiTX
from sd35_core.training.lora import TARGETS, LoraLinear, LoraPlan, attach, spelled
from sd35_core.training.objective import flow_losses
from tools import bench_peers

from ..unit.models import TINY, random_weights
from .cases import SMALL, Conds, difference

pytestmark = pytest.mark.slow


def trained(config: MMDiTXConfig, targets: tuple[str, ...]) -> tuple[MMDiTX, dict[str, LoraLinear]]:
    """A network with a LoRA that changes it."""
    network = MMDiTX(config)
    network.load_state_dict(random_weights(config))
    layers = attach(network, LoraPlan(rank=4, alpha=8.0, targets=targets))
    generator = torch.Generator().manual_seed(2)
    for layer in layers.values():
        layer.up.data.normal_(0, 0.05, generator=generator)
        layer.down.data.normal_(0, 0.1, generator=generator)
    return network, layers


def in_diffusers(config: MMDiTXConfig, tensors: dict[str, Tensor]) -> Any:
    """diffusers' transformer of the same weights, which has read a LoRA with peft."""
    bench_peers.fetched("peft", bench_peers.PEFT)
    network = bench_peers.diffusers_network(config, random_weights(config), "cpu")
    network.load_lora_adapter(tensors, prefix="transformer")
    return network


def parts_of(network: Any) -> dict[str, Any]:
    """A LoRA's parameters under the names of its file."""
    return {
        f"transformer.{name}".replace(".default_0.", "."): parameter
        for name, parameter in network.named_parameters()
        if ".lora_" in name
    }


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_are_those_of_peft_on_diffusers_transformer(target: str) -> None:
    """The loss by its formula; our joint layers' parts are added or put together."""
    ours, layers = trained(TINY, (target,))
    theirs = in_diffusers(TINY, spelled(layers, TINY.depth))
    parts = parts_of(theirs)
    assert parts.keys() == spelled(layers, TINY.depth).keys()
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(2, 16, 8, 12, generator=generator) for _ in range(2))
    context = torch.randn(2, 9, TINY.context_dim, generator=generator)
    y, sigma = torch.randn(2, TINY.pooled_dim, generator=generator), torch.tensor([0.3, 0.7])
    with torch.enable_grad():
        for parameter in parts.values():
            parameter.requires_grad_(True)
        loss = flow_losses(ours, x0, noise, sigma, context, y).mean()
        share = sigma[:, None, None, None]
        x = (1 - share) * x0 + share * noise
        velocity = theirs(x, context, y, 1000 * sigma, return_dict=False)[0]
        wanted = (velocity - (noise - x0)).square().mean()
        loss.backward()
        wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    last = f"joint_blocks.{TINY.depth - 1}.context_block.adaLN_modulation.1"
    worst = 0.0
    for name, layer in layers.items():
        keys = spelled({name: layer}, TINY.depth)
        ups = [parts[key].grad for key in keys if ".lora_B." in key]
        downs = [parts[key].grad for key in keys if ".lora_A." in key]
        up = torch.cat(ups) * layer.scale
        if name == last:  # diffusers has (scale, shift)
            up = torch.cat(up.chunk(2)[::-1])
        for seen, expected in ((layer.up.grad, up), (layer.down.grad, sum(downs))):
            assert isinstance(seen, Tensor) and isinstance(expected, Tensor)
            assert expected.norm() > 0
            worst = max(worst, float((seen - expected).norm() / expected.norm()))
    assert worst < 1e-5, worst


def test_one_file_draws_the_same_in_every_reader(
    comfy: SimpleNamespace, ours: Any, stock: Any, base: Path, conds: Conds,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """With every kind of layer, at strength 1; x - sigma v is what ComfyUI's model gives."""
    network, layers = trained(SMALL, tuple(TARGETS))
    file = base / "models" / "loras" / "peers.safetensors"
    save_file(spelled(layers, SMALL.depth), file)
    x = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(0))
    context, y = conds.positive[0][0], conds.positive[0][1]["pooled_output"]
    level = torch.tensor([0.7])
    wanted = x - 0.7 * network(x, 1000 * level, context, y)
    drawn = {}
    for name, model in (("ours", ours), ("stock", stock)):
        patched = comfy.stock.LoraLoaderModelOnly().load_lora_model_only(model, file.name, 1.0)[0]
        changed = {key for key, _ in patched.model.named_parameters() if key in patched.patches}
        assert len(changed) == len(patched.patches) == len(layers), name
        patched.patch_model(device_to=torch.device("cpu"))
        drawn[name] = patched.model.apply_model(x, level, c_crossattn=context, y=y)
        patched.unpatch_model(device_to=torch.device("cpu"))
    theirs = in_diffusers(SMALL, load_file(file))
    assert parts_of(theirs).keys() == load_file(file).keys()
    velocity = theirs(x, context, y, 1000 * level, return_dict=False)[0]
    drawn["diffusers"] = x - 0.7 * velocity
    away = {name: difference(seen, wanted) for name, seen in drawn.items()}
    assert max(away.values()) < 1e-4, away
    plain = x - 0.7 * bare()(x, 1000 * level, context, y)
    assert difference(plain, wanted) > 1e-2
    said = [record.getMessage().lower() for record in caplog.records]
    assert not [line for line in said if "not loaded" in line or "unexpected" in line]


def bare() -> MMDiTX:
    network = MMDiTX(SMALL)
    network.load_state_dict(random_weights(SMALL))
    return network
