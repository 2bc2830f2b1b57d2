"""Models, LoRAs, ControlNets and prompts with something on them, for tests in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sd35_core.network.config import MMDiTXConfig
from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from sd35_core.packing.formats import FP8, INT8
from sd35_core.packing.kitchen import CONVROT_INT8, CONVROT_W4A4, MXFP8, NVFP4
from sd35_core.quantization.plan import Plan
from tools.parity import weight

SMALL = MMDiTXConfig(
    depth=4,
    hidden=256,
    context_dim=4096,
    pooled_dim=2048,
    pos_embed_max_size=32,
    qk_norm=True,
    dual_blocks=(0, 1),
)


class Conds:
    """Random encoded prompts of SD3.5's widths, the same for every test."""

    def __init__(self, width: int = 4096, pooled: int = 2048):
        generator = torch.Generator().manual_seed(11)

        def cond(length: int) -> list[Any]:
            pooled_output = torch.randn(1, pooled, generator=generator)
            context = torch.randn(1, length, width, generator=generator)
            return [[context, {"pooled_output": pooled_output}]]

        self.positive, self.negative, self.longer = cond(77), cond(77), cond(154)


def difference(seen: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    assert seen.shape == expected.shape
    return float((seen - expected).abs().max() / expected.abs().max())


def lora(kind: str, rank: int = 4) -> dict[str, Tensor]:
    """The same change of three layers in a trainer's own key names."""
    generator = torch.Generator().manual_seed(3)

    def pair(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return (
            0.05 * torch.randn(rows, rank, generator=generator),
            torch.randn(rank, columns, generator=generator),
        )

    q, out, mlp = pair(256, 256), pair(256, 256), pair(1024, 256)
    empty = (torch.zeros(256, rank), torch.zeros(rank, 256))
    diffusers = {"attn.to_q": q, "attn.to_out.0": out, "ff.net.0.proj": mlp}
    if kind == "diffusers":
        prefix = "transformer.transformer_blocks.1."
        return {
            f"{prefix}{name}.lora_{side}.weight": weight
            for name, (up, down) in diffusers.items()
            for side, weight in (("B", up), ("A", down))
        }
    if kind == "onetrainer":
        prefix = "lora_transformer_transformer_blocks_1_"
        return {
            f"{prefix}{name.replace('.', '_')}.lora_{side}.weight": weight
            for name, (up, down) in diffusers.items()
            for side, weight in (("up", up), ("down", down))
        }
    qkv_up = torch.cat([q[0], empty[0], empty[0]])
    names = {"x_block_attn_qkv": (qkv_up, q[1]), "x_block_attn_proj": out, "x_block_mlp_fc1": mlp}
    return {
        f"lora_unet_joint_blocks_1_{name}.lora_{side}.weight": weight
        for name, (up, down) in names.items()
        for side, weight in (("up", up), ("down", down))
    }


def hooked(comfy: SimpleNamespace, conds: Conds, strength: float = 1.0) -> list[Any]:
    """The positive prompt with the LoRA attached to it alone."""
    import comfy.hooks as hooks

    group = hooks.create_hook_lora(lora("kohya"), strength, 0.0)
    return hooks.set_conds_props([conds.positive], 1.0, "default", hooks=group)[0]


def partially_loaded(model: Any, budget: int) -> Any:
    """A clone with `budget` bytes of weights loaded, the rest cast when used."""
    clone = model.clone()
    clone.load_device = torch.device("cpu")
    clone.model.to("cpu")
    clone.load(torch.device("cpu"), lowvram_model_memory=budget, full_load=False)
    return clone


def count_calls(model: Any) -> list[int]:
    """The batch sizes of the network's own runs, as they come."""
    calls: list[int] = []
    model.model.diffusion_model.x_embedder.register_forward_hook(
        lambda module, inputs, output: calls.append(len(output))
    )
    return calls


def skipping(comfy: SimpleNamespace, model: Any, layers: str = "1, 2", **settings: Any) -> Any:
    values = {"scale": 2.5, "start": 0.01, "end": 0.5, **settings}
    return comfy.guidance.SkipLayerGuidance.execute(model, layers, **values).result[0]


def stock_skipping(model: Any, layers: str = "1, 2", end: float = 0.5) -> Any:
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(model, 2.5, 0.01, end, double_layers=layers).result[0]


def area(cond: list[Any], x: float, **more: Any) -> list[Any]:
    """The cond on the left or right half only."""
    values = {
        "area": ("percentage", 1.0, 0.5, 0.0, x),
        "strength": 1.0,
        "set_area_to_bounds": False,
    }
    return [[c, {**d, **values, **more}] for c, d in cond]


def masked(cond: list[Any]) -> list[Any]:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    return [
        [c, {**d, "mask": mask, "mask_strength": 0.8, "set_area_to_bounds": False}] for c, d in cond
    ]


def cases(conds: Conds) -> dict[str, dict[str, Any]]:
    return {
        "plain": {},
        "cfg 1": {"cfg": 1.0},
        "batch": {"latent": {"samples": torch.zeros(3, 16, 16, 12)}},
        "unequal lengths": {"negative": conds.longer},
        "long prompt": {"positive": conds.longer},
        "areas": {"positive": area(conds.positive, 0.0) + area(conds.longer, 0.5) + conds.negative},
        "mask": {"positive": masked(conds.positive) + conds.longer},
        "two prompts": {"positive": conds.positive + conds.longer},
        "range": {
            "positive": [
                [c, {**d, "start_percent": 0.1, "end_percent": 0.6}] for c, d in conds.positive
            ]
            + conds.longer
        },
        "inpaint": {
            "latent": {
                "samples": torch.ones(1, 16, 16, 16),
                "noise_mask": torch.nn.functional.pad(torch.ones(1, 1, 64, 128), (0, 0, 0, 64)),
            }
        },
        "image to image": {"latent": {"samples": torch.ones(1, 16, 16, 16)}},
    }


KINDS = {"canny 8b": ("8b", 1), "canny 2b": ("2b", 1), "depth 2b": ("2b", 2), "blur 8b": ("8b", 0)}


def embedder_tensors(kind: str, control_type: int | None, hidden: int = SMALL.hidden) -> Any:
    pooled = hidden if kind == "2b" else SMALL.pooled_dim
    config = ControlNetConfig(kind, 2, hidden, pooled)  # pyright: ignore[reportArgumentType]
    model = ControlNetEmbedder(config, device="meta")
    tensors = {k: weight(7, k, tuple(t.shape)) for k, t in model.state_dict().items()}
    if control_type is not None:
        tensors["control_type"] = torch.tensor([control_type], dtype=torch.int32)
    return tensors


def small_layers(kind: str, hidden: int) -> dict[str, Tensor]:
    """A whole ControlNet of one layer with a published model's width, of zeros."""
    pooled = hidden if kind == "2b" else SMALL.pooled_dim
    config = ControlNetConfig(kind, 1, hidden, pooled)  # pyright: ignore[reportArgumentType]
    model = ControlNetEmbedder(config, device="meta")
    return {k: torch.zeros(t.shape, dtype=torch.float16) for k, t in model.state_dict().items()}


def adaln_lora() -> dict[str, Tensor]:
    """A LoRA of the weights that rest, and of others."""
    generator = torch.Generator().manual_seed(4)
    name = "lora_unet_joint_blocks_2_x_block_adaLN_modulation_1"
    up, down = (torch.randn(s, generator=generator) for s in ((6 * 256, 4), (4, 256)))
    return {**lora("kohya"), f"{name}.lora_up.weight": 0.02 * up, f"{name}.lora_down.weight": down}


OF_THE_HOST = {
    "int8 convrot": Plan(8, CONVROT_INT8),
    "mxfp8": Plan(8, MXFP8),
    "nvfp4": Plan(4, four=NVFP4),
    "convrot w4a4": Plan(4, four=CONVROT_W4A4),
}
PLANS = {
    "int8": Plan(8, INT8), "fp8": Plan(8, FP8), "4 bit": Plan(4), "3 bit": Plan(3, INT8, 3),
    "2 bit": Plan(2, INT8), **OF_THE_HOST,
}  # fmt: skip


def skip_unless_known(name: str) -> None:
    """Skip a format of the host's own where the host is older."""
    from comfy.quant_ops import QUANT_ALGOS

    plan = OF_THE_HOST.get(name)
    form = "" if plan is None else (plan.eight if plan.bits == 8 else plan.four)
    if form and form.removesuffix(" with convrot") not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI knows no {form}")


def sampled(comfy: SimpleNamespace, model: Any, conds: Any) -> torch.Tensor:
    """Two latents of SD35Sampler."""
    node, latent = comfy.sampler.SD35Sampler, {"samples": torch.zeros(2, 16, 8, 8)}
    prompts = conds.positive, conds.negative
    out = node.execute(model, *prompts, latent, 1, 2, 4.0, 3.0, "euler", "simple", 1.0)
    return out.result[0]["samples"]
