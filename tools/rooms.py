"""Draw sd35_core's rooms and what imports what: python tools/rooms.py

Reads the imports and writes web/docs/rooms.svg, which the README shows; a test holds it to the
code. A room is a package or a module that lies beside the packages; it stands one floor above the
highest that it imports.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "sd35_core"
DRAWING = ROOT / "web" / "docs" / "rooms.svg"
WIDTH, GAP, LINE, FLOOR = 230, 26, 15, 66
"""Pixels: of a room, between rooms, of a line of text, between floors."""
EVERYWHERE = ("errors", "limits", "whole_file", "words")
"""The cellar: used from most rooms, so drawn without arrows."""

Imports = dict[str, set[str]]


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Absolute dotted names that a module under `root` imports anywhere.

    `from a import b` counts as a.b, whether b is a module or something in one.
    """
    package = path.relative_to(root).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            whole = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{whole}.{alias.name}" for alias in node.names}
    return found


def used(core: Path = CORE) -> Imports:
    """Module under a package, dotted -> those of the package's modules that it imports."""
    files = {
        ".".join(path.relative_to(core).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(core.rglob("*.py"))
    }
    prefix = f"{core.name}."
    found: Imports = {}
    for module, path in files.items():
        own = (name for name in imports(path, core.parent) if f"{name}.".startswith(prefix))
        names = {name.removeprefix(prefix) for name in own}
        owners = {next((n for n in enclosing(name) if n in files), None) for name in names}
        found[module] = {name for name in owners if name} - {module}
    return found


def enclosing(name: str) -> list[str]:
    """a.b.c -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def room(module: str) -> str:
    return module.split(".")[0]


def between_rooms(modules: Imports) -> Imports:
    """Room -> the other rooms that something in it imports."""
    found: Imports = {room(module): set() for module in modules}
    for module, targets in modules.items():
        found[room(module)] |= {room(target) for target in targets} - {room(module)}
    return found


def circle(modules: Imports) -> list[str]:
    """Modules that import each other in a ring; none where each can be imported first."""
    left = {module: set(targets) for module, targets in modules.items()}
    while left:
        free = [module for module, targets in left.items() if not targets & set(left)]
        if not free:
            return sorted(left)
        for module in free:
            del left[module]
    return []


def floors(rooms: Imports) -> list[list[str]]:
    """Rooms by floor, from the ground up; those that no other needs stand on the highest."""
    height: dict[str, int] = {}
    while len(height) < len(rooms):
        for name in sorted(set(rooms) - set(height)):
            if rooms[name] <= set(height):
                height[name] = 1 + max((height[below] for below in rooms[name]), default=-1)
    top = max(height.values())
    needed = set().union(*rooms.values())
    height.update((name, top) for name in rooms if name not in needed)
    return [[name for name in sorted(rooms) if height[name] == i] for i in range(top + 1)]


def drawing(core: Path = CORE) -> str:
    """The rooms as SVG: each with its modules, and an arrow to each room that it needs and that
    no other room on the way leads to."""
    modules = used(core)
    rooms = between_rooms(modules)
    rooms.pop("__init__", None)
    upper = {n: t - set(EVERYWHERE) for n, t in rooms.items() if n not in EVERYWHERE}
    rows = [*floors(upper)[::-1], [name for name in EVERYWHERE if name in rooms]]
    tall = {name: 24 + LINE * len(inside(name, modules)) for name in rooms}
    longest = max(map(len, rows))
    whole = longest * WIDTH + (longest - 1) * GAP
    boxes: dict[str, tuple[float, float]] = {}
    y = 10.0
    for row in rows:
        x = 10 + (whole - len(row) * WIDTH - (len(row) - 1) * GAP) / 2
        for name in row:
            boxes[name] = (x, y)
            x += WIDTH + GAP
        y += max(tall[name] for name in row) + FLOOR
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole + 20:g} {y - FLOOR + 10:g}" '
        'font-family="sans-serif" font-size="11">',
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="#8a8577"/></marker></defs>',
    ]
    arrows = [
        (name, target)
        for name, targets in upper.items()
        for target in sorted(targets)
        if not any(target in reached(other, upper) for other in targets - {target})
    ]
    for arrow in arrows:
        (x1, y1), (x2, y2) = (boxes[name] for name in arrow)
        x1 += WIDTH / 2 + apart(arrow, arrows, boxes, 0)
        x2 += WIDTH / 2 + apart(arrow, arrows, boxes, 1)
        start, end = y1 + tall[arrow[0]], y2 - 2
        late = any(x < x2 < x + WIDTH for x, y in boxes.values() if start < y < end - FLOOR)
        slant = min(FLOOR, end - start) - 8
        top = end - slant - 8 if late else start
        lines.append(
            f'<path d="M{x1:g} {start:g} V{top:g} C{x1:g} {top + slant / 2:g} {x2:g} '
            f'{top + slant / 2:g} {x2:g} {top + slant:g} V{end:g}" fill="none" '
            'stroke="#8a8577" stroke-width="1.4" marker-end="url(#to)"/>'
        )
    for name, (x, y) in boxes.items():
        fill = "#ece7db" if name in EVERYWHERE else "#fbf9f3"
        lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{tall[name]}" rx="6" '
            f'fill="{fill}" stroke="#8a8577"/>'
        )
        lines.append(
            f'<text x="{x + 10:g}" y="{y + 16:g}" font-weight="bold" font-size="13" '
            f'fill="#2b2a26">{escape(name)}</text>'
        )
        for i, words in enumerate(inside(name, modules)):
            lines.append(
                f'<text x="{x + 10:g}" y="{y + 32 + LINE * i:g}" fill="#57544b">{words}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


def apart(
    arrow: tuple[str, str], arrows: list[tuple[str, str]],
    boxes: dict[str, tuple[float, float]], end: int,
) -> float:  # fmt: skip
    """How far from the middle an arrow ends, beside the others of that room."""
    beside = [other for other in arrows if other[end] == arrow[end]]
    beside.sort(key=lambda other: boxes[other[1 - end]][0])
    return 18 * (beside.index(arrow) - (len(beside) - 1) / 2)


def inside(name: str, modules: Imports) -> list[str]:
    """The modules of a room, in lines of the room's width."""
    found, line = [], ""
    for module in sorted(module for module in modules if module.startswith(f"{name}.")):
        words = escape(module.removeprefix(f"{name}."))
        if words.endswith("__main__") or words.endswith("rules"):
            continue
        if line and len(line) + len(words) > 34:
            found.append(line)
            line = ""
        line += (" · " if line else "") + words
    return [*found, line] if line else []


def reached(name: str, rooms: Imports) -> set[str]:
    """Every room that can be reached from one."""
    found = set(rooms[name])
    for target in rooms[name]:
        found |= reached(target, rooms)
    return found


if __name__ == "__main__":
    write_text(DRAWING, drawing(), replace=True)
    print(DRAWING)
