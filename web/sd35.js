// The pack's panels on the canvas: the only file that touches ComfyUI's `app`.
//
// The server reads the open workflow and answers what to show (nodes/host/canvas.py); this file
// asks after every change, and writes into widgets what a person chose.

import { api } from "/scripts/api.js";
import { app } from "/scripts/app.js";
import { element } from "./lib/dom.js";
import { toldApart } from "./lib/namesake.js";
import { layersPanel, refusedPanel, samplerPanel } from "./lib/panels.js";

const HEIGHTS = { SD35Sampler: 244, SD35Upscale: 244, SkipLayerGuidance: 122 };
const LOADERS = ["SD35Loader", "SD35ModelLoader"];
const WATCHED = [
    ...LOADERS, "SD35Sampler", "SD35Upscale", "SkipLayerGuidance", "SD35ControlNetApply",
    "SD35ControlNetLoader", "SD35StepCache",
];
const RECIPE = "sd35_recipe";
const UNREAD = "Not shown: this node is bypassed, muted or in a subgraph that no node stands for.";
const PAUSE = 120;

const board = {
    entries: new Set(), // {node, state, panel, visible, drawn}; no panel until wanted
    drawnFirst: [], // entries that the classic canvas has just drawn
    recipes: {},
    timer: null,
    asked: "", // the last question
    chosenModel: null, // the loader whose model a person has just chosen
};
const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
        target.sd35.visible = isIntersecting;
        draw(target.sd35);
    }
});

function widget(node, name) {
    return node?.widgets?.find((found) => found.name === name);
}

function write(node, values) {
    for (const [name, value] of Object.entries(values)) {
        const found = widget(node, name);
        if (!found || found.value === value) continue;
        found.value = value;
        found.callback?.(value, app.canvas, node);
    }
    node?.setDirtyCanvas?.(true, true);
}

function apply(node, state, key) {
    node.properties[RECIPE] = key;
    const { sampler, skip } = board.recipes[key];
    write(node, sampler);
    for (const path of state.skip_nodes) write(nodeAt(path), skip);
    refresh();
}

// The server names a node in a subgraph by the way to it: "7:12" is node 12 in what node 7 stands for.
function pathsOf(node, graph = app.graph) {
    if (node.graph === graph) return [String(node.id)];
    const inside = graph.nodes.filter((found) => found.subgraph);
    return inside.flatMap(({ id, subgraph }) => pathsOf(node, subgraph).map((p) => `${id}:${p}`));
}

function nodeAt(path) {
    let graph = app.graph;
    let node = null;
    for (const id of String(path).split(":")) {
        node = graph?.nodes.find((found) => String(found.id) === id);
        graph = node?.subgraph;
    }
    return node;
}

function refresh() {
    clearTimeout(board.timer);
    const again = () => (board.asked = ""); // a server that was away is asked again
    board.timer = setTimeout(() => ask().catch(again), PAUSE);
}

async function ask() {
    if (!board.entries.size) return;
    if (LiteGraph.vueNodesMode) board.entries.forEach(addPanel);
    const workflow = app.graph.serialize();
    const nodes = workflow.nodes.map(({ id, type, mode, inputs, widgets_values, properties }) => ({
        id, type, mode, inputs, widgets_values, properties,
    }));
    const { links, definitions } = workflow;
    const body = JSON.stringify({ nodes, links, definitions });
    if (body === board.asked) return;
    board.asked = body;
    const answer = await api.fetchApi("/sd35/plan", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body,
    });
    const plan = await answer.json();
    if (body !== board.asked) return;
    if (answer.ok) show(plan);
    else refuse(plan.error);
}

// What a person chose belongs to the answer that did not come; nothing is filled in later.
function refuse(words) {
    board.chosenModel = null;
    for (const entry of board.entries) {
        entry.state = refused(words);
        draw(entry);
    }
}

function show(plan) {
    const loader = board.chosenModel;
    board.chosenModel = null;
    for (const entry of board.entries) {
        const { node } = entry;
        const paths = node.graph ? pathsOf(node) : [];
        const state = paths.map((path) => plan[path]).find(Boolean) ?? refused(UNREAD);
        if (loader !== null && loader === state.loader && state.model_recipe) {
            apply(node, state, state.model_recipe);
        }
        entry.state = state;
        draw(entry);
    }
}

