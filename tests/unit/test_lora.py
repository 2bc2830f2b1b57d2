"""LoRA: low-rank changes beside a network's layers, and their files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sd35_core.errors import SettingError
from sd35_core.network.config import MMDiTXConfig
from sd35_core.network.mmditx import MMDiTX
from sd35_core.packing.formats import INT8, VQ2, pack, unpack
from sd35_core.packing.layers import PackedOperations
from sd35_core.training.config import TrainingConfig
from sd35_core.training.lora import SPELLINGS, LoraLinear, LoraPlan, attach, spelled
from sd35_core.training.objective import flow_losses
from sd35_core.training.run import Run
from sd35_core.workflow.lora_files import lora_in
from sd35_core.workflow.setup import Model

from .models import random_weights

CONFIG = MMDiTXConfig(
    depth=3, hidden=128, context_dim=48, pooled_dim=40, pos_embed_max_size=8, qk_norm=True,
    dual_blocks=(0,),
)  # fmt: skip


def network(weights: dict[str, Tensor] | None = None, operations: object = None) -> MMDiTX:
    made = MMDiTX(CONFIG, operations, device="meta") if operations else MMDiTX(CONFIG)
    made.load_state_dict(weights or random_weights(CONFIG), assign=True)
    return made


def loss_of(model: MMDiTX) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(2, 16, 8, 8, generator=generator) for _ in range(2))
    context, y = torch.randn(2, 9, 48, generator=generator), torch.randn(2, 40, generator=generator)
    return flow_losses(model, x0, noise, torch.tensor([0.3, 0.7]), context, y).mean()


def moved(layers: dict[str, LoraLinear]) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers.values():
            layer.up.normal_(0, 0.02, generator=generator)
            layer.down.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        (LoraPlan(), 13),
        (LoraPlan(targets=("mlp",)), 10),
        (LoraPlan(blocks="0"), 6),
        (LoraPlan(blocks="2"), 3),
        (LoraPlan(targets=("attention", "mlp", "modulation"), blocks="1-2"), 17),
    ],
)
def test_a_plan_names_layers(plan: LoraPlan, count: int) -> None:
    """The last block's text hands over its q, k, v alone."""
    assert len(attach(network(), plan)) == count


def test_at_first_it_changes_nothing_and_it_alone_learns() -> None:
    model = network()
    before = loss_of(model)
    layers = attach(model, LoraPlan(rank=4))
    after = loss_of(model)
    assert torch.equal(before, after)
    after.backward()
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learning) == 2 * len(layers)
    assert all(re.search(r"\.(up|down)$", name) for name in learning)
    assert all(layer.up.grad is not None and layer.up.grad.any() for layer in layers.values())


