"""Make the canvas twins of workflows/api/*.json in the real front end, and their thumbnails.

    python tools/workflows.py

Nodes keep the ids of the API file; columns follow the links from left to right.
"""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import host

FOLDER = host.PACK / "workflows"
SHOWN = "text_to_image"
GAP = 50
NOTES = {
    "text_to_image": "### SD3.5 text to image\n"
    "The model here, **sd35_nano**, is the small one that comes with the pack: 128 pixels, "
    "pictures like *a big avocado on a pink background*.\n\n"
    "With **SD3.5 Medium or Large** choose your file in the loader, 1024x1024 in *Size*, "
    "steps 40, cfg 4.5 and shift 3.0.",
    "controlnet_canny": "### Keep the outline\nThe first picture's edges steer the second. To "
    "use a picture of your own, put *Load Image* in the place of *VAE Decode*.\n\n"
    "The second output of *SD3.5 Control Hint* shows what the ControlNet sees.",
    "controlnet_blur": "### Keep colours and places\nA blurred picture steers the second: its "
    "colours and masses stay, the details come from the prompt. With Large this ControlNet "
    "makes a small picture a large one.\n\nUse your own picture with *Load Image*.",
    "controlnet_depth": "### Keep the shape\nHere a picture on black stands in for a depth map: "
    "bright is near.\n\nWith the real models take a depth node's map and leave *depth_map* at "
    "*near is bright*.",
    "controlnet_two": "### Two at once\nEach *Apply* adds its ControlNet to those before. "
    "Together they steer more strongly, so both have less than strength 1.",
    "large_canny": "### SD3.5 Large + Canny\nStability AI's recipe: 60 steps, cfg 3.5, euler, "
    "shift 3.\n\nFiles: **sd3.5_large.safetensors** in models/diffusion_models, "
    "**sd3.5_large_controlnet_canny.safetensors** in models/controlnet, CLIP-L, CLIP-G and T5-XXL "
    "in models/text_encoders.",
}
WITHOUT_ITS_FILES = {"large_canny": "sd35_nano_canny.safetensors"}
"""Workflows for models that are not at hand, and the small ControlNet whose hint is shown."""

ARRANGE = """({columns, note, gap}) => {
    const graph = window.app.graph;
    const heights = {CLIPTextEncode: 140, SaveImage: 380, PreviewImage: 380, LoadImage: 380};
    let x = 0, below = 0;
    for (const column of columns) {
        let y = 0, width = 0;
        for (const id of column) {
            const node = graph.getNodeById(id);
            const size = node.computeSize();
            const height = heights[node.type] ?? size[1];
            node.setSize([Math.max(size[0], height === 380 ? 320 : 290), height]);
            node.pos = [x, y];
            y += node.size[1] + gap + 30;
            width = Math.max(width, node.size[0]);
        }
        if (x === 0) below = y;
        x += width + gap;
    }
    if (note) {
        const node = window.LiteGraph.createNode("MarkdownNote");
        graph.add(node);
        node.pos = [0, below + 80];
        node.setSize([290, 210]);
        node.widgets[0].value = note;
    }
    return JSON.stringify(graph.serialize());
}"""


def columns(prompt: dict[str, Any]) -> list[list[str]]:
    """Node ids by their longest way from a node without inputs."""

    def sources(key: str) -> list[str]:
        return [v[0] for v in prompt[key]["inputs"].values() if isinstance(v, list)]

    def rank(key: str) -> int:
        return 1 + max(map(rank, sources(key)), default=-1)

    def column(key: str) -> int:
        """A node without inputs stands one before its first reader."""
        readers = [reader for reader in prompt if key in sources(reader)]
        return rank(key) or min(map(rank, readers), default=1) - 1

    places = {key: column(key) for key in prompt}
    return [[k for k in prompt if places[k] == i] for i in range(max(places.values()) + 1)]


def build(page: Any, prompt: dict[str, Any], name: str) -> dict[str, Any]:
    """The canvas workflow of an API prompt, as the front end writes it."""
    page.evaluate("async ([p, n]) => { await window.app.loadApiJson(p, n); }", [prompt, name])
    page.wait_for_timeout(500)
    arguments = {"columns": columns(prompt), "note": NOTES.get(name), "gap": GAP}
    return json.loads(page.evaluate(ARRANGE, arguments))


def hint_alone(prompt: dict[str, Any], control_net: str) -> dict[str, Any]:
    """The part of a workflow that makes the hint, with a ControlNet that is at hand."""
    wanted = ("LoadImage", "SD35ControlNetLoader", "SD35ControlHint", "PreviewImage")
    part = {k: copy.deepcopy(n) for k, n in prompt.items() if n["class_type"] in wanted}
    for node in part.values():
        if "control_net" in node["inputs"] and node["class_type"] == "SD35ControlNetLoader":
            node["inputs"]["control_net"] = control_net
    return part


def thumbnail(url: str, prompt: dict[str, Any], path: Path) -> None:
    """What the workflow draws; the hint in its left half where it shows one."""
    from PIL import Image

    found = host.pictures(url, host.run_prompt(url, prompt))
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in found]
    pictures = [picture.resize((512, 512), Image.Resampling.LANCZOS) for picture in pictures]
    pictures[-1].paste(pictures[0].crop((0, 0, 256, 512)))
    pictures[-1].save(path, quality=88)


def main() -> int:
    found = host.find()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    from tools import browser

    paths = sorted((FOLDER / "api").glob("*.json"))
    prompts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    with host.Server(found) as server:
        for name, prompt in prompts.items():
            if name in WITHOUT_ITS_FILES:
                prompt = hint_alone(prompt, WITHOUT_ITS_FILES[name])
            thumbnail(server.url, prompt, FOLDER / f"{name}.jpg")
        with browser.canvas(server.url) as page:
            for name, prompt in prompts.items():
                made = build(page, prompt, name)
                text = json.dumps(made, indent=1, ensure_ascii=False)
                (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
                print(f"Wrote workflows/{name}.json and its thumbnail")
            browser.load(page, json.loads((FOLDER / f"{SHOWN}.json").read_text(encoding="utf-8")))
            browser.run(page)
            page.screenshot(path=str(host.PACK / "web" / "docs" / "canvas.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
