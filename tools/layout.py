"""Lay out the canvas workflows to be read: columns by meaning, groups with titles, the note first.

    python tools/layout.py

places the nodes of workflows/*.json anew, and writes what App mode shows of some; what they do
stays as it is. tools/workflows.py does the same with what it makes.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
WIDEST, HIGHEST = 1600, 900
"""Of a workflow at 100 %; ComfyUI fits that into a window of 1600x900 at 70 % and more."""
WIDTHS = {4: 290, 5: 290, 6: 240}
"""Columns -> the width of their nodes."""
TITLE, GAP = 30, 16
"""The height of a node's title, and the room between two nodes or groups."""
EDGE, HEAD = 6, 30
"""Room in a group beside and below its nodes, and above them for its title."""
NOTE = "MarkdownNote"
PICTURES = {
    "SaveImage": 290,
    "PreviewImage": 266,
    "MaskPreview": 266,
    "LoadImage": 330,
    "ImageCompare": 290,
}
"""Least heights of nodes that show a picture."""
LARGEST_PICTURE = 400
HEIGHTS = {
    **{"CLIPTextEncode": 110, "EmptySD3LatentImage": 118, "SD35Loader": 310},
    **{"SD35Sampler": 500, "SD35Check": 228, "SD35ControlNetLoader": 150},
    **{"SD35ControlHint": 246, "SD35ControlNetApply": 190, "LoraLoaderModelOnly": 94},
    **dict.fromkeys(("VAEDecode", "VAEEncode", "SetLatentNoiseMask"), 54),
    **{"SD35Upscale": 830},
    **{"SolidMask": 118, "MaskComposite": 138},
}
"""Of nodes that other renderers or what stands on them make higher than they are at first."""

GROUPS = {
    "model": ("Model", "#3f5f9e"),
    "prompt": ("Prompt and size", "#3f789e"),
    "guidance": ("Guidance", "#88557f"),
    "first": ("Picture to start from", "#8a6d3b"),
    "control": ("Control", "#3f8f7a"),
    "steer": ("One after the other", "#3f8f7a"),
    "mask": ("What is painted anew", "#3f8f7a"),
    "a": ("A", "#88557f"),
    "b": ("B", "#557f88"),
    "sampling": ("Sampling", "#88557f"),
    "larger": ("Larger", "#88557f"),
    "training": ("Training", "#3f8f7a"),
    "file": ("A smaller file", "#3f8f7a"),
    "picture": ("Picture", "#5f7f3f"),
}
"""Meaning -> the group's title and colour, in the order of the columns."""
MEANINGS = {
    **dict.fromkeys(("SD35Loader", "SD35ControlNetLoader", "LoraLoaderModelOnly"), "model"),
    "SkipLayerGuidance": "guidance",
    **dict.fromkeys(("CLIPTextEncode", "EmptySD3LatentImage"), "prompt"),
    **dict.fromkeys(("LoadImage", "ImageInvert", "PrimitiveString"), "first"),
    **dict.fromkeys(("SD35ControlHint", "SD35ControlNetApply"), "control"),
    **dict.fromkeys(("SolidMask", "MaskComposite", "MaskPreview"), "mask"),
    **dict.fromkeys(("VAEEncode", "SetLatentNoiseMask", "SD35Sampler"), "sampling"),
    **dict.fromkeys(("SD35Check", "SD35SkipLayerSweep"), "sampling"),
    "SD35Quantize": "file",
    "SD35Upscale": "larger",
    "SD35TrainLoRA": "training",
    **dict.fromkeys(
        ("VAEDecode", "ImageStitch", "ImageCompare", "PreviewImage", "SaveImage"), "picture"
    ),
}
"""Class of a node -> its meaning, where nothing else about it says more."""


TO_LEARN_FROM = ("Prompt of the first pictures", "Pictures to learn from")
"""Titles of what makes pictures for a training."""
MANY = 4
"""Nodes of a group beside which a sampler is folded."""

APPS = {
    "text_to_image": (
        ("Prompt", "text"), ("Negative prompt", "text"), ("SD35Sampler", "seed"),
    ),
    "image_to_image": (
        ("Prompt of the first picture", "text"), ("Prompt", "text"),
        ("Image to image", "denoise"), ("Image to image", "seed"),
    ),
    "controlnet_canny": (
        ("Prompt of the first picture", "text"), ("Prompt", "text"),
        ("SD35ControlNetApply", "strength"), ("SD35Sampler", "seed"),
    ),
    "upscale": (
        ("Prompt", "text"), ("SD35Upscale", "factor"), ("SD35Upscale", "denoise"),
        ("SD35Upscale", "seed"),
    ),
}  # fmt: skip
"""Workflow -> what it asks for in ComfyUI's App mode: a node's title, or the class of one without,
and a widget. Such an app shows what the workflow saves."""


