"""How time grows with pixels, batch and depth, as an SVG: the work of tools/bench.py --plot."""

from __future__ import annotations

from typing import Any

SIDE, GAP, LEFT, TOP = 190, 70, 60, 50
COLOURS = {
    "ours": "#e8a33d",
    "ComfyUI default": "#d96ba0",
    "ComfyUI SDPA": "#5aa9e6",
    "diffusers": "#7fc97f",
}


def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#bbb") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def panel(index: int, name: str, places: list[float], rows: list[dict[str, Any]]) -> str:
    """One square: seconds over what grows, a line for each network."""
    left = LEFT + index * (SIDE + GAP)
    most_x, most_y = max(places), max(max(row["seconds"].values()) for row in rows)
    parts = [
        f'<rect x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#444"/>',
        text(left + SIDE / 2, TOP - 12, f"seconds by {name}"),
        text(left - 8, TOP + 4, f"{most_y:.2g}", "end"),
        text(left - 8, TOP + SIDE + 4, "0", "end"),
    ]
    for network, colour in COLOURS.items():
        points = [
            (left + SIDE * x / most_x, TOP + SIDE * (1 - row["seconds"][network] / most_y))
            for x, row in zip(places, rows)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    parts += [text(left + SIDE * x / most_x, TOP + SIDE + 20, f"{x:g}") for x in places]
    return "".join(parts)


def drawing(panels: dict[str, tuple[list[float], list[dict[str, Any]]]]) -> str:
    """All panels, side by side, with a legend below."""
    width = LEFT + len(panels) * (SIDE + GAP)
    squares = "".join(panel(i, name, *given) for i, (name, given) in enumerate(panels.items()))
    legend = "".join(
        f'<rect x="{LEFT + 180 * i}" y="{TOP + SIDE + 40}" width="12" height="12" fill="{colour}"/>'
        + text(LEFT + 20 + 180 * i, TOP + SIDE + 51, name, "start")
        for i, (name, colour) in enumerate(COLOURS.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + SIDE + 66}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#222"/>'
        f"{squares}{legend}</svg>\n"
    )
