"""SD3.5's network as others have it, with the same weights: what tools/bench.py compares with.

ComfyUI's own model comes with the host. diffusers is fetched into the cache once, and for tests of
LoRAs peft; they are not needed for anything else.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd35_core.checkpoint.layouts import JOINED_IN_BLOCK, RENAMED, RENAMED_IN_BLOCK
from sd35_core.checkpoint.tensor_file import StateDict
from sd35_core.network.config import HEAD_WIDTH, MMDiTXConfig
from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from tools import install

DIFFUSERS = ["diffusers==0.42.1", "importlib_metadata==10.2.0", "zipp==4.1.2"]
PEFT = ["peft==0.21.2", "accelerate==1.15.0"]
"""What diffusers reads LoRAs with."""

Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, timestep, context, y) -> velocity."""


def ours(config: MMDiTXConfig, weights: StateDict, device: Any) -> Any:
    """The pack's network as the host runs it."""
    import comfy.ops
    from sd35_pack.nodes.host.network import HostMMDiTX  # pyright: ignore[reportMissingImports]

    dtype = weights["x_embedder.proj.weight"].dtype
    network = HostMMDiTX(config, comfy.ops.disable_weight_init, dtype, "meta")
    return filled(network, weights, device)


def ours_controlnet(config: ControlNetConfig, weights: StateDict, device: Any) -> Any:
    """The pack's ControlNet as the host runs it."""
    import comfy.ops
    from sd35_pack.nodes.host import processor  # pyright: ignore[reportMissingImports]

    operations = processor.faster(comfy.ops.disable_weight_init)
    dtype = weights["x_embedder.proj.weight"].dtype
    return filled(ControlNetEmbedder(config, operations, dtype, "meta"), weights, device)


def host_model(path: Path, modulation_cache: str) -> Any:
    """The pack's MODEL of a file."""
    from sd35_pack.nodes.host import loading  # pyright: ignore[reportMissingImports]

    return loading.load_model(str(path), "default", modulation_cache)


def comfyui(config: MMDiTXConfig, weights: StateDict, device: Any) -> Any:
    """ComfyUI's own network."""
    import comfy.ldm.modules.diffusionmodules.mmdit as stock
    import comfy.ops

    context = {"in_features": config.context_dim, "out_features": config.hidden}
    network = stock.OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        depth=config.heads,
        num_blocks=config.depth,
        adm_in_channels=config.pooled_dim,
        context_embedder_config={"target": "torch.nn.Linear", "params": context},
        pos_embed_max_size=config.pos_embed_max_size,
        num_patches=config.pos_embed_max_size**2,
        qk_norm="rms" if config.qk_norm else None,
        x_block_self_attn_layers=list(config.dual_blocks),
        dtype=weights["x_embedder.proj.weight"].dtype,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    return filled(network, weights, device)


def comfyui_controlnet(
    config: ControlNetConfig, weights: StateDict, depth: int, device: Any
) -> Any:
    """ComfyUI's own ControlNet."""
    import comfy.cldm.dit_embedder
    import comfy.ops

    network = comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None,  # pyright: ignore[reportArgumentType]
        patch_size=config.patch_size,
        in_chans=config.in_channels,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=config.hidden // HEAD_WIDTH,
        adm_in_channels=config.pooled_dim,
        num_layers=config.layers,
        main_model_double=depth,
        double_y_emb=False,
        device="meta",  # pyright: ignore[reportArgumentType]
        dtype=weights["x_embedder.proj.weight"].dtype,
        operations=comfy.ops.disable_weight_init,
    )
    return filled(network, weights, device)


ATTENTIONS = {"ComfyUI default": "optimized_attention", "ComfyUI SDPA": "attention_pytorch"}
"""ComfyUI's functions: the one that it chose on this machine, and torch's."""


def with_attention(name: str, network: Call, *inputs: Tensor, **options: Any) -> Tensor:
    """A call of ComfyUI's network with one of the ATTENTIONS."""
    import comfy.ldm.modules.attention as attentions
    import comfy.ldm.modules.diffusionmodules.mmdit as stock

    chosen = getattr(attentions, ATTENTIONS[name])
    before, stock.optimized_attention = stock.optimized_attention, chosen
    try:
        return network(*inputs, **options)
    finally:
        stock.optimized_attention = before


def diffusers(config: MMDiTXConfig, weights: StateDict, device: Any) -> Call:
    """diffusers' SD3Transformer2DModel."""
    network = diffusers_network(config, weights, device)

    def call(x: Tensor, timestep: Tensor, context: Tensor, y: Tensor, **options: Any) -> Tensor:
        return network(x, context, y, timestep, return_dict=False, **options)[0]

    return call


