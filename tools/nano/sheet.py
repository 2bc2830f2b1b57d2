"""What the small model can draw: python -m tools.nano.sheet MODEL SHEET.jpg

Draws every familiar thing four times, on colours and at places that training never showed with
it, and counts those that look more like the thing asked for than like any other of all 140: the
picture is compared with a rendering of every thing in the same scene. Seeds are 0, 1, 2 ...,
nothing is picked. The sheet shows the first round.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
from PIL import Image

from .draw import SIZE, Painter
from .pictures import emoji_folder
from .scenes import COLOURS, FAMILIAR, PLACES, THINGS, Scene, Thing, article, held_out, render

COLUMNS, ROWS = 8, 4
EACH = 4


def unseen_scenes() -> list[Scene]:
    """Some scenes per familiar thing, of combinations kept from training."""
    rng = random.Random(0)
    scenes = []
    for name in EACH * FAMILIAR:
        kept = [(c, p) for c in COLOURS for p in PLACES if held_out(name, c, p)]
        colour, place = rng.choice(kept)
        caption = f"{article(name)} {place} on {article(f'{colour} background')}"
        scenes.append(Scene((Thing(name, "", place),), (colour,), caption))
    return scenes


def nearest(picture: Image.Image, scene: Scene, folder: Path) -> str:
    """The thing whose rendering in this scene is closest to the picture, by squared error."""
    seen = numpy.asarray(picture.resize((64, 64), Image.Resampling.BOX), dtype=numpy.float32)

    def distance(name: str) -> float:
        other = replace(scene, things=(replace(scene.things[0], name=name),))
        rendered = render(other, folder, 64, seed=0)
        return float(((numpy.asarray(rendered, dtype=numpy.float32) - seen) ** 2).mean())

    return min(THINGS, key=distance)


def background_error(picture: Image.Image, scene: Scene) -> float:
    """The median distance in RGB, 0..255, of the border's pixels from the colour asked for."""
    pixels = numpy.asarray(picture, dtype=numpy.float32)
    border = numpy.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    wanted = numpy.array(COLOURS[scene.colours[0]], dtype=numpy.float32)
    return float(numpy.median(numpy.linalg.norm(border - wanted, axis=1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--shift", type=float, default=1.0)
    options = parser.parse_args()
    scenes, folder = unseen_scenes(), emoji_folder()
    captions = [scene.caption for scene in scenes]
    settings = {"cfg": options.cfg, "steps": options.steps, "shift": options.shift}
    pictures = Painter(options.model).draw(captions, list(range(len(scenes))), **settings)
    pairs = list(zip(pictures, scenes))
    wrong = [
        scene.things[0].name
        for picture, scene in pairs
        if nearest(picture, scene, folder) != scene.things[0].name
    ]
    coloured = sum(background_error(picture, scene) < 20 for picture, scene in pairs)
    names = ", ".join(f"{name} {count}" for name, count in Counter(wrong).most_common())
    print(f"right thing: {len(scenes) - len(wrong)} of {len(scenes)}; wrong: {names}")
    print(f"right background: {coloured} of {len(scenes)}")
    sheet = Image.new("RGB", (COLUMNS * SIZE, ROWS * SIZE))
    for i, picture in enumerate(pictures[: COLUMNS * ROWS]):
        sheet.paste(picture, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    sheet.save(options.sheet, quality=88)


if __name__ == "__main__":
    main()
