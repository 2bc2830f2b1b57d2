"""Say what a picture shows, without any network: render what it could show, take the nearest.

Distances are squared errors at 64x64 on the picture's own background, so a wrong background does
not make a thing wrong. One thing is compared with every thing at every size and place and with
every counted arrangement; two things with every pair, side by side and stacked.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy
from numpy.typing import NDArray
from PIL import Image

from .scenes import (
    ARRANGEMENTS,
    COLOURS,
    MARGIN,
    PAIRS,
    PLACES,
    SIZES,
    THINGS,
    Placed,
    Scene,
    sprite_of,
)

SIDE = 64
CLOSE = 15.0
"""Colours this near (Delta E, CIE 1976) count as the same."""

Floats = NDArray[numpy.floating]
NAMES = list(THINGS)


@dataclass(frozen=True)
class Verdict:
    """What the picture shows, and what of it was asked for."""

    names: tuple[str, ...]
    size: str
    place: str
    count: int
    colour_error: float
    thing_right: bool
    place_right: bool
    size_right: bool
    count_right: bool

    @property
    def colour_right(self) -> bool:
        return self.colour_error < CLOSE


def judge(picture: Image.Image, scene: Scene, assets: Path) -> Verdict:
    """Compare a picture with everything that a caption of the same kind could ask for."""
    pixels = pixels_of(picture)
    top, bottom = edges(pixels)
    colour_error = max(
        delta_e(top, COLOURS[scene.colours[0]]), delta_e(bottom, COLOURS[scene.colours[-1]])
    )
    share = numpy.linspace(0, 1, SIDE, dtype=numpy.float32)[:, None, None]
    ground = numpy.broadcast_to(top * (1 - share) + bottom * share, pixels.shape)
    seen = _Seen(pixels - ground, ground, assets)
    names, size, place, count = seen.pair() if len(scene.names) == 2 else seen.one_or_many()
    return Verdict(
        names, size, place, count, colour_error,
        thing_right=names == scene.names,
        place_right=place == scene.place,
        size_right=size == scene.size,
        count_right=count == scene.count,
    )  # fmt: skip


class _Seen:
    """A picture's difference from its background, and how well things explain it."""

    def __init__(self, difference: Floats, ground: Floats, assets: Path):
        self.difference, self.ground, self.assets = difference, ground, assets
        self.gains: dict[Placed, Floats] = {}

    def gain(self, share: float, x: float, y: float) -> Floats:
        """How much less squared error each thing leaves when put there; one number per thing."""
        key = Placed("", share, x, y)
        if key not in self.gains:
            colour, alpha = sprites(share, self.assets)
            pixels = alpha.shape[1]
            left, top = (round((SIDE - pixels) / 2 * (1 + MARGIN * where)) for where in (x, y))
            window = (slice(top, top + pixels), slice(left, left + pixels))
            step = colour - alpha * self.ground[window]
            # |d|^2 - |d - s|^2 = 2 d.s - s.s
            cross = numpy.tensordot(step, self.difference[window], axes=3)
            self.gains[key] = 2 * cross - numpy.einsum("nijk,nijk->n", step, step)
        return self.gains[key]

    def one_or_many(self) -> tuple[tuple[str, ...], str, str, int]:
        """The nearest single thing or counted arrangement: names, size, place, count."""
        options = {
            (size, place, 1): self.gain(share, *where)
            for (size, share), (place, where) in itertools.product(SIZES.items(), PLACES.items())
        }
        for count, (share, places) in ARRANGEMENTS.items():
            gains = [self.gain(share, *where) for where in places]
            options["", "", count] = numpy.sum(gains, axis=0)
        size, place, count = max(options, key=lambda option: float(options[option].max()))
        return (NAMES[options[size, place, count].argmax()],), size, place, count

    def pair(self) -> tuple[tuple[str, ...], str, str, int]:
        """The nearest pair: names, "", place, 1."""

        def gains(place: str) -> list[Floats]:
            return [self.gain(0.46, *where) for where in PAIRS[place]]

        place = max(PAIRS, key=lambda place: sum(float(gain.max()) for gain in gains(place)))
        return tuple(NAMES[gain.argmax()] for gain in gains(place)), "", place, 1


@cache
def sprites(share: float, assets: Path) -> tuple[Floats, Floats]:
    """All things at one size: colour times alpha (256, p, p, 3) and alpha (256, p, p, 1), 0..1."""
    pixels = round(share * SIDE)
    drawn = numpy.stack([numpy.asarray(sprite_of(name, pixels, assets)) for name in NAMES])
    drawn = drawn.astype(numpy.float32) / 255
    alpha = drawn[..., 3:]
    return drawn[..., :3] * alpha, alpha


def pixels_of(picture: Image.Image) -> Floats:
    """(64, 64, 3) in 0..1."""
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return numpy.asarray(small, dtype=numpy.float32) / 255


def edges(pixels: Floats) -> tuple[Floats, Floats]:
    """The colours of the background at the top and at the bottom, (3,) each."""
    if spread(pixels) < 0.03:
        ring = numpy.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        middle = numpy.median(ring, axis=0)
        return middle, middle
    return numpy.median(pixels[0], axis=0), numpy.median(pixels[-1], axis=0)


def spread(pixels: Floats) -> float:
    """How far apart the middle colours of the first and the last row are."""
    first, last = (numpy.median(pixels[row], axis=0) for row in (0, -1))
    return float(numpy.abs(first - last).max())


def delta_e(found: Floats, wanted: tuple[int, int, int]) -> float:
    """The distance in CIE L*a*b*, D65 (CIE 1976), of sRGB colours; found: 0..1, wanted: 0..255."""
    both = lab(numpy.stack([found, numpy.array(wanted, dtype=numpy.float32) / 255]))
    return float(numpy.linalg.norm(both[0] - both[1]))


def lab(colours: Floats) -> Floats:
    """sRGB (N, 3) in 0..1 -> L*a*b* (N, 3)."""
    linear = numpy.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = numpy.array(
        [[0.4124564, 0.3575761, 0.1804375],
         [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]]
    )  # fmt: skip
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = numpy.where(xyz > 216 / 24389, numpy.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f.T
    return numpy.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
