"""Pictures of the nodes for their help pages, taken in the real front end.

    python tools/screenshots.py [WORKFLOW ...]

writes web/docs/<node id>.png; each node as it stands in a workflow that has been run.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_picture
from tools import host

DOCS = host.PACK / "web" / "docs"
MARGIN = 12
SHOWN_IN = {
    "text_to_image": ["SD35Loader", "SkipLayerGuidance", "SD35Sampler", "SD35StepCache",
                      "SD35Sigmas"],
    "controlnet_canny": ["SD35ControlNetLoader", "SD35ControlNetApply", "SD35ControlHint"],
    "check": ["SD35Check"],
    "sweep": ["SD35SkipLayerSweep"],
    "quantize": ["SD35Quantize"],
    "upscale": ["SD35Upscale"],
    "train_lora": ["SD35TrainLoRA"],
}  # fmt: skip
"""Workflow -> its nodes; what it lacks is put in."""
NOT_RUN = {"quantize"}
"""It would write a file beside the model."""

PUT_IN = """() => {
    const graph = app.graph;
    const find = (kind) => graph.nodes.find((n) => n.type === kind);
    const sampler = find("SD35Sampler"), loader = find("SD35Loader");
    const [skip, cache] = ["SkipLayerGuidance", "SD35StepCache", "SD35Sigmas"].map(
        (kind, i) => {
            const node = LiteGraph.createNode(kind);
            graph.add(node);
            node.pos = [400 * i, 1200];
            return node;
        });
    skip.widgets[0].value = "1";
    loader.connect(0, skip, 0);
    skip.connect(0, cache, 0);
    cache.connect(0, sampler, 0);
}"""

PLACE = """(kind) => {
    const node = app.graph.nodes.find((n) => n.type === kind);
    const { ds } = app.canvas;
    ds.scale = 1;
    ds.offset = [140 - node.pos[0], 120 - node.pos[1]];
    app.canvas.deselectAll();
    app.canvas.setDirty(true, true);
    const box = app.canvas.canvas.getBoundingClientRect();
    return [box.left + 140, box.top + 120 - 32, node.size[0], node.size[1] + 32];
}"""


def picture(page: Any, kind: str) -> bytes:
    """One node at full size, as PNG."""
    page.evaluate(PLACE, kind)
    page.mouse.move(1500, 700)
    page.wait_for_timeout(1500)
    x, y, width, height = page.evaluate(PLACE, kind)
    clip = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN}
    return page.screenshot(clip={**clip, "height": height + 2 * MARGIN})


def main() -> int:
    found = host.find_comfyui()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    from PIL import Image

    from tools import browser

    with host.Server(found) as server, browser.canvas(server.url) as page:
        page.set_viewport_size({"width": 1600, "height": 1200})
        for workflow in sys.argv[1:] or SHOWN_IN:
            path = host.PACK / "workflows" / f"{workflow}.json"
            browser.load(page, json.loads(path.read_text(encoding="utf-8")))
            if workflow == "text_to_image":
                page.evaluate(PUT_IN)
            if workflow not in NOT_RUN:
                browser.run(page)
            for kind in SHOWN_IN[workflow]:
                with Image.open(io.BytesIO(picture(page, kind))) as image:
                    small = image.quantize(128)
                    write_picture(DOCS / f"{kind}.png", small, replace=True, optimize=True)
                print(f"Wrote web/docs/{kind}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
