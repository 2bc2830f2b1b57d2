"""Scenes for the small model: things on coloured backgrounds, each with a caption that says so.

The pictures are Microsoft's Fluent Emoji 3D (MIT). A scene is drawn from a seed alone.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

THINGS: dict[str, str] = {
    "apple": "1f34e", "avocado": "1f951", "banana": "1f34c", "bear": "1f43b",
    "bell": "1f514", "bicycle": "1f6b2", "boat": "26f5", "bee": "1f41d",
    "book": "1f4d5", "bread": "1f35e", "broccoli": "1f966", "burger": "1f354",
    "bus": "1f68c", "butterfly": "1f98b", "cactus": "1f335", "cake": "1f382",
    "camel": "1f42b", "camera": "1f4f7", "candle": "1f56f-fe0f", "car": "1f697",
    "carrot": "1f955", "castle": "1f3f0", "cat": "1f431", "chair": "1fa91",
    "cheese": "1f9c0", "cherries": "1f352", "chick": "1f424", "clock": "23f0",
    "cloud": "2601-fe0f", "clover": "2618-fe0f", "coconut": "1f965", "cookie": "1f36a",
    "corn": "1f33d", "cow": "1f42e", "crab": "1f980", "croissant": "1f950",
    "crown": "1f451", "dog": "1f436", "dolphin": "1f42c", "doughnut": "1f369",
    "door": "1f6aa", "dragon": "1f432", "drum": "1f941", "duck": "1f986",
    "egg": "1f95a", "eggplant": "1f346", "elephant": "1f418", "fire": "1f525",
    "fish": "1f420", "flamingo": "1f9a9", "fox": "1f98a", "frog": "1f438",
    "ghost": "1f47b", "gift": "1f381", "giraffe": "1f992", "glasses": "1f453",
    "globe": "1f30d", "grapes": "1f347", "guitar": "1f3b8", "hammer": "1f528",
    "hamster": "1f439", "hat": "1f3a9", "heart": "2764-fe0f", "hedgehog": "1f994",
    "helicopter": "1f681", "honey": "1f36f", "horse": "1f434", "house": "1f3e0",
    "ice cream": "1f368", "key": "1f511", "kite": "1fa81", "kiwi": "1f95d",
    "koala": "1f428", "ladybug": "1f41e", "lemon": "1f34b", "lightbulb": "1f4a1",
    "lion": "1f981", "lobster": "1f99e", "lock": "1f512", "mango": "1f96d",
    "monkey": "1f435", "moon": "1f319", "mouse": "1f42d", "mushroom": "1f344",
    "octopus": "1f419", "onion": "1f9c5", "orange": "1f34a", "owl": "1f989",
    "palm tree": "1f334", "panda": "1f43c", "parrot": "1f99c", "peach": "1f351",
    "pear": "1f350", "pencil": "270f-fe0f", "penguin": "1f427", "pig": "1f437",
    "pineapple": "1f34d", "pizza": "1f355", "plane": "2708-fe0f", "popcorn": "1f37f",
    "potato": "1f954", "pretzel": "1f968", "pumpkin": "1f383", "rabbit": "1f430",
    "robot": "1f916", "rocket": "1f680", "rose": "1f339", "shark": "1f988",
    "sheep": "1f411", "shoe": "1f45f", "skull": "1f480", "smiley": "1f600",
    "snail": "1f40c", "snake": "1f40d", "snowman": "26c4", "sock": "1f9e6",
    "spider": "1f577-fe0f", "star": "2b50", "strawberry": "1f353", "sun": "1f31e",
    "sunflower": "1f33b", "taco": "1f32e", "tent": "26fa", "tiger": "1f42f",
    "tomato": "1f345", "tractor": "1f69c", "train": "1f682", "trophy": "1f3c6",
    "truck": "1f69a", "trumpet": "1f3ba", "tulip": "1f337", "turtle": "1f422",
    "umbrella": "2602-fe0f", "unicorn": "1f984", "violin": "1f3bb", "waffle": "1f9c7",
    "watermelon": "1f349", "whale": "1f433", "wolf": "1f43a", "zebra": "1f993",
}  # fmt: skip

FAMILIAR = (
    "apple", "avocado", "banana", "bear", "bee", "burger", "cactus", "carrot",
    "cat", "cherries", "crab", "dog", "duck", "elephant", "fire", "fish",
    "frog", "ghost", "heart", "lemon", "mushroom", "owl", "panda", "penguin",
    "pig", "pumpkin", "rocket", "star", "strawberry", "sunflower", "watermelon", "whale",
)  # fmt: skip
"""The things of the second stage of training: those that the shipped model draws."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248), "black": (24, 24, 28), "grey": (140, 142, 148),
    "red": (208, 44, 48), "orange": (244, 140, 40), "yellow": (250, 214, 60),
    "lime": (164, 214, 70), "green": (40, 140, 72), "teal": (24, 140, 140),
    "sky blue": (124, 196, 240), "blue": (40, 88, 200), "navy": (24, 34, 88),
    "purple": (124, 62, 170), "pink": (246, 160, 196), "brown": (122, 80, 50),
    "beige": (232, 216, 184),
}  # fmt: skip

