"""Scenes for the small model: things on coloured backgrounds, each with a caption that says so.

The pictures are Microsoft's Fluent Emoji 3D (MIT). A scene is drawn from a seed alone; `parse`
reads a caption back.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFilter

THINGS: dict[str, str] = {
    # animals
    "ant": "1f41c", "bat": "1f987", "bear": "1f43b", "bee": "1f41d", "bison": "1f9ac",
    "butterfly": "1f98b", "camel": "1f42b", "cat": "1f431", "caterpillar": "1f41b",
    "chick": "1f424", "chicken": "1f414", "cow": "1f42e", "crab": "1f980", "crocodile": "1f40a",
    "deer": "1f98c", "dinosaur": "1f995", "dog": "1f436", "dolphin": "1f42c", "dragon": "1f432",
    "duck": "1f986", "eagle": "1f985", "elephant": "1f418", "fish": "1f420", "flamingo": "1f9a9",
    "fox": "1f98a", "frog": "1f438", "giraffe": "1f992", "hamster": "1f439", "hedgehog": "1f994",
    "hippo": "1f99b", "horse": "1f434", "kangaroo": "1f998", "koala": "1f428", "ladybug": "1f41e",
    "lion": "1f981", "llama": "1f999", "lobster": "1f99e", "monkey": "1f435", "mouse": "1f42d",
    "octopus": "1f419", "owl": "1f989", "panda": "1f43c", "parrot": "1f99c", "peacock": "1f99a",
    "penguin": "1f427", "pig": "1f437", "rabbit": "1f430", "raccoon": "1f99d", "rhino": "1f98f",
    "rooster": "1f413", "scorpion": "1f982", "seal": "1f9ad", "shark": "1f988", "sheep": "1f411",
    "shrimp": "1f990", "skunk": "1f9a8", "sloth": "1f9a5", "snail": "1f40c", "snake": "1f40d",
    "spider": "1f577-fe0f", "squid": "1f991", "squirrel": "1f43f-fe0f", "swan": "1f9a2",
    "tiger": "1f42f", "turtle": "1f422", "unicorn": "1f984", "whale": "1f433", "wolf": "1f43a",
    "zebra": "1f993",
    # plants
    "cactus": "1f335", "clover": "1f340", "pine tree": "1f332", "palm tree": "1f334",
    "maple leaf": "1f341", "rose": "1f339", "sunflower": "1f33b", "tulip": "1f337",
    "mushroom": "1f344",
    # food
    "apple": "1f34e", "avocado": "1f951", "bacon": "1f953", "bagel": "1f96f", "banana": "1f34c",
    "beer": "1f37a", "bell pepper": "1fad1", "blueberry": "1fad0", "bread": "1f35e",
    "broccoli": "1f966", "burger": "1f354", "butter": "1f9c8", "cake": "1f382", "candy": "1f36c",
    "carrot": "1f955", "cheese": "1f9c0", "cherry": "1f352", "chili": "1f336-fe0f",
    "chocolate bar": "1f36b", "coconut": "1f965", "coffee": "2615", "cookie": "1f36a",
    "corn": "1f33d", "croissant": "1f950", "cucumber": "1f952", "cupcake": "1f9c1",
    "doughnut": "1f369", "egg": "1f95a", "eggplant": "1f346", "garlic": "1f9c4", "grape": "1f347",
    "hot dog": "1f32d", "ice cream": "1f366", "juice": "1f9c3", "kiwi": "1f95d", "lemon": "1f34b",
    "lollipop": "1f36d", "milk": "1f95b", "onion": "1f9c5", "orange": "1f34a", "pancake": "1f95e",
    "peach": "1f351", "pear": "1f350", "pineapple": "1f34d", "pizza": "1f355", "popcorn": "1f37f",
    "pretzel": "1f968", "rice ball": "1f359", "sandwich": "1f96a", "strawberry": "1f353",
    "sushi": "1f363", "taco": "1f32e", "teapot": "1fad6", "tomato": "1f345", "waffle": "1f9c7",
    "watermelon": "1f349",
    # faces
    "alien": "1f47d", "angry face": "1f621", "clown": "1f921", "cold face": "1f976",
    "cool face": "1f60e", "cowboy": "1f920", "crying face": "1f62d", "devil": "1f608",
    "ghost": "1f47b", "loving face": "1f60d", "party face": "1f973", "robot": "1f916",
    "sick face": "1f922", "skull": "1f480", "sleeping face": "1f634", "smiley": "1f600",
    "snowman": "26c4",
    # objects
    "accordion": "1fa97", "ambulance": "1f691", "anchor": "2693", "axe": "1fa93",
    "backpack": "1f392", "balloon": "1f388", "basketball": "1f3c0", "bed": "1f6cf-fe0f",
    "bell": "1f514", "bicycle": "1f6b2", "boat": "26f5", "bomb": "1f4a3", "book": "1f4d5",
    "boot": "1f462", "briefcase": "1f4bc", "broom": "1f9f9", "bucket": "1faa3", "bus": "1f68c",
    "camera": "1f4f7", "candle": "1f56f-fe0f", "cap": "1f9e2", "car": "1f697", "castle": "1f3f0",
    "chair": "1fa91", "clock": "23f0", "cloud": "2601-fe0f", "compass": "1f9ed", "crown": "1f451",
    "dice": "1f3b2", "door": "1f6aa", "dress": "1f457", "drum": "1f941", "envelope": "2709-fe0f",
    "fire": "1f525", "football": "1f3c8", "gem": "1f48e", "gift": "1f381", "globe": "1f30d",
    "guitar": "1f3b8", "hammer": "1f528", "hat": "1f3a9", "heart": "2764-fe0f",
    "helicopter": "1f681", "hourglass": "231b", "house": "1f3e0", "jeans": "1f456", "key": "1f511",
    "kite": "1fa81", "lantern": "1f3ee", "laptop": "1f4bb", "lightbulb": "1f4a1",
    "lipstick": "1f484", "lock": "1f512", "magnet": "1f9f2", "medal": "1f3c5", "megaphone": "1f4e3",
    "microphone": "1f3a4", "microscope": "1f52c", "moon": "1f319", "motorcycle": "1f3cd-fe0f",
    "mountain": "1f3d4-fe0f", "palette": "1f3a8", "pencil": "270f-fe0f", "phone": "1f4f1",
    "piano": "1f3b9", "pill": "1f48a", "plane": "2708-fe0f", "planet": "1fa90", "pumpkin": "1f383",
    "rainbow": "1f308", "ring": "1f48d", "rocket": "1f680", "saxophone": "1f3b7",
    "scissors": "2702-fe0f", "scooter": "1f6f5", "shield": "1f6e1-fe0f", "ship": "1f6a2",
    "shirt": "1f455", "shoe": "1f45f", "skateboard": "1f6f9", "snowflake": "2744-fe0f",
    "soccer ball": "26bd", "sock": "1f9e6", "star": "2b50", "suitcase": "1f9f3", "sun": "1f31e",
    "sunglasses": "1f576-fe0f", "taxi": "1f695", "teddy bear": "1f9f8", "telescope": "1f52d",
    "television": "1f4fa", "tent": "26fa", "toothbrush": "1faa5", "tractor": "1f69c",
    "traffic light": "1f6a6", "train": "1f682", "trophy": "1f3c6", "truck": "1f69a",
    "trumpet": "1f3ba", "umbrella": "2602-fe0f", "violin": "1f3bb", "volcano": "1f30b",
    "watch": "231a", "wheel": "1f6de", "yarn": "1f9f6",
}  # fmt: skip

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
"""Words and where they put a thing, -1..1 across and down the room that its size leaves."""

PLACE_WORDS: dict[str, tuple[str, ...]] = {
    place: (place, place.replace("at the", "in the") + " corner")
    for place in PLACES
    if place.endswith(("top left", "top right", "bottom left", "bottom right"))
} | {"in the middle": ("in the middle", "in the center")}

SIZES: dict[str, float] = {"small": 0.36, "": 0.55, "big": 0.76}
"""Words and the side of a thing, as a share of the picture's shorter side."""

SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "big": ("big", "large")}

PAIRS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "side by side": ((-1, 0), (1, 0)),
    "stacked": ((0, -1), (0, 1)),
}

NUMERALS: dict[int, tuple[str, ...]] = {
    2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4"), 5: ("five", "5"),
}  # fmt: skip

ARRANGEMENTS: dict[int, tuple[float, tuple[tuple[float, float], ...]]] = {
    2: (0.46, ((-1, 0), (1, 0))),
    3: (0.44, ((0, -1), (-1, 1), (1, 1))),
    4: (0.42, ((-1, -1), (1, -1), (-1, 1), (1, 1))),
    5: (0.34, ((-1, -1), (1, -1), (0, 0), (-1, 1), (1, 1))),
}
"""How so many equal things stand: their size, and their places."""

UNCOUNTED = (
    "bacon", "bread", "broccoli", "butter", "cheese", "corn", "dice", "fire", "garlic",
    "jeans", "popcorn", "scissors", "sunglasses", "sushi", "yarn",
)  # fmt: skip
"""Words without an article, and never counted."""

PLURALS = {
    "mouse": "mice", "wolf": "wolves", "fish": "fish", "sheep": "sheep", "shrimp": "shrimp",
    "deer": "deer", "bison": "bison", "cactus": "cacti", "maple leaf": "maple leaves",
    "snowman": "snowmen", "tomato": "tomatoes", "volcano": "volcanoes",
}  # fmt: skip

