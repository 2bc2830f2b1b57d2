"""A run as a file: everything that a resumed one needs to go on bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.layouts import under
from ..checkpoint.loading import fill
from ..checkpoint.tensor_file import StateDict, metadata_of, read_file, write_file
from ..errors import CheckpointError, SettingError
from ..pipeline import MODEL, STATE
from .config import BEST, CLASS, CLASS_MARK, CURVE, SAMPLES, STRIP, TO_BE_TRAINED
from .history import BANDS, History
from .optimisers import MOMENTS

HISTORY = "history"
OptimiserOf = Mapping[str, torch.optim.Optimizer]


def check_output(folder: Path) -> None:
    """Raise SettingError where a run would replace what no training wrote."""
    state = metadata_of(folder / STATE)
    known = {STATE: "step" in state and "config" in state}
    for name in (MODEL, BEST):
        known[name] = "steps_trained" in metadata_of(folder / name).get("sd35_config", "")
    known[CLASS] = CLASS_MARK in metadata_of(folder / CLASS)
    others = [folder / name for name in known if os.path.lexists(folder / name) and not known[name]]
    if not any(known.values()):
        others += [folder / name for name in (CURVE, STRIP) if os.path.lexists(folder / name)]
        others += sorted(p for p in (folder / SAMPLES).glob("*.png") if p.stem.isdigit())
    if others:
        raise SettingError(
            f"'{others[0]}' was not written by a training, or is damaged, and this run would "
            "replace it. Choose another folder as 'output', or move that file away."
        )


def write_state(
    path: Path,
    learning: Mapping[str, nn.Parameter],
    average: StateDict,
    optimiser_of: OptimiserOf,
    history: History,
    about: dict[str, Any],
) -> None:
    """Under the final name once it is whole. Raises CheckpointError when it can't be written; the
    last one is then intact."""
    tensors: StateDict = {f"model.{k}": v.detach() for k, v in learning.items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    tensors[HISTORY] = history.table
    for name, optimiser in optimiser_of.items():
        state = optimiser.state.get(learning[name], {})
        tensors |= {f"{k}.{name}": state[k] for keys in MOMENTS for k in keys if k in state}
    write_file(path, tensors, about)


def read_state(
    path: Path,
    model: nn.Module,
    learning: Mapping[str, nn.Parameter],
    optimiser_of: OptimiserOf,
    device: torch.device,
) -> tuple[StateDict, History, dict[str, str]]:
    """Fill a model and its optimisers; the average, the losses and what the file says of itself.

    Raises CheckpointError for one that does not fit.
    """
    tensors, metadata = read_file(path)
    saved, step = under(tensors, "model."), int(metadata["step"])
    lacking = [name for name in learning if name not in saved]
    if lacking:
        raise CheckpointError(
            f"'{path}' does not fit {TO_BE_TRAINED}: it lacks '{lacking[0]}'. "
            "Choose another 'output', or the settings with which this run began."
        )
    fill(model, {**model.state_dict(), **saved}, str(path), TO_BE_TRAINED)
    for name, optimiser in optimiser_of.items():
        of_muon = not isinstance(optimiser, torch.optim.AdamW)
        keys = [key for key in MOMENTS[of_muon] if f"{key}.{name}" in tensors]
        if keys and len(keys) < len(MOMENTS[of_muon]):
            raise CheckpointError(
                f"'{path}' does not fit {TO_BE_TRAINED}: of the moments of '{name}' it has "
                f"{keys[0]} alone. Choose another 'output', or begin again."
            )
        state: dict[str, Any] = {key: tensors[f"{key}.{name}"].to(device) for key in keys}
        if state and not of_muon:
            fused = optimiser.defaults.get("fused")  # which counts on the device
            state["step"] = torch.tensor(float(step), device=device if fused else "cpu")
        optimiser.state[learning[name]] = state
    average = {k: v.to(device) for k, v in under(tensors, "average.").items()}
    return average, History(_losses(tensors.get(HISTORY))), metadata


def _losses(table: Tensor | None) -> Tensor | None:
    """None where a state has none, as those of earlier versions, or an odd one."""
    fits = table is not None and table.ndim == 3 and table.shape[1:] == (2, BANDS)
    return table if fits and table is not None and table.dtype == torch.float32 else None
