"""Draw the pack's icon and banner: python tools/brand.py

Noise on the left becomes a picture on the right, cell by cell, as a latent does. Written to
docs/icon.png (400x400) and docs/banner.png (1344x576), which pyproject.toml names.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_picture

FOLDER = Path(__file__).resolve().parent.parent / "docs"
Colour = tuple[float, float, float]
GROUND: Colour = (24, 23, 32)
SKY: tuple[Colour, Colour] = (63, 76, 158), (238, 140, 108)
SUN: Colour = (255, 222, 150)
SUN_AT = (0.74, 0.42, 0.21)
"""Across, down, and its radius, in the height."""
HILLS: tuple[Colour, Colour] = (70, 58, 110), (38, 44, 74)
NOISE: tuple[Colour, ...] = (
    (240, 86, 120), (250, 170, 70), (90, 200, 170), (90, 130, 240), (190, 110, 230),
    (245, 240, 235),
)  # fmt: skip
SMOOTH = 4
"""Everything is drawn so many times larger, and made smaller at the end."""


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """From a at 0 to b at 1."""
    share = min(max(share, 0.0), 1.0)
    return tuple(x + (y - x) * share for x, y in zip(a, b))  # pyright: ignore[reportReturnType]


def scene(x: float, y: float, wide: float) -> Colour:
    """A sun between hills, x and y in 0..1 across and down; wide: the width over the height."""
    found = mixed(*SKY, 1.15 * y)
    if math.hypot((x - SUN_AT[0]) * wide, y - SUN_AT[1]) < SUN_AT[2]:
        found = SUN
    for number, (height, colour) in enumerate(zip((0.62, 0.78), HILLS)):
        if y > height + 0.07 * math.sin(5.5 * x + 2.4 * number):
            found = colour
    return found


def grid(columns: int, rows: int, side: float, cleared: float) -> Any:
    """Cells of so many pixels; the picture is whole from the share `cleared` of the width on."""
    from PIL import Image, ImageDraw

    dice = random.Random(35)
    cell = side * SMOOTH
    picture = Image.new("RGB", (round(columns * cell), round(rows * cell)), _bytes(GROUND))
    draw = ImageDraw.Draw(picture)
    for row in range(rows):
        for column in range(columns):
            x, y = (column + 0.5) / columns, (row + 0.5) / rows
            share = x / cleared + 0.16 * (dice.random() - 0.5)
            colour = mixed(
                dice.choice(NOISE), scene(x, y, columns / rows), share**1.6 if share > 0 else 0
            )
            colour = mixed(mixed(GROUND, colour, 0.55 + 0.45 * dice.random()), colour, share)
            gap = cell * (0.06 + 0.05 * max(0.0, 1 - share))
            corner = column * cell + gap, row * cell + gap
            end = (column + 1) * cell - gap, (row + 1) * cell - gap
            draw.rounded_rectangle((*corner, *end), 0.22 * cell, _bytes(colour))
    return picture


def _bytes(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (round(value) for value in colour)
    return red, green, blue


def smaller(picture: Any) -> Any:
    from PIL import Image

    size = picture.width // SMOOTH, picture.height // SMOOTH
    return picture.resize(size, Image.Resampling.LANCZOS)


def icon() -> Any:
    """400x400, with room around the cells."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (400 * SMOOTH, 400 * SMOOTH), _bytes(GROUND))
    cells = grid(10, 10, 36, 0.8)
    picture.paste(cells, (20 * SMOOTH, 20 * SMOOTH))
    mask = Image.new("L", picture.size, 0)
    edge = 400 * SMOOTH - 1
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, edge, edge), 72 * SMOOTH, 255)
    picture.putalpha(mask)
    return smaller(picture)


def banner() -> Any:
    """1344x576: the name over the noise, the picture beside it."""
    from PIL import ImageDraw, ImageFont

    picture = smaller(grid(28, 12, 48, 0.82))
    draw = ImageDraw.Draw(picture, "RGBA")
    draw.rounded_rectangle((72, 168, 700, 408), 28, (*_bytes(GROUND), 225))
    draw.text((104, 186), "SD3.5", "white", ImageFont.load_default(128))
    words = "Stable Diffusion 3.5 for ComfyUI: exact, light,\nand it tells you what it does."
    draw.multiline_text((108, 326), words, (214, 210, 224), ImageFont.load_default(25), spacing=8)
    return picture


def main() -> int:
    for name, picture in (("icon", icon()), ("banner", banner())):
        write_picture(FOLDER / f"{name}.png", picture, replace=True, optimize=True)
        print(f"Wrote docs/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
