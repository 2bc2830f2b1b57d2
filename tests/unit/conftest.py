"""Small training runs and their data, for several test modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd35_core.encoders.text_encoder import clip_g, clip_l, padded_tokens
from sd35_core.training.config import TrainingConfig
from sd35_core.training.run import Run

IMAGES = 8
COLOURS = ["red", "green", "blue", "yellow", "purple", "white", "black", "orange"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A run on eight flat 4x4 latents with a caption each."""
    folder = tmp_path_factory.mktemp("training")
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(IMAGES, 16, 1, 1, generator=generator).expand(-1, -1, 4, 4)
    captions = [[1000 + i, 2000 + i] for i in range(IMAGES)]
    tensors = {"latents": flat.contiguous().half()}
    for name, kind in (("tokens_l", clip_l), ("tokens_g", clip_g)):
        rows = [padded_tokens(caption, kind(1, 1, 1)) for caption in [*captions, []]]
        ids = torch.tensor(rows, dtype=torch.int32)
        tensors |= {name: ids[:-1].clone(), f"{name}_empty": ids[-1].clone()}
    save_file(tensors, folder / "examples.safetensors")
    return TrainingConfig(
        examples=(str(folder / "examples.safetensors"),),
        output=str(folder / "run"),
        depth=2,
        dual_blocks=1,
        pos_embed_max_size=4,
        context_dim=64,
        clip_l=(16, 2, 2),
        clip_g=(16, 2, 2),
        steps=200,
        batch=IMAGES,
        rate=3e-3,
        warm_up=20,
        ema=0.95,
        bf16=False,
        save_every=100,
        device="cpu",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures of one colour each, in two shapes, with captions."""
    images = tmp_path / "pictures"
    images.mkdir()
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (64, 64) if i % 2 else (96, 48), colour).save(images / f"{colour}.png")
        (images / f"{colour}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    return images


@pytest.fixture
def lora_config(config: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    """A LoRA on a base after a few steps."""
    base = Run(replace(config, steps=30, output=str(tmp_path / "base")))
    for _ in range(30):
        base.advance()
    base.write_model(tmp_path / "base.safetensors")
    file = str(tmp_path / "base.safetensors")
    return replace(
        config, output=str(tmp_path / "run"), start=file, text_encoders=file, lora_rank=4,
        lora_targets=("attention", "mlp", "modulation"), rate=1e-2,
    )  # fmt: skip
