"""What changes the weights that learn: AdamW, or Muon (Jordan et al. 2024) where torch has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import SettingError
from .config import TrainingConfig

MOMENTS = (("exp_avg", "exp_avg_sq"), ("momentum_buffer",))
"""What AdamW keeps of a parameter, and what Muon does."""
Muon: Any = getattr(torch.optim, "Muon", None)


def optimisers(
    learning: Mapping[str, nn.Parameter], config: TrainingConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices in blocks and AdamW for the rest. Raises
    SettingError for a torch without Muon."""
    muon = config.optimiser == "muon"
    if muon and Muon is None:
        raise SettingError(
            f"optimiser is muon, which torch {torch.__version__} does not have yet; 2.9 does. "
            "Update torch, or set optimiser to adamw."
        )
    matrices, others = [], []
    for name, parameter in learning.items():
        of_muon = muon and parameter.ndim == 2 and "_block" in name
        (matrices if of_muon else others).append(parameter)
    settings: dict[str, Any] = {"lr": config.rate, "weight_decay": config.weight_decay}
    fused = all(p.device.type in ("cpu", "cuda") for p in others)
    found: list[torch.optim.Optimizer] = []
    if others:
        found.append(torch.optim.AdamW(others, betas=(0.9, 0.99), fused=fused, **settings))
    if matrices:
        found.append(Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings))
    return found


def optimiser_of_each(
    learning: Mapping[str, nn.Parameter], optimisers: list[torch.optim.Optimizer]
) -> dict[str, torch.optim.Optimizer]:
    """The name of each parameter that learns -> what changes it."""
    names = {id(parameter): name for name, parameter in learning.items()}
    return {
        names[id(parameter)]: optimiser
        for optimiser in optimisers
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
