"""The canvas with many of the pack's nodes beside as many of ComfyUI's own.

    python tools/bench_canvas.py

The nodes of ComfyUI do the same work as ours and have fewer widgets (23 to 25 on four nodes, our
two panels not counted; its loader is the one that names most files). In one run,
alternating, in both renderers: the time to open a workflow of 300 nodes, and to draw a
frame while a node and the canvas are moved; as ratios of medians. Each has a page of its
own, because a page keeps every workflow that it ever showed, and gets slower.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import host

NODES, WARM_UP, RUNS = 300, 8, 5
CORE = [
    "KSamplerAdvanced",
    "SkipLayerGuidanceDiT",
    "QuadrupleCLIPLoader",
    "ControlNetApplyAdvanced",
]
OURS = ["SD35Sampler", "SkipLayerGuidance", "SD35Loader", "SD35ControlNetApply"]

OPEN_AND_DRAG = """async ([kinds, count]) => {
    const frame = () => new Promise((done) => requestAnimationFrame(done));
    app.graph.clear();
    for (let i = 0; i < count; i++) {
        const node = LiteGraph.createNode(kinds[i % kinds.length]);
        node.pos = [420 * (i % 20), 700 * Math.floor(i / 20)];
        app.graph.add(node);
    }
    const data = JSON.parse(JSON.stringify(app.graph.serialize()));
    const started = performance.now();
    await app.loadGraphData(data);
    for (let i = 0; i < 5; i++) await frame();
    const opened = performance.now() - started;
    await new Promise((done) => setTimeout(done, 1500));
    app.canvas.ds.scale = 0.6;
    app.canvas.ds.offset = [0, 0];
    const node = app.graph.nodes[0];
    const begun = performance.now();
    for (let i = 0; i < 60; i++) {
        node.pos = [node.pos[0] + 3, node.pos[1] + 2];
        app.canvas.ds.offset[0] -= 6;
        app.canvas.draw(true, true);
        await frame();
    }
    return [opened, (performance.now() - begun) / 60];
}"""


def opening_and_dragging(page: Any, kinds: list[str], count: int = NODES) -> tuple[float, float]:
    """Milliseconds to open a workflow of `count` nodes, and for a frame while moving."""
    opened, frame = page.evaluate(OPEN_AND_DRAG, [kinds, count])
    return opened, frame


def main() -> int:
    found = host.find_comfyui()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    from tools import browser

    kinds = {"core": CORE, "ours": OURS}
    with host.Server(found) as server:
        for name, nodes_2 in (("classic", False), ("Nodes 2.0", True)):
            taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
            for run in range(RUNS):
                for kind in sorted(kinds, reverse=run % 2 == 1):
                    with browser.canvas(server.url, nodes_2) as page:
                        opening_and_dragging(page, kinds[kind], WARM_UP)
                        taken[kind].append(opening_and_dragging(page, kinds[kind]))
            for index, what in enumerate(("opening", "a frame")):
                core, ours = (
                    statistics.median(seen[index] for seen in taken[kind])
                    for kind in ("core", "ours")
                )
                print(
                    f"{name:10} {what:8} {NODES} nodes: {ours:7.0f} ms, ComfyUI's own {core:7.0f} "
                    f"ms, ratio {ours / core:.2f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
