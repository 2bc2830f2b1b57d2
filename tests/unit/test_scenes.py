"""The scenes that the small model learns from, and the captions that describe them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.nano.pictures import emoji_folder
from tools.nano.scenes import (
    ARRANGEMENTS,
    COLOURS,
    NUMERALS,
    PLACES,
    SIZES,
    THINGS,
    Scene,
    article,
    draw_scene,
    parse,
    plural,
    render,
)

SCENES = [draw_scene(seed) for seed in range(4000)]


def test_there_are_at_least_250_things_each_with_its_own_picture() -> None:
    assert len(THINGS) >= 250
    assert len(set(THINGS.values())) == len(THINGS)
    folder = emoji_folder()
    assert [code for code in THINGS.values() if not (folder / f"{code}.webp").is_file()] == []


def test_every_caption_says_exactly_what_its_scene_shows() -> None:
    assert [scene for scene in SCENES if parse(scene.caption) != scene] == []


def test_captions_vary_and_cover_the_grammar() -> None:
    captions = " | ".join(scene.caption for scene in SCENES)
    for words in (
        "a picture of", "large", "little", "in the center", "corner on", "next to", "above",
        "below", "on the left and", "three", " 3 ", "gradient", ", navy",
    ):  # fmt: skip
        assert words in captions, words
    one = [scene for scene in SCENES if scene.count == 1 and len(scene.names) == 1]
    assert {scene.place for scene in one} == set(PLACES)
    assert {scene.size for scene in one} == set(SIZES)
    assert {scene.count for scene in SCENES} == {1, *NUMERALS} == {1, *ARRANGEMENTS}
    assert {colour for scene in SCENES for colour in scene.colours} == set(COLOURS)
    assert 0.15 < sum(len(scene.names) == 2 for scene in SCENES) / len(SCENES) < 0.25


def test_training_never_shows_what_is_held_out() -> None:
    seen = {
        (name, colour, scene.place, scene.count)
        for scene in SCENES
        for name in scene.names
        for colour in scene.colours
        if len(scene.names) == 1
    }
    unseen = [draw_scene(10**6 + seed, unseen=True) for seed in range(500)]
    for scene in unseen:
        if len(scene.names) == 1 and len(scene.colours) == 1:
            assert (scene.names[0], scene.colours[0], scene.place, scene.count) not in seen
    assert not any(scene.held_out() for scene in SCENES)
    assert all(scene.held_out() for scene in unseen)


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        (
            "a small avocado at the top left on a sky blue background",
            Scene(("avocado",), ("sky blue",), "small", "at the top left"),
        ),
        ("three apples on a red background", Scene(("apple",), ("red",), "", "", 3)),
        ("5 MICE, navy to  pink gradient", Scene(("mouse",), ("navy", "pink"), "", "", 5)),
        ("an orange on an orange background", Scene(("orange",), ("orange",))),
        (
            "a hot dog below a traffic light, white background",
            Scene(("traffic light", "hot dog"), ("white",), place="stacked"),
        ),
        (
            "a cat on the left and a dog on the right on a teal background",
            Scene(("cat", "dog"), ("teal",), place="side by side"),
        ),
    ],
)
def test_captions_are_read(caption: str, scene: Scene) -> None:
    found = parse(caption)
    assert found == Scene(scene.names, scene.colours, scene.size, scene.place, scene.count, caption)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a gearbox on a red background", "'gearbox' is not a thing"),
        ("a cat on a mauve background", "'mauve' is not one or two of the colours white,"),
        ("a cat on a red and blue and pink background", "is not one or two of the colours"),
        ("a cat in the attic on a red background", "'in the attic' is not one of at the top"),
        ("a cat", "is not of the form"),
        ("", "is not of the form"),
    ],
)
def test_other_captions_are_refused(caption: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(caption)


def test_words_get_their_article_and_plural() -> None:
    assert [article(w) for w in ("apple", "unicorn", "small egg", "bread")] == [
        "an apple", "a unicorn", "a small egg", "bread",
    ]  # fmt: skip
    assert [plural(w) for w in ("cherry", "fox", "monkey", "wolf", "watch", "sheep")] == [
        "cherries", "foxes", "monkeys", "wolves", "watches", "sheep",
    ]  # fmt: skip


def test_a_scene_looks_the_same_again_and_fills_other_shapes() -> None:
    scene, folder = parse("a big cat on the right on a lime background"), emoji_folder()
    assert render(scene, folder, seed=3).tobytes() == render(scene, folder, seed=3).tobytes()
    wide = render(scene, folder, (160, 96), seed=3)
    assert wide.size == (160, 96) and wide.getpixel((4, 48)) == COLOURS["lime"]
    assert wide.getpixel((120, 48)) != COLOURS["lime"]


def test_things_never_touch_the_edge() -> None:
    folder: Path = emoji_folder()
    for place in PLACES:
        scene = Scene(("dice",), ("white",), "big", place)
        for seed in range(5):
            picture = render(scene, folder, seed=seed)
            assert all(picture.getpixel((0, y)) == COLOURS["white"] for y in range(128))
