"""Measure the small model under many settings: python -m tools.nano.study [PART ...]

Writes models/nano/figures.json, from which the tables of the model card and the plot in the
sampler's help page (web/docs/steps.svg) are made. Takes about half an hour on two cores; a part
that is in the file already is kept unless it is named.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from sd35_core.pipeline import Pipeline, Settings
from sd35_core.sampling.guidance import SkipLayers
from sd35_core.sampling.samplers import SAMPLERS
from sd35_core.sampling.schedules import SCHEDULES
from sd35_core.whole_file import write_picture, write_text
from tools.plot_schedules import COLOURS, text

from .prepare import clip_tokenizer
from .scenes import Scene, article
from .scoring import (
    MODEL,
    MODEL_FILE,
    ROOT,
    Figures,
    draw,
    figures_of,
    judge_all,
    sheet_of,
    unseen,
)

FILE = MODEL / "figures.json"
PLOT = ROOT / "web" / "docs" / "steps.svg"
STEPS = (4, 10, 20, 50)
FEW = 64
SIZES = ((128, 128), (96, 96), (160, 160), (192, 128), (128, 192), (256, 256))


def measure(pipeline: Pipeline, scenes: Sequence[Scene], settings: Settings) -> Figures:
    return figures_of(scenes, judge_all(draw(pipeline, scenes, settings), scenes))


def headline(pipeline: Pipeline) -> dict[str, Figures]:
    """500 unseen scenes; the first 100 become the sheet, and wrong captions give the chance."""
    scenes = unseen(500)
    pictures = draw(pipeline, scenes, Settings())
    write_picture(MODEL / "sheet.jpg", sheet_of(pictures[:100]), replace=True, quality=88)
    wrong = scenes[1:] + scenes[:1]
    return {
        "asked": figures_of(scenes, judge_all(pictures, scenes)),
        "wrong captions": figures_of(wrong, judge_all(pictures, wrong)),
    }


def by_cfg(pipeline: Pipeline) -> dict[str, Figures]:
    scenes = unseen(FEW)
    return {f"{cfg:g}": measure(pipeline, scenes, Settings(cfg=cfg)) for cfg in (1, 2, 4, 7)}


def by_skipped_layers(pipeline: Pipeline) -> dict[str, Figures]:
    """Scale 2.5 on 1 % to 20 % of the steps, SD3.5 Medium's recipe, for every choice of layers."""
    scenes = unseen(FEW)
    found = {"none": measure(pipeline, scenes, Settings())}
    for layers in ((0,), (1,), (2,), (3,), (1, 2), (2, 3)):
        slg = SkipLayers(frozenset(layers), 2.5, 0.01, 0.2)
        name = ", ".join(map(str, layers))
        found[name] = measure(pipeline, scenes, Settings(slg=slg))
    return found


def by_encoder(pipeline: Pipeline) -> dict[str, Figures]:
    scenes = unseen(FEW)
    return {
        name or "both": measure(pipeline, scenes, Settings(without=name))
        for name in ("", "clip_l", "clip_g")
    }


def by_size(pipeline: Pipeline) -> dict[str, Figures]:
    scenes = unseen(32)
    return {
        f"{size[0]}x{size[1]}": measure(pipeline, scenes, Settings(size=size)) for size in SIZES
    }


def by_steps(pipeline: Pipeline) -> dict[str, Figures]:
    scenes = unseen(24)
    return {
        f"{sampler} {schedule} {steps}": measure(
            pipeline, scenes, Settings(steps=steps, sampler=sampler, schedule=schedule)
        )
        for sampler in SAMPLERS
        for schedule in SCHEDULES
        for steps in STEPS
    }


def with_negative_prompt(pipeline: Pipeline) -> dict[str, Figures]:
    """Whether the right one of two things goes when the negative prompt names it in its place."""
    pairs = [s for s in unseen(400) if len(s.names) == 2 and s.place == "side by side"][:24]
    found: dict[str, Figures] = {}
    for cfg, named in itertools.product((4.0, 7.0), (False, True)):
        pictures = [
            draw(pipeline, [pair], Settings(cfg=cfg, negative=right_one(pair) if named else ""), i)
            for i, pair in enumerate(pairs)
        ]
        names = [verdict.names for verdict in judge_all(list(itertools.chain(*pictures)), pairs)]
        shares = [
            sum(seen[side] == pair.names[side] for seen, pair in zip(names, pairs)) / len(pairs)
            for side in (0, 1)
        ]
        key = f"cfg {cfg:g}, {'named' if named else 'empty'}"
        found[key] = {"pairs": {"pictures": len(pairs), "left": shares[0], "right": shares[1]}}
    return found


def right_one(pair: Scene) -> str:
    ground = " and ".join(pair.colours)
    return f"{article(pair.names[1])} on the right on {article(ground)} background"


PARTS: dict[str, Callable[[Pipeline], dict[str, Figures]]] = {
    "headline": headline,
    "cfg": by_cfg,
    "skipped layers": by_skipped_layers,
    "text encoders": by_encoder,
    "negative prompt": with_negative_prompt,
    "size": by_size,
    "steps": by_steps,
}


def plot(found: dict[str, Figures]) -> str:
    """Right things over steps, a panel per sampler, a line per schedule, as SVG."""
    parts = []
    for panel, sampler in enumerate(SAMPLERS):
        left, top, width, height = 52 + 290 * panel, 44, 230, 220
        across = {steps: left + width * i / (len(STEPS) - 1) for i, steps in enumerate(STEPS)}
        parts.append(text(left, 24, f"Right thing, % of 24 pictures: {sampler}"))
        for share in (0, 25, 50, 75, 100):
            y = top + height * (1 - share / 100)
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#444"/>')
            parts.append(text(left - 8, y + 4, str(share), "end"))
        parts += [text(x, top + height + 18, str(s), "middle") for s, x in across.items()]
        for schedule in SCHEDULES:
            shares = [found[f"{sampler} {schedule} {steps}"]["all"]["thing"] for steps in STEPS]
            points = " ".join(
                f"{x:.1f},{top + height * (1 - share):.1f}"
                for x, share in zip(across.values(), shares)
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{COLOURS[schedule]}" '
                'stroke-width="2"/>'
            )
    for i, name in enumerate(SCHEDULES):
        parts.append(
            f'<rect x="600" y="{44 + 22 * i}" width="12" height="12" fill="{COLOURS[name]}"/>'
            + text(620, 55 + 22 * i, name)
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 750 296" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="#222"/>{"".join(parts)}</svg>\n'
    )


def table(found: dict[str, Figures], first: str) -> str:
    """A part as a Markdown table: a row per setting, a column per figure."""
    columns = [
        (kind, what)
        for kind, figures in next(iter(found.values())).items()
        for what in figures
        if what != "pictures"
    ]
    lines = [
        f"| {first} | " + " | ".join(f"{kind}: {what}" for kind, what in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name, figures in found.items():
        cells = [f"{100 * figures[kind][what]:.1f}" for kind, what in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    pipeline = Pipeline.load(MODEL_FILE, clip_tokenizer())
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    wanted = sys.argv[1:] or [name for name in PARTS if name not in known]
    for name in tqdm(wanted):
        known[name] = PARTS[name](pipeline)
        write_text(FILE, json.dumps(known, indent=1) + "\n", replace=True)
    if "steps" in known:
        write_text(PLOT, plot(known["steps"]), replace=True)
    for name in known:
        print(f"\n{table(known[name], name)}")


if __name__ == "__main__":
    main()