def as_app(workflow: dict[str, Any], name: str) -> dict[str, Any]:
    """The workflow with its settings for App mode, if it has any, and its prompts named; it still
    opens as a graph."""
    if name not in APPS:
        return workflow
    nodes = {node.get("title") or node["type"]: node["id"] for node in workflow["nodes"]}
    saved = [node["id"] for node in workflow["nodes"] if node["type"] == "SaveImage"]
    inputs = [[nodes[title], widget] for title, widget in APPS[name]]
    made = copy.deepcopy(workflow)
    for node in made["nodes"]:
        for slot in node.get("inputs", ()):
            if slot["name"] == "text" and [node["id"], "text"] in inputs:
                slot["label"] = node["title"]
    made["extra"]["linearData"] = {"inputs": inputs, "outputs": saved}
    return made


def meaning(node: dict[str, Any], workflow: dict[str, Any]) -> str:
    """The group that a node belongs to."""
    kind, title = node["type"], node.get("title") or ""
    if title[:2] in ("A:", "B:"):
        return title[0].lower()
    if title in TO_LEARN_FROM:
        return "first"
    if kind == "SD35Sampler" and title == "First picture":
        return "first"
    if kind == "VAEDecode":
        source = next(link[1] for link in workflow["links"] if link[3:5] == [node["id"], 0])
        sampler = next(each for each in workflow["nodes"] if each["id"] == source)
        found = meaning(sampler, workflow)
        return found if found in ("first", "a", "b") else "picture"
    if kind == "SD35ControlNetApply" and several(workflow, kind):
        return "steer"
    return MEANINGS[kind]


def several(workflow: dict[str, Any], kind: str) -> bool:
    return sum(node["type"] == kind for node in workflow["nodes"]) > 1


def columns(present: list[str]) -> list[list[str]]:
    """Groups side by side; two ControlNets leave the first picture no column of its own."""
    found = [[key] for key in GROUPS if key in present]
    if "steer" in present and "first" in present:
        place = found.index(["first"])
        found[place : place + 2] = [["first", "control"]]
    return found


def laid_out(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with every node and group in its place."""
    made = copy.deepcopy(workflow)
    note = next(node for node in made["nodes"] if node["type"] == NOTE)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for node in sorted(made["nodes"], key=lambda each: each["id"]):
        if node is not note:
            grouped.setdefault(meaning(node, made), []).append(node)
    places = columns(list(grouped))
    width = WIDTHS[len(places)]
    step = width + 2 * EDGE + GAP
    lines = sum(1 + 7 * len(line) // (2 * width) for line in note["widgets_values"][0].splitlines())
    note["pos"], note["size"] = [0, TITLE], [2 * step - GAP, 40 + 14 * lines]
    below = TITLE + note["size"][1] + GAP
    made["groups"] = []
    for place, keys in enumerate(places):
        x, y = place * step, below if place < 2 else 0
        resize([node for key in keys for node in grouped[key]], width, HIGHEST - y, len(keys))
        for key in keys:
            bottom = stack(grouped[key], x + EDGE, y + HEAD, folded(grouped[key], keys))
            title, color = GROUPS[key]
            group = {"id": len(made["groups"]) + 1, "title": title, "color": color}
            group |= {"bounding": [x, y, width + 2 * EDGE, bottom - y], "font_size": 18}
            made["groups"].append({**group, "flags": {}})
            y = bottom + GAP
    made["extra"]["ds"] = {"scale": 0.75, "offset": [100, 160]}
    return made


def folded(nodes: list[dict[str, Any]], keys: list[str]) -> bool:
    """Whether a group has no room for a sampler that draws a picture to start from."""
    return len(keys) > 1 or len(nodes) > MANY


def stack(nodes: list[dict[str, Any]], x: float, y: float, small: bool) -> float:
    """Place nodes below one another; gives where the group ends. Folded, a sampler that draws a
    picture to start from shows its title alone."""
    for node in nodes:
        fold = small and node["type"] == "SD35Sampler"
        node["flags"] = {"collapsed": True} if fold else {}
        node["pos"] = [x, y + TITLE]
        y += TITLE + (0 if fold else node["size"][1]) + GAP
    return y - GAP + EDGE


def resize(nodes: list[dict[str, Any]], width: float, room: float, groups: int) -> None:
    """Sizes of a column's nodes: pictures share what the others leave."""
    for node in nodes:
        node["size"] = [width, HEIGHTS.get(node["type"], node["size"][1])]
    shown = [node for node in nodes if node["type"] in PICTURES]
    taken = sum(node["size"][1] for node in nodes if node not in shown)
    taken += len(nodes) * (TITLE + GAP) + groups * (HEAD + EDGE)
    for node in shown:
        share = min((room - taken) // len(shown), LARGEST_PICTURE)
        node["size"][1] = max(share, PICTURES[node["type"]])


def main() -> int:
    for path in sorted(FOLDER.glob("*.json")):
        made = as_app(laid_out(json.loads(path.read_text(encoding="utf-8"))), path.stem)
        write_text(path, json.dumps(made, indent=1, ensure_ascii=False) + "\n", replace=True)
        print(f"Laid out workflows/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
