"""What the network hears of a batch's captions: encoded while training, or once before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..encoders.described import T5
from ..encoders.text_encoder import KINDS, columns_used
from ..errors import SettingError
from .dataset import Examples
from .trained import Trained

DROPPED = (*KINDS, T5)
"""Text encoders that a step can go without."""


def dropouts(shared: float, own: Mapping[str, Any]) -> dict[str, float]:
    """The share of captions (of steps, for T5) that go without each encoder; `own` are those of
    single ones. Raises SettingError for an unknown encoder or for no share."""
    unknown = [name for name in own if name not in DROPPED]
    if unknown:
        known = ", ".join(DROPPED)
        raise SettingError(f"dropout_of names '{unknown[0]}'; known are {known}.")
    found = {name: own.get(name, shared) for name in DROPPED}
    for name, share in found.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise SettingError(f"The dropout of {name} is {share!r}; it is a share, 0 to 1.")
    return {name: float(share) for name, share in found.items()}


def read_prompts(
    model: Trained,
    examples: Examples,
    chosen: Tensor,
    uncaptioned: Tensor,
    kept: Tensor,
    with_t5: bool,
    least: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Context (B, L, C) and pooled (B, P) of the examples `chosen` (B,), on the model's device.

    uncaptioned: (B,), those that are told nothing; kept: (2, B), 0 where a CLIP's output is
    dropped; least: to how many of CLIP's and T5's tokens they are padded.
    """
    device = model.diffusion_model.x_embedder.proj.weight.device
    if "context" in examples:
        context, pooled = _encoded(examples, chosen, uncaptioned, kept, with_t5)
        return context.to(device), pooled.to(device)
    tokens = []
    columns = columns_used(examples["tokens_g"][chosen], least[0])
    for name in ("tokens_l", "tokens_g"):
        ids = examples[name][chosen, :columns].long()
        ids[uncaptioned] = examples[f"{name}_empty"][:columns].long()
        tokens.append(ids.to(device))
    tokens_t5 = None
    if with_t5:
        ids = examples["tokens_t5"][chosen].long()
        ids[uncaptioned] = examples["tokens_t5_empty"].long()
        tokens_t5 = ids[:, : columns_used(ids, least[1])].to(device)
    return model.encode(*tokens, kept=kept.to(device), tokens_t5=tokens_t5)


def _encoded(
    examples: Examples, chosen: Tensor, uncaptioned: Tensor, kept: Tensor, with_t5: bool
) -> tuple[Tensor, Tensor]:
    """The same of captions that a host encoded: the CLIPs' rows first, T5's behind them, both as
    long as the batch's longest.

    Where it is not said how long each is, all are alike; where the caption without words then has
    another length, the first of a batch decides for all.
    """
    context, pooled = (examples[name][chosen].float() for name in ("context", "pooled"))
    empty, silent = (examples[f"{name}_empty"].float() for name in ("context", "pooled"))
    clips, left = examples["clip"].tolist()
    if len(empty) == context.shape[1]:
        context[uncaptioned], pooled[uncaptioned] = empty, silent
    elif bool(uncaptioned[0]):
        context = empty.expand(len(chosen), -1, -1).clone()
        pooled = silent.expand(len(chosen), -1).clone()
    keep = kept[:, :, None].float()
    sides = (slice(0, left), slice(left, pooled.shape[1]))
    for side, share in zip(sides, keep):
        context[:, :clips, side] *= share[:, :, None]
        pooled[:, side] *= share
    longest = clips, context.shape[1] - clips
    if "rows" in examples:
        rows = examples["rows"][chosen]
        rows[uncaptioned] = examples["rows_empty"]
        longest = rows.amax(dim=0).tolist()
    parts = [context[:, : longest[0]]]
    if with_t5:
        parts.append(context[:, clips : clips + longest[1]])
    return torch.cat(parts, dim=1), pooled


def check_encoded(examples: Examples, context_dim: int, pooled_dim: int) -> None:
    """Raise SettingError for encoded captions that are another model's, or damaged."""
    seen = examples["context"].shape[-1], examples["pooled"].shape[-1]
    if seen != (context_dim, pooled_dim):
        raise SettingError(
            f"The captions are encoded in widths of {seen[0]} and {seen[1]} (pooled); this model "
            f"takes {context_dim} and {pooled_dim}. Encode them with this model's text encoders."
        )
    if "rows" in examples:
        shapes = tuple(examples["rows"].shape), tuple(examples["rows_empty"].shape)
        if shapes != ((len(examples["context"]), 2), (2,)):
            raise SettingError(
                f"The encoded captions' rows have the shapes {shapes[0]} and {shapes[1]}, expected "
                f"{(len(examples['context']), 2)} and (2,): a number for the CLIPs and one for T5."
            )
    if not torch.isfinite(examples["context"]).all():
        raise SettingError(
            "The encoded captions hold values that are no numbers. Encode them with text encoders "
            "in fp16 or fp32, not fp8."
        )
