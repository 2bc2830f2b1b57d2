"""Schedules and samplers, against closed forms."""

from __future__ import annotations

import pytest
import torch

from sd35_core.errors import SettingError
from sd35_core.sampling.samplers import SAMPLERS
from sd35_core.sampling.schedules import SCHEDULES, make_sigmas, shifted


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("denoise", [1.0, 0.5, 0.07])
def test_a_schedule_falls_to_zero(schedule: str, steps: int, denoise: float) -> None:
    sigmas = make_sigmas(steps, 3.0, schedule, denoise)
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0
    assert (sigmas[:-1] > sigmas[1:]).all()
    assert sigmas[0] <= 1 and (denoise < 1 or sigmas[0] == 1)


def test_denoise_takes_the_end_of_a_longer_schedule() -> None:
    assert torch.equal(make_sigmas(10, 3.0, "normal", 0.5), make_sigmas(20, 3.0)[-11:])


def test_shift_keeps_the_ends_and_raises_the_middle() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(shifted(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.equal(shifted(t, 1.0), t)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 3.0), "steps is 0"),
        ((4, 0.0), "shift is 0.0"),
        ((4, 3.0, "cosine"), "Unknown schedule 'cosine'"),
        ((4, 3.0, "normal", 0.0), "denoise is 0.0"),
        ((4, 3.0, "normal", 1.5), "denoise is 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make_sigmas(*arguments)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_lands_on_the_picture_of_a_perfect_model(name: str) -> None:
    picture = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    out = SAMPLERS[name](
        lambda x, sigma: picture,
        torch.randn_like(picture),
        make_sigmas(6, 3.0),
        callback=lambda state: seen.append(state["i"]),
    )
    assert torch.allclose(out, picture, atol=1e-6)
    assert seen == list(range(6))


def test_second_order_is_closer_than_first_on_a_curved_flow() -> None:
    """x0 drawn from N(m, s): the posterior mean is known, and so is the flow's end."""
    mean, spread = 0.4, 0.3

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sigma = sigma[:, None]
        a, b = 1 - sigma, sigma
        gain = a * spread**2 / (a**2 * spread**2 + b**2)
        return mean + gain * (x - a * mean)

    x = torch.linspace(-2, 2, 9)[:, None]
    exact = mean + spread * x
    sigmas = make_sigmas(12, 1.0, "sgm_uniform")
    errors = {n: (s(denoise, x, sigmas) - exact).abs().max().item() for n, s in SAMPLERS.items()}
    assert errors["dpmpp_2m"] < errors["euler"] / 2 < 0.1