// Panels out of sight wait: a large workflow has hundreds.
function draw(entry) {
    const { node, state, panel, visible } = entry;
    if (!visible || !state) return;
    const text = JSON.stringify(state);
    if (text === entry.drawn) return;
    entry.drawn = text;
    panel.replaceChildren(...PARTS[state.kind](node, state));
}

const refused = (words) => ({ kind: "refused", refused: words });

const PARTS = {
    refused: (node, state) => refusedPanel(state),
    layers: (node, state) => layersPanel(state, { set: (layers) => write(node, { layers }) }),
    sampler: (node, state) =>
        samplerPanel(node.comfyClass, state, board.recipes, {
            choose: (key) => apply(node, state, key),
            restore: () => apply(node, state, state.recipe),
        }),
};

function watch(node) {
    for (const found of node.widgets ?? []) {
        const before = found.callback;
        found.callback = function (...values) {
            const result = before?.apply(this, values);
            const byHand = values.length > 1; // a file that is opened gives the value alone
            if (byHand && LOADERS.includes(node.comfyClass) && found.name === "model") {
                board.chosenModel = pathsOf(node)[0] ?? null;
                board.asked = "";
            }
            refresh();
            return result;
        };
    }
    const connected = node.onConnectionsChange;
    node.onConnectionsChange = function (...change) {
        refresh();
        return connected?.apply(this, change);
    };
}

// A DOM widget costs every frame something, seen or not: on the classic canvas a node gets its own
// when it is first drawn. Nodes 2.0 draws none there, and builds a node fastest with its widgets.
function expectPanel(node) {
    const entry = { node, state: null, panel: null, visible: false, drawn: "" };
    board.entries.add(entry);
    const removed = node.onRemoved;
    node.onRemoved = function (...values) {
        if (entry.panel) seen.unobserve(entry.panel);
        board.entries.delete(entry);
        return removed?.apply(this, values);
    };
    if (LiteGraph.vueNodesMode) {
        addPanel(entry);
        return;
    }
    const drawn = node.onDrawForeground;
    node.onDrawForeground = function (...values) {
        node.onDrawForeground = drawn;
        const { drawnFirst } = board;
        if (!drawnFirst.length) setTimeout(() => drawnFirst.splice(0).forEach(addPanel));
        drawnFirst.push(entry);
        return drawn?.apply(this, values);
    };
}

function addPanel(entry) {
    const { node } = entry;
    if (entry.panel || !board.entries.has(entry)) return;
    const height = HEIGHTS[node.comfyClass];
    const panel = element("div", { class: "sd35-panel" });
    for (const kind of ["pointerdown", "wheel"]) {
        panel.addEventListener(kind, (event) => {
            if (event.target.closest("button")) event.stopPropagation();
        });
    }
    const made = node.addDOMWidget("sd35_panel", "sd35_panel", panel, {
        serialize: false,
        hideOnZoom: true,
        getMinHeight: () => height,
        getMaxHeight: () => height,
    });
    made.serialize = false;
    entry.panel = panel;
    panel.sd35 = entry;
    seen.observe(panel);
    const [width, least] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], least)]);
}

app.registerExtension({
    name: "sd35.panels",
    async setup() {
        const style = { rel: "stylesheet", href: new URL("./sd35.css", import.meta.url).href };
        document.head.append(element("link", style));
        board.recipes = await (await api.fetchApi("/sd35/recipes")).json();
        api.addEventListener("graphChanged", refresh);
        refresh();
    },
    nodeCreated(node) {
        if (!WATCHED.includes(node.comfyClass)) return;
        if (node.comfyClass in HEIGHTS) expectPanel(node);
        watch(node);
        refresh();
    },
    beforeConfigureGraph(graph) {
        board.chosenModel = null;
        const words = toldApart(graph, LiteGraph.registered_node_types.SD35Loader);
        if (words) {
            app.extensionManager?.toast?.add({ severity: "info", summary: "SD35Loader", detail: words });
        }
    },
    afterConfigureGraph() {
        board.asked = "";
        refresh();
    },
});
