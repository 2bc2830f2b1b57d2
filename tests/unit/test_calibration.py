"""What quantizing is calibrated on: calls of a network, and the moments of its layers."""

from __future__ import annotations

import torch

from sd35_core.quantization.calibration import (
    TOKENS,
    Call,
    Calls,
    gathered,
    moments_of,
    recorded,
)

from .models import TINY, random_inputs, random_model


def test_moments_are_those_of_a_whole_run() -> None:
    network, inputs = random_model(TINY), random_inputs(TINY)
    with recorded(network) as calls, gathered(network, "") as expected:
        network(*inputs)
    found = {}
    for block in moments_of(network, [calls[0]], torch.device("cpu")):
        found |= block
    assert len(found) == 41
    for key, moment in found.items():
        assert torch.allclose(moment, expected[f".{key}"], rtol=1e-4, atol=1e-6), key


def test_recorded_calls_are_thinned_to_rows_from_the_whole_run() -> None:
    network = random_model(TINY)
    with recorded(network) as calls, torch.no_grad():
        for step in range(40):
            x, _, context, y = random_inputs(TINY, batch=8, seed=step)
            network(x, torch.full((8,), float(step)), context, y)
    chosen = calls.chosen()
    steps = [float(call.timestep[0]) for call in chosen]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] >= 38
    tokens = sum(call.x.shape[0] * 24 for call in chosen)
    assert tokens <= TOKENS * 1.1 and all(len(call.x) == len(call.y) for call in chosen)


def test_prompts_that_come_in_turns_with_the_negative_one_are_both_kept() -> None:
    """As a host calls whose memory is short."""
    calls = Calls()
    for i in range(500):
        side = torch.full((1, 16, 8, 8), float(i % 2))
        calls.hear(Call(side, side, side, side))
    assert 20 < len(calls) <= 64
    assert {float(call.x.mean()) for call in calls} == {0.0, 1.0}
    assert {float(call.x.mean()) for call in calls.chosen()} == {0.0, 1.0}
