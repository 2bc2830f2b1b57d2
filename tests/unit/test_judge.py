"""The judge of pictures: right on renderings, right after the VAE, at chance on wrong captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageChops

from sd35_core.encoders.autoencoder import TinyAutoencoder
from sd35_core.pipeline import load_vae
from tools.nano.judge import Verdict, delta_e, judge, lab
from tools.nano.pictures import emoji_folder
from tools.nano.scenes import COLOURS, Scene, draw_scene, parse, render

from ..conftest import NANO

SCENES = [draw_scene(10**6 + seed, unseen=True) for seed in range(60)]


@pytest.fixture(scope="module")
def folder() -> Path:
    return emoji_folder()


@pytest.fixture(scope="module")
def pictures(folder: Path) -> list[Image.Image]:
    return [render(scene, folder, seed=i) for i, scene in enumerate(SCENES)]


def verdicts(
    pictures: Sequence[Image.Image], scenes: Sequence[Scene], folder: Path
) -> list[Verdict]:
    return [judge(picture, scene, folder) for picture, scene in zip(pictures, scenes)]


def all_right(verdict: Verdict) -> bool:
    return all(
        (verdict.thing_right, verdict.place_right, verdict.size_right,
         verdict.count_right, verdict.colour_right)
    )  # fmt: skip


@pytest.mark.slow
def test_renderings_are_right_in_everything(pictures: list[Image.Image], folder: Path) -> None:
    found = verdicts(pictures, SCENES, folder)
    assert [s.caption for s, v in zip(SCENES, found) if not all_right(v)] == []


@pytest.mark.slow
def test_what_the_vae_makes_of_renderings_is_still_right(
    pictures: list[Image.Image], folder: Path
) -> None:
    vae: TinyAutoencoder = load_vae(NANO)
    image = torch.from_numpy(numpy.stack([numpy.asarray(p) for p in pictures]))
    with torch.no_grad():
        made = vae.decode(vae.encode(image.permute(0, 3, 1, 2) / 255)).clamp(0, 1)
    again = [Image.fromarray((255 * m).byte().permute(1, 2, 0).numpy()) for m in made]
    assert sum(map(all_right, verdicts(again, SCENES, folder))) >= 0.95 * len(SCENES)


@pytest.mark.slow
def test_with_wrong_captions_it_falls_to_chance(pictures: list[Image.Image], folder: Path) -> None:
    found = verdicts(pictures, SCENES[1:] + SCENES[:1], folder)
    assert sum(verdict.thing_right for verdict in found) <= 3
    assert sum(verdict.colour_right for verdict in found) <= 15


def test_each_fault_is_seen_alone(folder: Path) -> None:
    asked = parse("a big cat at the top left on a red background")

    def seen(caption: str) -> Verdict:
        return judge(render(parse(caption), folder), asked, folder)

    assert not seen("a big dog at the top left on a red background").thing_right
    assert not seen("a big cat at the top on a red background").place_right
    assert not seen("a small cat at the top left on a red background").size_right
    assert not seen("a big cat at the top left on an orange background").colour_right
    assert not seen("a big cat at the top left on a red to blue gradient").colour_right
    assert not seen("three cats on a red background").count_right
    for caption in ("four cats on a red background", "two cats on a red background"):
        many = judge(render(parse(caption), folder), parse("3 cats, red background"), folder)
        assert many.thing_right and not many.count_right


def test_pairs_are_told_from_their_mirror_image(folder: Path) -> None:
    asked = parse("a cat and a dog on a red background")
    turned = judge(render(parse("a dog and a cat on a red background"), folder), asked, folder)
    assert turned.names == ("dog", "cat") and not turned.thing_right
    stacked = judge(render(parse("a cat above a dog, red background"), folder), asked, folder)
    assert stacked.thing_right and not stacked.place_right


def test_noise_and_an_empty_picture_are_no_thing_in_particular(folder: Path) -> None:
    rng = numpy.random.default_rng(0)
    asked = [parse(f"a {name} on a red background") for name in ("cat", "owl", "car", "pizza")]
    noise = Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=numpy.uint8))
    empty = Image.new("RGB", (128, 128), COLOURS["red"])
    for picture in (noise, empty):
        assert sum(judge(picture, scene, folder).thing_right for scene in asked) <= 1


@pytest.mark.slow
def test_a_shift_by_a_pixel_or_two_does_not_matter(
    pictures: list[Image.Image], folder: Path
) -> None:
    moved = [ImageChops.offset(picture, 1, -1) for picture in pictures]
    found = verdicts(moved, SCENES, folder)
    assert sum(verdict.thing_right for verdict in found) >= 0.95 * len(SCENES)


def test_colours_are_compared_in_lab() -> None:
    white, black, red = lab(numpy.array([[1, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=numpy.float32))
    assert white == pytest.approx([100, 0, 0], abs=0.05)
    assert black == pytest.approx([0, 0, 0], abs=1e-6)
    assert red == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert delta_e(numpy.zeros(3, dtype=numpy.float32), (255, 255, 255)) == pytest.approx(100, 1e-3)
    names = list(COLOURS)
    closest = min(
        delta_e(numpy.array(COLOURS[a], dtype=numpy.float32) / 255, COLOURS[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    )
    assert closest > 15, "no colour may pass for another"
