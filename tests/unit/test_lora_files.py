"""What is said of a LoRA's file: for which model, whose names, its rank, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd35_core.workflow.__main__ import main
from sd35_core.workflow.lora_files import lora_in, lora_words
from sd35_core.workflow.setup import Lora, Model

BLOCK = {"kohya": "lora_unet_joint_blocks_3_x_block_", "flat": "transformer_blocks_3_"}
MEDIUM = "SD3.5 Medium or SD3 Medium"
DOWN = {"lora_down.weight": (8, 1536), "lora_up.weight": (1536, 8)}
PEFT = {"lora_A.weight": (8, 1536), "lora_B.weight": (1536, 8)}
Parts = dict[str, tuple[int, ...]]
FILES: dict[str, tuple[str, Parts, str, str]] = {
    "kohya": ("lora_unet_joint_blocks_3_x_block_attn_proj", DOWN, "LoRA in names of kohya", MEDIUM),
    "comfyui": (
        "diffusion_model.joint_blocks.3.x_block.mlp.fc1", PEFT, "LoRA in names of ComfyUI", MEDIUM),
    "diffusers": (
        "transformer.transformer_blocks.3.attn.to_q", PEFT, "LoRA in names of diffusers", MEDIUM),
    "peft": (
        "base_model.model.transformer_blocks.3.attn.to_out.0", PEFT, "names of peft", MEDIUM),
    "onetrainer": (
        "lora_transformer_transformer_blocks_3_attn_to_k", DOWN, "names of OneTrainer", MEDIUM),
    "simpletuner": (
        "lycoris_transformer_blocks_3_ff_net_0_proj", DOWN, "SimpleTuner (LyCORIS)", MEDIUM),
    "loha": (
        "lora_unet_joint_blocks_3_x_block_attn_proj",
        {"hada_w1_a": (1536, 8), "hada_w1_b": (8, 1536),
         "hada_w2_a": (1536, 8), "hada_w2_b": (8, 1536)}, "LoHa in names of kohya", MEDIUM),
    "lokr": (
        "lycoris_transformer_blocks_30_attn_to_q", {"lokr_w1": (32, 48), "lokr_w2": (76, 32)},
        "LoKr in names of SimpleTuner", "SD3.5 Large"),
    "attn2": (
        "lora_unet_joint_blocks_3_x_block_attn2_qkv", DOWN, "kohya", "SD3.5 Medium"),
    "large": (
        "transformer.transformer_blocks.37.attn.to_q",
        {"lora_A.weight": (4, 2432), "lora_B.weight": (2432, 4)}, "diffusers", "SD3.5 Large"),
}  # fmt: skip
OTHERS = {
    "lora_unet_double_blocks_0_img_attn_qkv": "FLUX or Hunyuan Video",
    "lora_unet_distilled_guidance_layer_in_proj": "Chroma",
    "transformer.single_transformer_blocks.3.attn.to_q": "FLUX or Hunyuan Video",
    "transformer.transformer_blocks.3.img_mlp.net.2": "Qwen-Image",
    "diffusion_model.blocks.0.cross_attn.k": "Wan or Cosmos",
    "diffusion_model.layers.0.attention.qkv": "Lumina or Z-Image",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": "SDXL",
}


def write(path: Path, layers: dict[str, Parts], said: dict[str, str] | None = None) -> Path:
    tensors = {
        f"{name}.{part}": torch.zeros(shape)
        for name, parts in layers.items()
        for part, shape in parts.items()
    }
    save_file(tensors, path, said)
    return path


@pytest.mark.parametrize("name", FILES)
def test_each_spelling_is_named_and_matches_its_model(name: str, tmp_path: Path) -> None:
    layer, parts, spelling, model = FILES[name]
    found = lora_in(write(tmp_path / "x.safetensors", {layer: parts}))
    assert (found.layers, found.matched, found.made_for) == (1, 1, model)
    assert spelling in found.spelling
    assert not found.misfits


@pytest.mark.parametrize("layer", OTHERS)
def test_other_families_are_named(layer: str, tmp_path: Path) -> None:
    parts = {"lora_down.weight": (4, 2048), "lora_up.weight": (640, 4)}
    found = lora_in(write(tmp_path / "x.safetensors", {layer: parts}), Model(depth=24, hidden=1536))
    assert (found.matched, found.made_for) == (0, OTHERS[layer])


def test_a_lora_of_no_width_has_no_width(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    name = "lora_unet_joint_blocks_0_x_block_attn_proj"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 0),
               f"{name}.lora_up.weight": torch.zeros(8, 4)}, path)  # fmt: skip
    assert lora_in(path).layers == 1


def test_each_reason_is_counted_with_an_example(tmp_path: Path) -> None:
    layers = {
        "transformer.transformer_blocks.3.attn.to_q": PEFT,
        "transformer.transformer_blocks.30.attn.to_q": PEFT,
        "transformer.transformer_blocks.31.attn.to_q": PEFT,
        "unet.transformer_blocks.3.attn.to_q": PEFT,
        "transformer.transformer_blocks.3.attn.to_z": PEFT,
    }
    found = lora_in(write(tmp_path / "x.safetensors", layers), Model(depth=24, hidden=1536))
    assert (found.layers, found.matched) == (5, 1)
    reasons = {why: (count, name) for why, count, name in found.misfits}
    assert reasons["a block beyond 23, this model's last"][0] == 2
    assert any("begin with 'unet.'" in why for why in reasons)
    assert reasons["no layer of SD3's"] == (1, "transformer.transformer_blocks.3.attn.to_z")
    text = lora_words(Lora("x", 0.5, found))
    assert "1 of 5 layers match" in text and "Not: 2 (a block beyond 23" in text
    assert text.endswith("to 1, as it was trained, here 0.5.")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "rank 8, made for"),
        ({"ss_network_alpha": "4", "ss_network_dim": "8"}, "rank 8, alpha 4, made for"),
        ({"ss_network_alpha": "4", "ss_network_dim": "0"}, "rank 8, made for"),
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 16, "transformer.r": 8})},
         "to 2, as it was trained"),
    ],
)  # fmt: skip
def test_rank_alpha_and_strengths_are_said(
    said: dict[str, str], words: str, tmp_path: Path
) -> None:
    layer = {"transformer.transformer_blocks.3.attn.to_q": PEFT}
    found = lora_in(write(tmp_path / "x.safetensors", layer, said))
    assert words in lora_words(Lora("x", None, found))


def test_alpha_among_the_values_is_not_multiplied_twice(tmp_path: Path) -> None:
    parts = {**DOWN, "alpha": ()}
    said = {"ss_network_alpha": "4", "ss_network_dim": "8"}
    layer = {"lora_unet_joint_blocks_3_x_block_attn_proj": parts}
    found = lora_in(write(tmp_path / "x.safetensors", layer, said))
    assert found.alphas and found.scale == 1.0


def test_the_command_line_tells_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer, parts, spelling, model = FILES["large"]
    path = write(tmp_path / "style.safetensors", {layer: parts, "lora_te1_x": DOWN})
    assert main([str(path)]) == 0
    said = capsys.readouterr().out
    assert f"made for {model}, 1 of 1 layers match, 1 layers of text encoders" in said
    other = write(tmp_path / "flux.safetensors", {next(iter(OTHERS)): DOWN})
    assert main([str(other)]) == 1
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no")
    assert main([str(broken)]) == 2
    assert "can't be read" in capsys.readouterr().err
    assert main([str(write(tmp_path / "vae.safetensors", {"decoder": {"weight": (2,)}}))]) == 2


def test_a_workflow_is_told_of_its_loras(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from .set_ups import lora, medium

    (tmp_path / "loras").mkdir()
    layer, parts, _, _ = FILES["attn2"]
    write(tmp_path / "loras" / "mine.safetensors", {layer: parts})
    graph = medium()
    lora("mine.safetensors", 0.75)(graph)
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    main([str(path), "--models", str(tmp_path)])
    said = capsys.readouterr().out
    assert "LoRA 'mine.safetensors': LoRA in names of kohya, rank 8" in said
    assert "here 0.75" in said
