"""Draw the schedules of SD35Sampler as web/docs/schedules.svg: python tools/plot_schedules.py"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.sampling.schedules import SCHEDULES, make_sigmas
from sd35_core.whole_file import write_text

TARGET = Path(__file__).resolve().parent.parent / "web" / "docs" / "schedules.svg"
STEPS, SHIFT = 28, 3.0
LEFT, TOP, WIDTH, HEIGHT = 48, 34, 480, 240
COLOURS = {
    "normal": "#e8a33d",
    "simple": "#5aa9e6",
    "sgm_uniform": "#7fc97f",
    "beta": "#d96ba0",
    "linear_quadratic": "#a58ce0",
}


def curve(name: str) -> str:
    """One schedule: a line with a dot for every step."""
    sigmas = make_sigmas(STEPS, SHIFT, name).tolist()
    points = [
        (LEFT + WIDTH * i / STEPS, TOP + HEIGHT * (1 - level)) for i, level in enumerate(sigmas)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in points)
    colour = COLOURS[name]
    path = f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
    return f'{path}<g fill="{colour}">{dots}</g>'


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "#bbb") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def window() -> str:
    """The steps on which Skip Layer Guidance acts by default: 1 % to 20 %, strict."""
    fired = [i for i in range(STEPS) if 0.01 * STEPS < i < 0.20 * STEPS]
    x = LEFT + WIDTH * (fired[0] - 0.5) / STEPS
    width = WIDTH * len(fired) / STEPS
    box = f'<rect x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT}" fill="#ffffff18"/>'
    return box + text(x + width / 2, TOP + HEIGHT - 8, "SLG", "middle", "#888")


def plot() -> str:
    """The whole picture as SVG."""
    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    grid = "".join(
        f'<line x1="{LEFT}" x2="{right}" y1="{TOP + HEIGHT * (1 - s):.1f}" '
        f'y2="{TOP + HEIGHT * (1 - s):.1f}" stroke="#444"/>'
        + text(LEFT - 8, TOP + HEIGHT * (1 - s) + 4, f"{s:g}", "end")
        for s in (0, 0.25, 0.5, 0.75, 1)
    )
    ticks = "".join(
        text(LEFT + WIDTH * i / STEPS, bottom + 18, str(i), "middle")
        for i in range(0, STEPS + 1, 7)
    )
    legend = "".join(
        f'<rect x="{right + 20}" y="{TOP + 22 * i}" width="12" height="12" fill="{COLOURS[n]}"/>'
        + text(right + 40, TOP + 22 * i + 11, n)
        for i, n in enumerate(SCHEDULES)
    )
    title = text(LEFT, 20, f"Noise level (sigma) after each of {STEPS} steps, shift {SHIFT:g}")
    curves = "".join(curve(name) for name in SCHEDULES)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {bottom + 30}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" '
        f'fill="#222"/>{title}{grid}{ticks}{window()}{curves}{legend}</svg>\n'
    )


def main() -> int:
    write_text(TARGET, plot(), replace=True)
    print(f"Wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
