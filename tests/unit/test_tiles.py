"""Tiles of a large latent: where they lie, and how their predictions join."""

from __future__ import annotations

import pytest
import torch

from sd35_core.errors import SettingError
from sd35_core.sampling.tiles import tiling


@pytest.mark.parametrize(
    ("whole", "tile", "overlap"),
    [
        ((64, 96), 32, 8),
        ((33, 65), 32, 0),
        ((20, 200), 32, 16),
        ((128, 128), 48, 46),
        ((7, 5), 32, 4),
    ],
)
def test_tiles_cover_everything_and_overlap_as_asked(
    whole: tuple[int, int], tile: int, overlap: int
) -> None:
    found = tiling(whole, tile, overlap)
    seen = torch.zeros(whole)
    for number in range(len(found)):
        part = found.cut(seen, number)
        assert part.shape == found.size == (min(tile, whole[0]), min(tile, whole[1]))
        part += 1
    assert seen.min() >= 1
    for starts, size in ((found.rows, found.size[0]), (found.columns, found.size[1])):
        assert all(start % 2 == 0 for start in starts[:-1]), "whole patches"
        apart = [b - a for a, b in zip(starts, starts[1:])]
        assert all(0 < step <= size - overlap + 1 for step in apart)


def test_there_are_no_more_tiles_than_are_needed() -> None:
    assert len(tiling((64, 64), 64, 16)) == 1
    assert tiling((112, 64), 64, 16).rows == (0, 48)
    assert tiling((114, 64), 64, 16).rows == (0, 24, 50)


def test_shares_sum_to_one_and_change_smoothly() -> None:
    found = tiling((100, 160), 48, 16)
    total = torch.zeros(100, 160)
    for number, weights in enumerate(found.weights):
        assert weights.min() >= 0
        found.cut(total, number).add_(weights)
        for axis in (0, 1):
            assert weights.diff(dim=axis).abs().max() < 0.12
    assert (total - 1).abs().max() < 1e-6


def test_one_tile_over_everything_is_left_as_it_is() -> None:
    x = torch.randn(2, 16, 20, 30).bfloat16()
    found = tiling((20, 30), 64, 8)
    assert torch.equal(found.blended([found.cut(x, 0)]), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_tiles_agree_on_comes_out_unchanged(dtype: torch.dtype) -> None:
    x = torch.randn(2, 16, 65, 97).to(dtype)
    found = tiling((65, 97), 32, 8)
    joined = found.blended([found.cut(x, n) for n in range(len(found))])
    assert joined.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert (joined.float() - x.float()).abs().max() <= tolerance * x.float().abs().max()


@pytest.mark.parametrize(
    ("tile", "overlap", "words"),
    [(1, 0, "1 cells wide"), (32, 31, "at most 30"), (32, -2, "-2 cells")],
)
def test_what_leaves_no_way_forward_is_refused(tile: int, overlap: int, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        tiling((64, 64), tile, overlap)
