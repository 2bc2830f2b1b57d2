// Whether a workflow is one of SD3.5 with nodes of ComfyUI's own that this pack may stand in for.
// What becomes of them is decided in Python (sd35_core/workflow/migration.py).

const STOCK = [
    "CheckpointLoaderSimple", "UNETLoader", "KSampler", "ControlNetLoader", "ControlNetApplySD3",
    "ControlNetApplyAdvanced", "SkipLayerGuidanceSD3", "SkipLayerGuidanceDiT",
];
const SD3 = /sd_?-?3|stable.?diffusion.?3|TripleCLIPLoader/i; // in a class, or in a file's name

export function offersOurs(graph) {
    const nodes = [...everyNode(graph, new Set())];
    return nodes.some(({ type }) => STOCK.includes(type)) && nodes.some(isOfSD3);
}

function* everyNode(graph, seen) {
    if (seen.has(graph)) return;
    seen.add(graph);
    for (const node of graph.nodes ?? []) {
        yield node;
        if (node.subgraph) yield* everyNode(node.subgraph, seen);
    }
}

function isOfSD3({ type, widgets }) {
    const files = (widgets ?? []).filter(({ type: kind }) => kind === "combo");
    return SD3.test(type) || files.some(({ value }) => typeof value === "string" && SD3.test(value));
}