PLACES: dict[str, tuple[float, float]] = {
    "at the top left": (-1, -1), "at the top": (0, -1), "at the top right": (1, -1),
    "on the left": (-1, 0), "in the middle": (0, 0), "on the right": (1, 0),
    "at the bottom left": (-1, 1), "at the bottom": (0, 1), "at the bottom right": (1, 1),
}  # fmt: skip

SIZES: dict[str, float] = {"small": 0.36, "": 0.55, "big": 0.8}
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Thing:
    name: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    colours: tuple[str, ...]
    caption: str


def held_out(thing: str, colour: str, place: str) -> bool:
    """Whether a combination is kept from training; the same on every machine."""
    return zlib.crc32(f"{thing}|{colour}|{place}".encode()) % 1000 < 1000 * HELD_OUT_SHARE


def article(words: str) -> str:
    if words in ("glasses", "cherries", "grapes", "honey", "bread", "fire", "corn", "popcorn"):
        return words
    return f"an {words}" if words[0] in "aeiou" and not words.startswith("uni") else f"a {words}"


def draw_scene(seed: int, unseen: bool = False) -> Scene:
    """A random scene; `unseen` ones hold a combination that training never shows."""
    rng = random.Random(seed)
    while True:
        scene = _two(rng) if rng.random() < 0.22 else _one(rng)
        combinations = [(t.name, c, t.place) for t in scene.things for c in scene.colours]
        if unseen == any(held_out(*combination) for combination in combinations):
            return scene


def _background(rng: random.Random) -> tuple[tuple[str, ...], str]:
    first, second = rng.sample(list(COLOURS), 2)
    if rng.random() < 0.15:
        return (first, second), f"{first} and {second}"
    return (first,), first


def _one(rng: random.Random) -> Scene:
    name = rng.choice(list(THINGS))
    size = rng.choice(["", "", "small", "big"])
    place = rng.choice(list(PLACES)) if rng.random() < 0.65 and size != "big" else "in the middle"
    colours, colour_words = _background(rng)
    noun = article(f"{size} {name}".strip())
    where = "" if place == "in the middle" and rng.random() < 0.7 else f" {place}"
    ground = "gradient" if len(colours) > 1 and rng.random() < 0.5 else "background"
    style = rng.random()
    if style < 0.7:
        caption = f"{noun}{where} on {article(f'{colour_words} {ground}')}"
    elif style < 0.85:
        caption = f"{f'{size} {name}'.strip()}{where}, {colour_words} {ground}"
    else:
        caption = f"a picture of {noun}{where}, {colour_words} {ground}"
    return Scene((Thing(name, size, place),), colours, caption)


def _two(rng: random.Random) -> Scene:
    first, second = rng.sample(list(THINGS), 2)
    colours, colour_words = _background(rng)
    things = (Thing(first, "two", "on the left"), Thing(second, "two", "on the right"))
    style = rng.random()
    if style < 0.6:
        words = f"{article(first)} and {article(second)}"
    elif style < 0.8:
        words = f"{article(first)} on the left and {article(second)} on the right"
    else:
        words = f"{article(first)} next to {article(second)}"
    return Scene(things, colours, f"{words} on {article(f'{colour_words} background')}")


def render(scene: Scene, assets: Path, size: int = 128, seed: int = 0) -> Image.Image:
    """The picture of a scene, RGB, size x size; `seed` moves things by a hair."""
    rng = random.Random(seed)
    image = _ground(scene.colours, size)
    for thing in scene.things:
        share = SIZES.get(thing.size, 0.46) * rng.uniform(0.96, 1.04)
        pixels = round(share * size)
        room = (size - pixels) / 2
        horizontal, vertical = PLACES[thing.place]
        reach = 0.94 if thing.size != "two" else 0.86
        x = room + horizontal * room * reach + rng.uniform(-0.012, 0.012) * size
        y = room + vertical * room * reach + rng.uniform(-0.012, 0.012) * size
        sprite = _sprite(THINGS[thing.name], assets).resize(
            (pixels, pixels), Image.Resampling.LANCZOS
        )
        image.paste(sprite, (round(x), round(y)), sprite)
    return image


def _ground(colours: tuple[str, ...], size: int) -> Image.Image:
    top = Image.new("RGB", (size, size), COLOURS[colours[0]])
    if len(colours) == 1:
        return top
    bottom = Image.new("RGB", (size, size), COLOURS[colours[1]])
    ramp = Image.linear_gradient("L").resize((size, size))
    return Image.composite(bottom, top, ramp)


_sprites: dict[str, Image.Image] = {}


def _sprite(code: str, assets: Path) -> Image.Image:
    if code not in _sprites:
        with Image.open(assets / f"{code}.webp") as image:
            _sprites[code] = image.convert("RGBA")
    return _sprites[code]
