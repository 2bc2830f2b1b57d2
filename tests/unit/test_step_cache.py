"""Which steps the step cache leaves out, and what it gives in their place."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from sd35_core.step_cache import Pace, StepCache

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


def straight(sigma: float) -> Tensor:
    return torch.tensor([1.0, 2.0]) + sigma * torch.tensor([3.0, -1.0])


def noise(sigma: float) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(int(1e6 * sigma)))


def test_what_is_straight_is_foretold_to_the_end() -> None:
    cache, found = run(Pace(0.1, 2), straight)
    assert cache.left_out == [3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18]
    for value, sigma in zip(found, SIGMAS):
        assert torch.allclose(value, straight(sigma), atol=1e-5)


def test_nothing_is_left_out_where_forecasts_fail() -> None:
    cache, found = run(Pace(0.1, 2), noise)
    assert cache.left_out == []
    assert all(torch.equal(value, noise(sigma)) for value, sigma in zip(found, SIGMAS))


def test_a_change_of_what_acts_is_computed_and_what_was_before_forgotten() -> None:
    def jump(sigma: float) -> Tensor:
        return straight(sigma) + (100 if sigma < SIGMAS[10] + 1e-9 else 0)

    cache, found = run(Pace(0.1, 3), jump, lambda step: step >= 10)
    assert not {10, 11, 12} & set(cache.left_out) and 13 in cache.left_out
    for value, sigma in zip(found, SIGMAS):
        assert torch.allclose(value, jump(sigma), atol=1e-3)


def test_first_and_last_steps_and_a_rise_are_computed() -> None:
    cache, _ = run(Pace(9, 4), straight)
    assert not {0, 1, 2, STEPS - 1} & set(cache.left_out)
    cache = StepCache(Pace(9, 4), STEPS)
    calls = []
    for i, sigma in enumerate([1.0, 0.9, 0.8, 0.7, 0.95, 0.9, 0.85]):
        cache.denoised(i, sigma, 0, lambda s=sigma: calls.append(s) or straight(s))
    assert calls == [1.0, 0.9, 0.8, 0.95, 0.9, 0.85]
