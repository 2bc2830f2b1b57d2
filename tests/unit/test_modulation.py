"""The modulation cache: the network's own numbers, each pair computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sd35_core.network import modulation_cache
from sd35_core.network.mmditx import MMDiTX, Twin
from sd35_core.network.modulation_cache import ModulationCache

from .models import TINY, random_inputs, random_model

TIMES = torch.tensor([1000.0, 800.0, 500.0, 120.0, 0.0])


@contextmanager
def counted(network: MMDiTX) -> Iterator[list[int]]:
    """Rows that went through the last block's adaLN, call by call."""
    rows: list[int] = []
    last: Any = network.joint_blocks[-1]
    layer = last.x_block.adaLN_modulation
    handle = layer.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    yield rows
    handle.remove()


def at(time: float, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, timestep, context, y = inputs
    return x, torch.full_like(timestep, time), context, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_run_with_the_cache_has_the_same_bits(dtype: torch.dtype, batch: int) -> None:
    network, cache = random_model().to(dtype), ModulationCache()
    x, timestep, context, y = random_inputs(batch=batch)
    inputs = x.to(dtype), timestep, context.to(dtype), y.to(dtype)
    twins = [Twin(batch - 1, frozenset({1, 2}), source=0)] if batch > 1 else []
    for time in TIMES[:-1].tolist():
        call = at(time, inputs)
        known = cache.look_up(network, call[1], call[3], TIMES[:-1])
        with_cache = network(*call, twins=twins, modulations=known)
        assert torch.equal(with_cache, network(*call, twins=twins))


def test_all_pairs_are_computed_at_the_first_call() -> None:
    network, cache = random_model(), ModulationCache()
    inputs = random_inputs(batch=4)
    y = inputs[3][[0, 1, 0, 1]]
    with counted(network) as rows:
        for time in TIMES[:-1].tolist():
            cache.look_up(network, torch.full((4,), time), y, TIMES[:-1])
        assert rows == [16], "8 pairs at once, padded to 16 rows"
        cache.look_up(network, torch.full((4,), 333.0), y, TIMES[:-1])
        assert rows == [16, 16], "a timestep between two steps"
        cache.look_up(network, torch.full((4,), 500.0), y + 1, TIMES[:-1])
        cache.look_up(network, torch.full((4,), 120.0), y + 1, TIMES[:-1])
        assert rows == [16, 16, 16], "another prompt, from here to the end of the run"
        cache.clear()
        cache.look_up(network, torch.full((4,), 120.0), y, TIMES[:-1])
        assert rows == [16] * 4


def test_a_long_run_keeps_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modulation_cache, "MOST_ROWS", 32)
    network, cache = random_model(), ModulationCache()
    times = torch.linspace(1000, 1, 100)
    y = random_inputs(batch=2)[3]
    with counted(network) as rows:
        for time in times:
            known = cache.look_up(network, time.expand(2), y, times)
            assert cache.kept is not None and len(cache.kept.c) <= 32
            assert torch.equal(known.c, network.conditioning(time.expand(2), y))
    assert sum(rows) == 208, "200 pairs, each once, and the last call padded"


def test_what_is_not_a_number_is_not_kept() -> None:
    network, cache = random_model(), ModulationCache()
    _, timestep, _, y = random_inputs(batch=2)
    for _ in range(3):
        known = cache.look_up(network, timestep, y * torch.nan)
        assert known.c.isnan().all()
    assert known.c.shape == (2, TINY.hidden)


def test_what_a_full_cache_takes_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modulation_cache, "MOST_ROWS", 32)
    network, cache = random_model(), ModulationCache()
    times = torch.linspace(1000, 1, 31)
    y = random_inputs(batch=1)[3]
    cache.look_up(network, times[:1], y, times)
    assert cache.kept is not None and 28 <= len(cache.kept.c) <= 32
    kept = [cache.kept.c, cache.kept.final, *(t for pair in cache.kept.blocks for t in pair)]
    rows = len(cache.kept.c)
    assert sum(t.numel() for t in kept) == modulation_cache.most_values(network) * rows // 32