def test_its_gradients_are_those_of_the_weights() -> None:
    """d up = scale dW down^T, d down = scale up^T dW (by the chain rule)."""
    whole, model = network(), network()
    layers = attach(model, LoraPlan(rank=4, alpha=8))
    moved(layers)
    with torch.no_grad():
        for name, layer in layers.items():
            weight = whole.get_parameter(f"{name}.weight")
            weight += layer.scale * layer.up @ layer.down
    ours, theirs = loss_of(model), loss_of(whole)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    ours.backward()
    theirs.backward()
    for name, layer in layers.items():
        gradient = whole.get_parameter(f"{name}.weight").grad
        assert gradient is not None and layer.up.grad is not None and layer.down.grad is not None
        for seen, wanted in (
            (layer.up.grad, layer.scale * gradient @ layer.down.T),
            (layer.down.grad, layer.scale * layer.up.T @ gradient),
        ):
            assert (seen - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("form", [INT8, VQ2])
def test_on_packed_weights_gradients_are_those_on_the_unpacked_ones(form: str) -> None:
    plain = random_weights(CONFIG)
    packed, unpacked = dict(plain), dict(plain)
    for key in [k for k in plain if re.search(r"(attn2?\.qkv|mlp\.fc1)\.weight$", k)]:
        entries = pack(plain[key], form)
        unpacked[key] = unpack(entries, form, torch.float32)
        del packed[key]
        packed |= {key.removesuffix("weight") + name: t for name, t in entries.items()}
    gradients = []
    for model in (network(packed, PackedOperations), network(unpacked)):
        layers = attach(model, LoraPlan(rank=4, targets=("attention", "mlp")))
        moved(layers)
        loss_of(model).backward()
        gradients.append([g for layer in layers.values() for g in (layer.up.grad, layer.down.grad)])
    for seen, wanted in zip(*gradients):
        assert seen is not None and wanted is not None
        assert (seen - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("stabilised", [False, True])
def test_files_hold_what_was_trained_at_strength_one(stabilised: bool) -> None:
    model = network()
    layers = attach(model, LoraPlan(4, 6.0, ("attention", "mlp"), rank_stabilised=stabilised))
    moved(layers)
    change = {name: layer.scale * layer.up @ layer.down for name, layer in layers.items()}
    kohya, comfyui = spelled(layers, 3, "kohya"), spelled(layers, 3, "comfyui")
    for name, wanted in change.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        assert kohya[f"{key}.alpha"] == 4
        seen = kohya[f"{key}.lora_up.weight"] @ kohya[f"{key}.lora_down.weight"]
        assert torch.allclose(seen, wanted, atol=1e-6)
        key = f"diffusion_model.{name}"
        seen = comfyui[f"{key}.lora_B.weight"] @ comfyui[f"{key}.lora_A.weight"]
        assert torch.allclose(seen, wanted, atol=1e-6)
    theirs = spelled(layers, 3)
    block = "transformer.transformer_blocks.0"
    parts = [
        theirs[f"{block}.attn.{part}.lora_B.weight"] @ theirs[f"{block}.attn.{part}.lora_A.weight"]
        for part in ("to_q", "to_k", "to_v")
    ]
    wanted = change["joint_blocks.0.x_block.attn.qkv"]
    assert torch.allclose(torch.cat(parts), wanted, atol=1e-6)
    assert f"{block}.ff_context.net.0.proj.lora_A.weight" in theirs
    assert not any("alpha" in key for key in theirs), "a strength of 1 is what was trained"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": ("norms",)}, r"lora_targets is \['norms'\]; known are attention"),
        ({"targets": ()}, "known are attention"),
        ({"rank": 0}, "lora_rank is 0"),
    ],
)
def test_a_plan_that_can_not_be_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        LoraPlan(**settings)  # pyright: ignore[reportArgumentType]


def test_blocks_that_are_not_there_are_named() -> None:
    with pytest.raises(SettingError, match="there is no layer 7"):
        attach(network(), LoraPlan(blocks="7"))


def test_it_learns_and_leaves_the_base(lora_config: TrainingConfig) -> None:
    run = Run(lora_config)
    base = {k: t.clone() for k, t in run.model.diffusion_model.state_dict().items()}
    losses = [run.advance() for _ in range(200)]
    assert sum(losses[-40:]) < 0.93 * sum(losses[:40])
    changed = {
        key
        for key, tensor in run.model.diffusion_model.state_dict().items()
        if not torch.equal(tensor, base[key])
    }
    assert changed == {key for key in base if key.endswith((".up", ".down"))}
    run.save()
    resumed = Run(lora_config)
    resumed.resume()
    assert resumed.advance() == run.advance(), "bit for bit"


def test_checkpoints_cost_time_alone(lora_config: TrainingConfig) -> None:
    gradients = []
    for checkpoint in (False, True):
        run = Run(replace(lora_config, checkpoint=checkpoint))
        run.batch_loss(torch.Generator().manual_seed(0)).backward()
        gradients.append([p.grad for p in run.learning.values()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_its_file_is_a_lora_that_the_check_knows(
    lora_config: TrainingConfig, tmp_path: Path, spelling: str
) -> None:
    run = Run(replace(lora_config, lora_keys=spelling))
    run.advance()
    file = tmp_path / "lora.safetensors"
    run.write_model(file)
    tensors = load_file(file)
    with run.averaged() as model:
        wanted = spelled(model.lora, 2, spelling)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[key].half()) for key, t in tensors.items())
    found = lora_in(file, Model(depth=2, hidden=128))
    assert found.matched == found.layers and found.layers is not None
    assert found.layers >= len(run.model.lora) > 0