MARGIN = 0.92
"""How much of the room a place uses, so that nothing touches the edge."""

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Placed:
    """One thing in the picture: its side as a share of the shorter side, its place in the room."""

    name: str
    share: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What a caption says: one thing, two different ones (`names`), or `count` equal ones.

    `place` is a key of PLACES for one thing, of PAIRS for two, and empty for a count. `at` is
    (share, x, y) of a thing whose caption does not say where it is.
    """

    names: tuple[str, ...]
    colours: tuple[str, ...]
    size: str = ""
    place: str = "in the middle"
    count: int = 1
    caption: str = ""
    at: tuple[float, float, float] | None = None

    def placed(self) -> list[Placed]:
        """Every thing with its size and place."""
        if len(self.names) == 2:
            return [Placed(n, 0.46, *xy) for n, xy in zip(self.names, PAIRS[self.place])]
        (name,) = self.names
        if self.at is not None:
            return [Placed(name, *self.at)]
        if self.count > 1:
            share, places = ARRANGEMENTS[self.count]
            return [Placed(name, share, *xy) for xy in places]
        return [Placed(name, SIZES[self.size], *PLACES[self.place])]

    def held_out(self) -> bool:
        """Whether training never shows this; decided by thing, colour and place."""
        where = f"{self.count} of them" if self.count > 1 else self.place
        return any(
            held_out(name, colour, f"{where}{i or ''}")
            for i, name in enumerate(self.names)
            for colour in self.colours
        )


def held_out(thing: str, colour: str, place: str) -> bool:
    """Whether a combination is kept from training; the same on every machine."""
    return zlib.crc32(f"{thing}|{colour}|{place}".encode()) % 1000 < 1000 * HELD_OUT_SHARE


def article(words: str) -> str:
    """'a bear', 'an apple', 'bread'."""
    if words.split()[-1] in UNCOUNTED:
        return words
    return f"an {words}" if words[0] in "aeiou" and not words.startswith("uni") else f"a {words}"


def plural(name: str) -> str:
    """'bears', 'cherries', 'foxes', 'mice'."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "sh", "ch", "x")) else f"{name}s"


def draw_scene(seed: int, unseen: bool = False) -> Scene:
    """A random scene; `unseen` ones hold a combination that training never shows."""
    rng = random.Random(seed)
    while True:
        kind = rng.choices((draw_one, draw_two, draw_many), (62, 20, 18))[0]
        scene = kind(rng)
        if unseen == scene.held_out():
            return scene


