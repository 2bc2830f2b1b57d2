"""The lesson with digits: its pictures, captions and settings. (Training takes 37 minutes.)"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from examples import mnist
from sd35_core.pipeline import Settings
from sd35_core.training.config import read_config


def test_captions_name_the_digits_in_words_and_numerals() -> None:
    rng = random.Random(0)
    shown = [[rng.randrange(10) for _ in range(8)] for _ in range(200)]
    words = [mnist.caption(each, rng) for each in shown]
    assert [mnist.in_caption(each) for each in words] == shown
    assert set(" ".join(words).split()) == {*mnist.WORDS, *"0123456789"}
    assert all(len(mnist.in_caption(words)) == 8 for words in mnist.TUTORIAL)


def test_digits_stand_row_by_row_and_come_back() -> None:
    cells = torch.arange(8 * 28 * 28).view(8, 28, 28)
    picture = mnist.grid(cells)
    assert picture.shape == (56, 112)
    assert torch.equal(picture[:28, 28:56], cells[1]) and torch.equal(picture[28:, :28], cells[4])
    assert torch.equal(mnist.cells(picture), cells)


def test_the_lesson_is_an_sd35_in_pixels() -> None:
    config = read_config(Path(mnist.__file__).with_suffix(".toml"))
    network = config.network
    assert network.in_channels == 1 and network.qk_norm and network.dual_blocks
    assert config.sizes == ((112, 56),) and 112 % network.patch_size == 0
    longest = max(len(words.split()) for words in mnist.TUTORIAL)
    assert longest + 2 <= config.prompt_tokens, "start and end are tokens too"
    assert Settings.steps == 28
