"""Which steps the step cache leaves out, and what it gives in their place."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from sd35_core.sampling.step_cache import Pace, StepCache

STEPS = 20
SIGMAS = torch.linspace(1, 0, STEPS + 1)[:-1].tolist()


def run(
    pace: Pace,
    truth: Callable[[float], Tensor],
    acting: Callable[[int], Hashable] = lambda step: 0,
) -> tuple[StepCache, list[Tensor]]:
    """A run whose model gives `truth` of sigma."""
    cache = StepCache(pace, STEPS)
    found = [
        cache.denoised(i, sigma, acting(i), lambda s=sigma: truth(s))
        for i, sigma in enumerate(SIGMAS)
    ]
    return cache, found


def slow(sigma: float) -> Tensor:
    return torch.tensor([1.0, 2.0]) + sigma * torch.tensor([0.3, -0.1])


def noise(sigma: float) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(int(1e6 * sigma)))


def test_steps_of_a_slow_change_take_the_last_value() -> None:
    cache, found = run(Pace(0.1, 2), slow)
    assert cache.left_out == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18]
    for step, value in enumerate(found):
        computed = max(i for i in range(step + 1) if i not in cache.left_out)
        assert torch.equal(value, slow(SIGMAS[computed]))


def test_nothing_is_left_out_where_the_picture_changes() -> None:
    cache, found = run(Pace(0.1, 2), noise)
    assert cache.left_out == []
    assert all(torch.equal(value, noise(sigma)) for value, sigma in zip(found, SIGMAS))


def test_a_change_of_what_acts_starts_anew() -> None:
    cache, found = run(Pace(0.1, 3), slow, lambda step: step >= 10)
    assert not {10, 11} & set(cache.left_out) and {12, 13, 14} <= set(cache.left_out)
    assert torch.equal(found[10], slow(SIGMAS[10]))


def test_first_and_last_steps_and_a_rise_are_computed() -> None:
    cache, _ = run(Pace(9, 4), slow)
    assert not {0, 1, STEPS - 1} & set(cache.left_out)
    cache = StepCache(Pace(9, 4), STEPS)
    calls = []
    for i, sigma in enumerate([1.0, 0.9, 0.8, 0.7, 0.95, 0.9, 0.85]):
        cache.denoised(i, sigma, 0, lambda s=sigma: calls.append(s) or slow(s))
    assert calls == [1.0, 0.9, 0.95, 0.9]
