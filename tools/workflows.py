"""Make the canvas twins of workflows/api/*.json in the real front end, and their thumbnails.

    python tools/workflows.py

Nodes keep the ids of the API file; columns follow the links from left to right.
"""

from __future__ import annotations

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
}

ARRANGE = """({columns, note, gap}) => {
    const graph = window.app.graph;
    let x = 0;
    for (const column of columns) {
        let y = 0, width = 0;
        for (const id of column) {
            const node = graph.getNodeById(id);
            const size = node.computeSize();
            node.setSize([Math.max(size[0], node.type === "SaveImage" ? 320 : 290),
                          node.type === "CLIPTextEncode" ? 140
                              : node.type === "SaveImage" ? 380 : size[1]]);
            node.pos = [x, y];
            y += node.size[1] + gap + 30;
            width = Math.max(width, node.size[0]);
        }
        x += width + gap;
    }
    if (note) {
        const node = window.LiteGraph.createNode("MarkdownNote");
        graph.add(node);
        node.pos = [0, graph.getNodeById(columns[0][0]).size[1] + gap + 110];
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


def thumbnail(url: str, prompt: dict[str, Any], path: Path) -> None:
    from PIL import Image

    (data, *_) = host.pictures(url, host.run_prompt(url, prompt))
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.resize((512, 512), Image.Resampling.LANCZOS).save(path, quality=88)


def main() -> int:
    found = host.find()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    from tools import browser

    paths = sorted((FOLDER / "api").glob("*.json"))
    prompts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    with host.Server(found) as server:
        for name, prompt in prompts.items():
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