def fetched(name: str, packages: list[str]) -> None:
    """Have Python find packages in a folder of the cache, where they are put once."""
    folder = install.cache_root() / name
    first = packages[0].partition("==")[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with install.locked(folder.with_suffix(".lock")):
        if not (folder / first).is_dir():
            install.say(f"Fetching {first} for the comparison ...")
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--target", str(folder), *packages], check=True)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def diffusers_network(config: MMDiTXConfig, weights: StateDict, device: Any) -> Any:
    """diffusers' SD3Transformer2DModel itself."""
    fetched("bench", DIFFUSERS)
    from diffusers.models.transformers.transformer_sd3 import (  # pyright: ignore
        SD3Transformer2DModel,
    )

    with torch.device("meta"):
        network = SD3Transformer2DModel(
            sample_size=128,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            num_layers=config.depth,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=config.heads,
            joint_attention_dim=config.context_dim,
            caption_projection_dim=config.hidden,
            pooled_projection_dim=config.pooled_dim,
            out_channels=config.in_channels,
            pos_embed_max_size=config.pos_embed_max_size,
            dual_attention_layers=config.dual_blocks,
            qk_norm="rms_norm" if config.qk_norm else None,
        )
    return filled(network, to_diffusers(weights, config), device)


def filled(network: Any, weights: StateDict, device: Any) -> Any:
    """A network made on "meta", with its weights, on a device."""
    network.load_state_dict({k: t.to(device) for k, t in weights.items()}, assign=True)
    return network.requires_grad_(False).eval()


def to_diffusers(weights: StateDict, config: MMDiTXConfig) -> StateDict:
    """Stability's keys -> diffusers': `from_diffusers` the other way round."""
    outer = {ours: theirs for theirs, ours in RENAMED.items()}
    inner = {ours: theirs for theirs, ours in RENAMED_IN_BLOCK.items()}
    last = f"joint_blocks.{config.depth - 1}.context_block.adaLN_modulation.1"
    found: StateDict = {}
    for key, tensor in weights.items():
        name, _, suffix = key.rpartition(".")
        if name in (last, "final_layer.adaLN_modulation.1"):
            tensor = torch.cat(list(reversed(tensor.chunk(2))))
        if not key.startswith("joint_blocks."):
            found[outer[key] if key in outer else f"{outer[name]}.{suffix}"] = tensor
            continue
        _, index, part = name.split(".", 2)
        block = f"transformer_blocks.{index}"
        if part in JOINED_IN_BLOCK:
            for theirs, piece in zip(JOINED_IN_BLOCK[part], tensor.chunk(3)):
                found[f"{block}.{theirs}.{suffix}"] = piece
        else:
            found[f"{block}.{inner[part]}.{suffix}"] = tensor
    return found


def networks(config: MMDiTXConfig, weights: StateDict, device: Any) -> dict[str, Call]:
    """Name -> the network; "ours" first."""
    stock = comfyui(config, weights, device)
    return {
        "ours": ours(config, weights, device),
        **{name: partial(with_attention, name, stock) for name in ATTENTIONS},
        "diffusers": diffusers(config, weights, device),
    }


def with_lora(calls: dict[str, Call], rank: int, device: Any) -> dict[str, Call]:
    """The same with a LoRA on all of attention, put into the weights by the host's patcher.

    Without diffusers, which needs one more package for it.
    """
    from comfy.model_patcher import ModelPatcher
    from comfy.weight_adapter.lora import LoRAAdapter

    generator = torch.Generator().manual_seed(3)
    for network in (calls["ours"], stock_network(calls)):
        found = {}
        for key, weight in network.state_dict().items():
            if re.search(r"attn2?\.(qkv|proj)\.weight$", key):
                up = torch.randn(len(weight), rank, generator=generator).to(weight)
                down = torch.randn(rank, weight.shape[1], generator=generator).to(weight)
                found[key] = LoRAAdapter(set(), (0.01 * up, 0.01 * down, rank, None, None, None))
        patcher = ModelPatcher(network, device, device)
        patcher.add_patches(found)
        patcher.load(device, full_load=True)
    return {name: call for name, call in calls.items() if name != "diffusers"}


def stock_network(calls: dict[str, Call]) -> Any:
    """The module that ComfyUI's calls share."""
    call: Any = calls["ComfyUI SDPA"]
    return call.args[1]


def with_controlnet(
    calls: dict[str, Call], config: ControlNetConfig, weights: StateDict, depth: int, device: Any
) -> dict[str, Call]:
    """The same steered by an 8b ControlNet at a strength of 1. Without diffusers, whose
    ControlNet is another network."""
    own = ours_controlnet(config, weights, device)
    stock = comfyui_controlnet(config, weights, depth, device)
    spread = config.spread(depth)
    network: Any = calls["ours"]

    def steered(x: Tensor, timestep: Tensor, context: Tensor, y: Tensor) -> Tensor:
        residuals = own(network, x, timestep, y, x)
        control = {"output": [residuals[layer] for layer in spread]}
        return network(x, timestep, context, y, control=control)

    def stock_steered(x: Tensor, timestep: Tensor, context: Tensor, y: Tensor) -> Tensor:
        control = stock(x, timestep.to(x.dtype), y, context, x)
        return stock_network(calls)(x, timestep, context, y, control=control)

    stock_calls = {name: partial(with_attention, name, stock_steered) for name in ATTENTIONS}
    return {"ours": steered, **stock_calls}


def with_skipped(calls: dict[str, Call], layers: list[int]) -> dict[str, Call]:
    """The same for a step with cfg and skipped layers; the last row of the batch of two is the
    positive prompt. Ours takes it all in one call, the others call once more."""
    from sd35_pack.nodes.host import network as pack  # pyright: ignore[reportMissingImports]

    def twice(call: Call, options: dict[str, Any], *inputs: Tensor) -> Tensor:
        out = call(*inputs)
        return torch.cat([out, call(*(t[1:] for t in inputs), **options)])

    def once(call: Any, *inputs: Tensor) -> Tensor:
        inputs = tuple(torch.cat([t, t[1:]]) for t in inputs)
        plan = {"twin": (("positive", 1), frozenset(layers))}
        options = {pack.TWINS: plan, "uuids": ["negative", "positive", "twin"]}
        return call(*inputs, transformer_options={**options, "cond_or_uncond": [0, 1, 2]})

    def skip(arguments: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        return arguments

    replace = {("double_block", layer): skip for layer in layers}
    stock = {"transformer_options": {"patches_replace": {"dit": replace}}}
    options = {"diffusers": {"skip_layers": layers}}
    return {
        name: partial(once, call)
        if name == "ours"
        else partial(twice, call, options.get(name, stock))
        for name, call in calls.items()
    }
