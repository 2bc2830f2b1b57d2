"""Guidance: windows counted in steps, layer lists, the formulas."""

from __future__ import annotations

import pytest
import torch

from sd35_core.errors import SettingError
from sd35_core.sampling.guidance import SkipLayers, away_from_skipped, guided, parse_layers, step_of
from sd35_core.sampling.schedules import SCHEDULES, make_sigmas

OFFICIAL = SkipLayers(frozenset({7, 8, 9}), scale=2.5, start=0.01, end=0.20)


@pytest.mark.parametrize(("steps", "fired"), [(20, 3), (28, 5), (40, 7), (50, 9)])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "beta"])
def test_the_official_window_fires_on_the_same_steps_of_every_schedule(
    schedule: str, steps: int, fired: int
) -> None:
    sigmas = make_sigmas(steps, 3.0, schedule)
    active = [OFFICIAL.active(step_of(s, sigmas), steps) for s in sigmas[:-1]]
    assert sum(active) == fired
    assert active.index(True) == 1


def test_calls_between_two_levels_belong_to_the_step_under_way() -> None:
    sigmas = torch.tensor([1.0, 0.5, 0.25, 0.0])
    assert [step_of(s, sigmas) for s in torch.tensor([1.0, 0.7, 0.5, 0.3, 0.25, 0.1, 0.0])] == [
        0,
        0,
        1,
        1,
        2,
        2,
        2,
    ]


def test_no_scale_or_no_layers_never_fires() -> None:
    assert not SkipLayers(frozenset({1}), 0.0, 0.0, 1.0).active(2, 10)
    assert not SkipLayers(frozenset(), 1.0, 0.0, 1.0).active(2, 10)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("7, 8, 9", {7, 8, 9}), ("7-9", {7, 8, 9}), ("7 8;9", {7, 8, 9}), ("", set()), ("3,3", {3})],
)
def test_layer_lists_are_read_as_people_write_them(text: str, layers: set[int]) -> None:
    assert parse_layers(text, 24) == layers


@pytest.mark.parametrize("text", ["7, x", "-1", "7.5", "7--9", "９x", "1e3"])
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(SettingError, match="is not a layer number"):
        parse_layers(text)


def test_layers_outside_the_model_are_refused_with_its_range() -> None:
    with pytest.raises(SettingError, match="layers 0 to 23; there is no layer 24, 25"):
        parse_layers("7, 24, 25", 24)


def test_the_formulas() -> None:
    uncond, cond, skipped = (torch.tensor([v]) for v in (1.0, 3.0, 2.0))
    assert guided(uncond, cond, 4.0).item() == 9.0
    assert away_from_skipped(guided(uncond, cond, 4.0), cond, skipped, 2.5).item() == 11.5
