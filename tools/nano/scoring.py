"""Draw captions with the small model and count what is right: the work of tools/score.py."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sd35_core.errors import SD35Error
from sd35_core.pipeline import Pipeline, Settings, add_settings
from sd35_core.sampling.guidance import SkipLayers, parse_layers
from sd35_core.sampling.step_cache import PACES
from sd35_core.whole_file import write_picture

from .judge import Verdict, judge
from .pictures import emoji_folder
from .prepare import clip_tokenizer
from .scenes import Scene, draw_scene, parse

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/nano"
MODEL_FILE = MODEL / "sd35_nano.safetensors"
FIRST_SEED = 1_000_000
"""Scenes for scoring begin here, far from those for training; they are held out besides."""

COLUMNS = 10

Figures = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        scenes = read_captions(options.captions) if options.captions else unseen(options.count)
        pipeline = Pipeline.load(model_file(options.model), clip_tokenizer())
        settings = settings_of(options, pipeline.network.config.depth)
    except (SD35Error, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    with tqdm(total=len(scenes), unit="picture", disable=options.json) as bar:
        pictures = draw(
            pipeline, scenes, settings, options.seed, lambda done: bar.update(done - bar.n)
        )
    wanted = scenes[1:] + scenes[:1] if options.wrong else scenes
    verdicts = judge_all(pictures, wanted)
    if options.sheet:
        write_picture(options.sheet, sheet_of(pictures), replace=True)
    figures = figures_of(wanted, verdicts)
    if options.json:
        each = [
            {"caption": scene.caption, **asdict(verdict)}
            for scene, verdict in zip(wanted, verdicts)
        ]
        print(json.dumps({"figures": figures, "pictures": each}, indent=1))
    else:
        print("\n".join(lines_of(figures)))
    return 0


def draw(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    settings: Settings,
    first_seed: int = 0,
    on_done: Callable[[int], object] = lambda done: None,
) -> list[Image.Image]:
    """One picture per scene, with seeds counted up from the first."""
    captions = [scene.caption for scene in scenes]
    seeds = list(range(first_seed, first_seed + len(scenes)))
    drawn = pipeline.draw(captions, seeds, settings, on_done)
    return [Image.fromarray(picture.numpy()) for picture in drawn]


def judge_all(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> list[Verdict]:
    """A verdict for each picture and what it should show."""
    folder = emoji_folder()
    return [judge(picture, scene, folder) for picture, scene in zip(pictures, scenes)]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python tools/score.py")
    parser.add_argument("--captions", type=Path, help="a text file, one caption a line")
    parser.add_argument("--count", type=int, default=200, help="how many, without --captions")
    parser.add_argument(
        "--model", type=Path, default=MODEL_FILE, help="a file, or a folder with one"
    )
    add_settings(parser)
    parser.add_argument("--slg", default="", metavar="LAYERS", help="layers to skip: 1, 2 or 1-2")
    parser.add_argument("--slg-scale", type=float, default=2.5)
    parser.add_argument("--slg-start", type=float, default=0.01)
    parser.add_argument("--slg-end", type=float, default=0.2)
    parser.add_argument("--pace", choices=list(PACES), default="", help="with the step cache")
    parser.add_argument("--without", choices=["clip_l", "clip_g"], default="")
    parser.add_argument("--wrong", action="store_true", help="judge by the next caption: chance")
    parser.add_argument("--sheet", type=Path, help="save all pictures as one")
    parser.add_argument("--json", action="store_true", help="print JSON, with every verdict")
    return parser


def settings_of(options: argparse.Namespace, depth: int) -> Settings:
    layers = parse_layers(options.slg, depth)
    slg = SkipLayers(layers, options.slg_scale, options.slg_start, options.slg_end)
    return Settings(
        options.steps, options.cfg, options.shift, options.sampler, options.schedule,
        slg, options.negative, options.without, options.size, options.pace,
    )  # fmt: skip


def model_file(path: Path) -> Path:
    """The file itself, or the one model in a folder."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"'{path}' holds {len(files)} safetensors files; name one of them.")
    return files[0]


def read_captions(path: Path) -> list[Scene]:
    """The scenes that a file's lines ask for. Raises ValueError with the line's number."""
    scenes = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                scenes.append(parse(line.strip()))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not scenes:
        raise ValueError(f"'{path}' has no captions.")
    return scenes


def unseen(count: int) -> list[Scene]:
    """Scenes whose combination of thing, colour and place training never showed."""
    return [draw_scene(FIRST_SEED + i, unseen=True) for i in range(count)]


def figures_of(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> Figures:
    """Shares of pictures, 0..1, by kind of scene."""
    kinds = {"all": list(zip(scenes, verdicts))}
    kinds["one thing"] = [(s, v) for s, v in kinds["all"] if len(s.names) == 1 and s.count == 1]
    kinds["two things"] = [(s, v) for s, v in kinds["all"] if len(s.names) == 2]
    kinds["a number of things"] = [(s, v) for s, v in kinds["all"] if s.count > 1]
    asked = {
        "all": ["thing", "colour"],
        "one thing": ["thing", "colour", "place", "size"],
        "two things": ["thing", "colour", "place"],
        "a number of things": ["count", "thing", "colour"],
    }
    return {
        kind: {"pictures": len(pairs)}
        | {
            what: sum(getattr(verdict, f"{what}_right") for _, verdict in pairs) / len(pairs)
            for what in asked[kind]
        }
        for kind, pairs in kinds.items()
        if pairs
    }


def lines_of(figures: Figures) -> list[str]:
    """For people: a line per kind of scene."""
    return [
        f"{kind} ({found['pictures']}): "
        + ", ".join(f"right {k} {v:.1%}" for k, v in found.items() if k != "pictures")
        for kind, found in figures.items()
    ]


def sheet_of(pictures: list[Image.Image]) -> Image.Image:
    """All pictures in rows of ten."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(pictures)) * width, rows * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % COLUMNS * width, i // COLUMNS * height))
    return sheet
