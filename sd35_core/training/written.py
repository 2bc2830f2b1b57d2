"""What a run leaves behind: a checkpoint, a ControlNet or a LoRA, and what its file says of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.tensor_file import StateDict
from ..network.config import MMDiTXConfig
from ..network.controlnet import CONTROL_TYPES
from .config import TrainingConfig
from .lora import spelled
from .trained import Trained

MOST_TAGS, LONGEST_TAG = 200, 100
"""Of the captions' tags in a LoRA's file: how many, and letters of each."""
ARCHITECTURES = {
    "sd3_medium": "stable-diffusion-3-m",
    "sd3.5_medium": "stable-diffusion-3-5-medium",
    "sd3.5_large": "stable-diffusion-3-5-large",
}
"""Variant -> its name in Stability AI's ModelSpec, as kohya's trainer spells it."""


def learned(model: Trained, vae: nn.Module | None, config: TrainingConfig) -> StateDict:
    """In fp16 on the CPU: the LoRA or the ControlNet alone, else every part of a checkpoint."""
    if model.lora:
        found = spelled(model.lora, model.diffusion_model.config.depth, config.lora_keys)
    elif model.controlnet is not None:
        found = dict(model.controlnet.state_dict())
    else:
        parts = {
            "model.diffusion_model.": model.diffusion_model.state_dict(),
            **{
                f"text_encoders.{name}.transformer.": encoder.state_dict()
                for name, encoder in model.encoders.items()
            },
            "first_stage_model.": vae.state_dict() if vae else {},
        }
        found = {
            prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()
        }
    tensors = {key: tensor.half().cpu().clone() for key, tensor in found.items()}
    if config.controlnet:
        number = CONTROL_TYPES.index(config.controlnet)
        tensors["control_type"] = torch.tensor([number], dtype=torch.int32)
    return tensors


def about_run(
    model: Trained, config: TrainingConfig, size: tuple[int, int], steps: int
) -> dict[str, Any]:
    """What every file of a run says of it; a LoRA's has its plan, a checkpoint's its parts.

    size: (width, height) in pixels.
    """
    about: dict[str, Any] = {"steps_trained": steps}
    if config.lora_rank:
        about |= {"lora": asdict(config.lora), "trigger": config.trigger}
    elif not config.controlnet:
        about |= {
            "text_encoders": {n: e.config.described() for n, e in model.encoders.items()},
            "pixels": config.pixels,
            "prompt_tokens": config.prompt_tokens,
            "size": list(size),
        }
    found: dict[str, Any] = {"sd35_config": {**about, **config.metadata}}
    if "title" in config.metadata:
        found["modelspec.title"] = str(config.metadata["title"])
    return found


def lora_metadata(
    config: TrainingConfig, network: MMDiTXConfig, size: tuple[int, int], captions: list[str]
) -> dict[str, Any]:
    """A LoRA's metadata that managers show: kohya's ss_ keys and Stability AI's ModelSpec.

    alpha is the rank, as the file's values have the scale within; size: (width, height).
    """
    base = Path(config.start)
    digest = sha256_of(base)
    found: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": config.lora_rank,
        "ss_network_alpha": config.lora_rank,
        "ss_base_model_version": network.variant,
        "ss_sd_model_name": base.name,
        "ss_new_sd_model_hash": digest,
        "ss_learning_rate": config.rate,
        "ss_lr_scheduler": "cosine" if config.cosine else "constant",
        "ss_lr_warmup_steps": config.warm_up,
        "ss_max_train_steps": config.steps,
        "ss_optimizer": config.optimiser,
        "ss_batch_size_per_device": config.batch,
        "ss_gradient_accumulation_steps": config.accumulate,
        "ss_max_grad_norm": config.clip_norm,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_mixed_precision": "bf16" if config.bf16 else "no",
        "ss_seed": config.seed,
        "ss_resolution": list(size),
        "ss_num_train_images": len(captions),
        "ss_tag_frequency": {"images": tags_of(captions)},
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{ARCHITECTURES.get(network.variant, network.variant)}/lora",
        "modelspec.implementation": "diffusers" if config.lora_keys == "diffusers" else "sgm",
        "modelspec.title": Path(config.output).name,
        "modelspec.resolution": f"{size[0]}x{size[1]}",
    }
    if config.trigger:
        found["modelspec.trigger_phrase"] = config.trigger
    return found


def tags_of(captions: list[str]) -> dict[str, int]:
    """The captions' commonest parts between commas, and how many captions have each."""
    tags = Counter(
        tag[:LONGEST_TAG]
        for caption in captions
        for tag in {part.strip() for part in caption.split(",")}
        if tag
    )
    return dict(sorted(tags.most_common(MOST_TAGS), key=lambda item: (-item[1], item[0])))


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal, read in pieces of a megabyte."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