def draw_one(rng: random.Random) -> Scene:
    """One thing of any size at any place."""
    name = rng.choice(list(THINGS))
    size = rng.choice(["", "", "small", "big"])
    place = rng.choice(list(PLACES)) if rng.random() < 0.8 else "in the middle"
    colours, ground = _background(rng)
    size_word = rng.choice(SIZE_WORDS[size]) if size else ""
    words = f"{size_word} {name}".strip()
    where = " " + rng.choice(PLACE_WORDS.get(place, (place,)))
    if place == "in the middle" and rng.random() < 0.7:
        where = ""
    caption = _sentence(rng, article(words), words, where, ground)
    return Scene((name,), colours, size, place, caption=caption)


def draw_anywhere(seed: int, unseen: bool = False) -> Scene:
    """One thing of any size anywhere, with a caption that names neither: for ControlNets."""
    rng = random.Random(seed)
    while True:
        name, colour = rng.choice(list(THINGS)), rng.choice(list(COLOURS))
        at = (rng.uniform(0.35, 0.75), rng.uniform(-1, 1), rng.uniform(-1, 1))
        caption = f"{article(name)} on {article(colour)} background"
        scene = Scene((name,), (colour,), caption=caption, at=at)
        if unseen == held_out(name, colour, "anywhere"):
            return scene


def draw_two(rng: random.Random) -> Scene:
    """Two different things, side by side or one above the other."""
    first, second = rng.sample(list(THINGS), 2)
    place = "side by side" if rng.random() < 0.7 else "stacked"
    a, b = article(first), article(second)
    if place == "stacked":
        words = rng.choice([f"{a} above {b}", f"{b} below {a}"])
    else:
        sides = f"{a} on the left and {b} on the right"
        words = rng.choice([f"{a} and {b}", f"{a} and {b}", f"{a} next to {b}", sides])
    colours, ground = _background(rng)
    caption = _sentence(rng, words, words, "", ground)
    return Scene((first, second), colours, place=place, caption=caption)


def draw_many(rng: random.Random) -> Scene:
    """Two to five of the same thing."""
    name = rng.choice([name for name in THINGS if name not in UNCOUNTED])
    count = rng.choice(list(NUMERALS))
    colours, ground = _background(rng)
    words = f"{rng.choice(NUMERALS[count])} {plural(name)}"
    caption = _sentence(rng, words, words, "", ground)
    return Scene((name,), colours, place="", count=count, caption=caption)


def _background(rng: random.Random) -> tuple[tuple[str, ...], str]:
    first, second = rng.sample(list(COLOURS), 2)
    if rng.random() < 0.85:
        return (first,), f"{first} background"
    kinds = ("{} and {} background", "{} and {} gradient", "{} to {} gradient")
    return (first, second), rng.choice(kinds).format(first, second)


def _sentence(rng: random.Random, noun: str, bare: str, where: str, ground: str) -> str:
    style = rng.random()
    if style < 0.7:
        return f"{noun}{where} on {article(ground)}"
    if style < 0.85:
        return f"{bare}{where}, {ground}"
    return f"a picture of {noun}{where}, {ground}"


_SENTENCE = re.compile(
    r"(?:an? (?:picture|photo|image|drawing) of )?(?P<what>.+)(?:,| on)(?: an?| the)? "
    r"(?P<ground>[a-z ]+?) (?:background|gradient)\.?"
)
_SIDES = re.compile(r"(?P<a>.+?) on the left and (?P<b>.+?) on the right")
_PAIR = re.compile(r"(?P<a>.+?) (?P<how>and|next to|beside|above|below|under) (?P<b>.+)")
_NOUN = re.compile(r"(?:(?:an?|the) )?(?P<words>.+?)(?P<place> (?:at|in|on) the .+)?")
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_PLACE_OF = {place: place for place in PLACES} | {
    word: place for place, words in PLACE_WORDS.items() for word in words
}
_COUNT_OF = {word: count for count, words in NUMERALS.items() for word in words}
_NAME_OF = {plural(name): name for name in THINGS} | {name: name for name in THINGS}


