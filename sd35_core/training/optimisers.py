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
NO_MUON = type(None)
Muon: Any = getattr(torch.optim, "Muon", NO_MUON)


def optimisers(
    learning: Mapping[str, nn.Parameter], config: TrainingConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices in blocks and AdamW for the rest. Raises
    SettingError for a torch without Muon."""
    muon = config.optimiser == "muon"
    if muon and Muon is NO_MUON:
        raise SettingError(
            f"optimiser is muon, which torch {torch.__version__} does not have yet; 2.9 does. "
            "Update torch, or set optimiser to adamw."
        )
    matrices = [p for name, p in learning.items() if muon and p.ndim == 2 and "_block" in name]
    chosen = set(map(id, matrices))
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [p for p in learning.values() if id(p) not in chosen],
            lr=config.rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=all(p.device.type in ("cpu", "cuda") for p in learning.values()),
        )
    ]
    if matrices:
        found.append(
            Muon(
                matrices,
                lr=config.rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return found