def parse(caption: str) -> Scene:
    """The scene that a caption asks for. Raises ValueError, which says what is not understood."""
    sentence = _SENTENCE.fullmatch(" ".join(caption.lower().split()))
    if sentence is None:
        raise ValueError(f"'{caption}' is not of the form '... on a COLOUR background'.")
    what, ground = sentence["what"], sentence["ground"]
    colours = tuple(re.split(" and | to ", ground))
    if len(colours) > 2 or any(colour not in COLOURS for colour in colours):
        known = ", ".join(COLOURS)
        raise ValueError(f"'{caption}': '{ground}' is not one or two of the colours {known}.")
    pair = _SIDES.fullmatch(what) or _PAIR.fullmatch(what)
    if pair is None:
        return _one_or_many(what, colours, caption)
    names = tuple(_one_or_many(pair[side], colours, caption).names[0] for side in "ab")
    how = pair.groupdict().get("how", "and")
    if how in ("below", "under"):
        names = names[::-1]
    place = "stacked" if how in ("above", "below", "under") else "side by side"
    return Scene(names, colours, place=place, caption=caption)


def _one_or_many(words: str, colours: tuple[str, ...], caption: str) -> Scene:
    noun = _NOUN.fullmatch(words)
    assert noun is not None
    name, where = noun["words"], (noun["place"] or " in the middle")[1:]
    first, _, rest = name.partition(" ")
    size, count = _SIZE_OF.get(first, ""), _COUNT_OF.get(first, 1)
    if size or count > 1:
        name = rest
    if name not in _NAME_OF:
        raise ValueError(f"'{caption}': '{name}' is not a thing that the model knows.")
    if where not in _PLACE_OF:
        raise ValueError(f"'{caption}': '{where}' is not one of {', '.join(PLACES)}.")
    place = "" if count > 1 else _PLACE_OF[where]
    return Scene((_NAME_OF[name],), colours, size, place, count, caption)


def render(
    scene: Scene, assets: Path, size: tuple[int, int] = (128, 128), seed: int = 0
) -> Image.Image:
    """The picture of a scene, RGB; size: (width, height). `seed` moves things by a hair."""
    image = ground_of(scene.colours, size)
    for name, pixels, corner in layout(scene, size, seed):
        sprite = sprite_of(name, pixels, assets)
        image.paste(sprite, corner, sprite)
    return image


def depth_map(
    scene: Scene, assets: Path, size: tuple[int, int] = (128, 128), seed: int = 0
) -> Image.Image:
    """The depth of the same picture, L, near bright: things bulge towards the viewer."""
    image = Image.new("L", size, 30)
    for name, pixels, corner in layout(scene, size, seed):
        outline = sprite_of(name, pixels, assets).getchannel("A")
        inside = outline.filter(ImageFilter.GaussianBlur(pixels / 8))
        image.paste(
            inside.point([90 + value * 165 // 255 for value in range(256)]), corner, outline
        )
    return image


def layout(
    scene: Scene, size: tuple[int, int], seed: int
) -> list[tuple[str, int, tuple[int, int]]]:
    """Every thing's name, side in pixels, and left upper corner."""
    rng = random.Random(seed)
    found = []
    for thing in scene.placed():
        pixels = round(thing.share * min(size) * rng.uniform(0.96, 1.04))
        left, top = (
            round((side - pixels) / 2 * (1 + MARGIN * where) + rng.uniform(-0.012, 0.012) * side)
            for side, where in zip(size, (thing.x, thing.y))
        )
        found.append((thing.name, pixels, (left, top)))
    return found


def ground_of(colours: tuple[str, ...], size: tuple[int, int]) -> Image.Image:
    """The background alone: one colour, or from one at the top to the other at the bottom."""
    top = Image.new("RGB", size, COLOURS[colours[0]])
    if len(colours) == 1:
        return top
    bottom = Image.new("RGB", size, COLOURS[colours[1]])
    return Image.composite(bottom, top, Image.linear_gradient("L").resize(size))


_originals: dict[str, Image.Image] = {}


def sprite_of(name: str, pixels: int, assets: Path) -> Image.Image:
    """A thing's picture, RGBA, pixels x pixels."""
    if name not in _originals:
        with Image.open(assets / f"{THINGS[name]}.webp") as image:
            _originals[name] = image.convert("RGBA")
    return _originals[name].resize((pixels, pixels), Image.Resampling.LANCZOS)
