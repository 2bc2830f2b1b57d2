// The pack's panels on the canvas: the only file that touches ComfyUI's `app`.
//
// The server reads the open workflow and answers what to show (nodes/host/canvas.py); this file
// asks after every change, and writes into widgets what a person chose.

import { api } from "/scripts/api.js";
import { app } from "/scripts/app.js";
import { element } from "./lib/dom.js";
import { toldApart } from "./lib/namesake.js";
import { offersOurs } from "./lib/offer.js";
import { layersPanel, refusedPanel, reportPanel, samplerPanel } from "./lib/panels.js";
import { decisive, nodeAt, pathsOf } from "./lib/paths.js";
import { addPiece } from "./lib/piece.js";

const HEIGHTS = { SD35Sampler: 180, SD35Upscale: 180, SkipLayerGuidance: 70 }; // until a panel is drawn
const LOADERS = ["SD35Loader", "SD35ModelLoader"];
const TELLING = [
    ...LOADERS, "SD35ControlNetLoader", "SD35StepCache", "SD35SkipLayerSweep", "SD35Quantize",
    "SD35Check", "SD35Upscale", "SD35TrainLoRA",
];
const WATCHED = [
    ...TELLING, "SD35Sampler", "SkipLayerGuidance", "SD35ControlNetApply",
];
const RECIPE = "sd35_recipe";
const REPORT = "sd35_report"; // among a node's outputs; nodes/host/report.py
const UNREAD = "Not shown: this node is bypassed, muted or in a subgraph that no node stands for.";
const PAUSE = 120;
const USE_OURS = "SD3.5: use this pack's nodes";

const board = {
    entries: new Map(), // node -> {node, path, state, panel, visible, drawn}; no panel until wanted
    drawnFirst: [], // entries that the classic canvas has just drawn
    checks: new Set(), // nodes that have no panel and may wear a badge
    reports: new WeakMap(), // node -> where its report stands
    models: new WeakMap(), // loader -> path -> the model that it had
    badges: new Map(), // node whose check has an error -> the badge on it
    marks: new WeakMap(), // node -> where that stands in Nodes 2.0
    recipes: {},
    timer: null,
    asked: "", // the last question
    chosenModel: null, // the loader whose model a person has just chosen
};

const root = () => app.rootGraph ?? app.graph;

function write(path, values) {
    for (const [name, value] of Object.entries(values)) {
        const found = decisive(path, name, root());
        if (!found || found.widget.value === value) continue;
        found.widget.value = value;
        found.widget.callback?.(value, app.canvas, found.node);
        found.node.setDirtyCanvas?.(true, true);
    }
    refresh();
}

function apply({ node, path, state }, key) {
    node.properties[RECIPE] = key;
    const { sampler, skip } = board.recipes[key];
    write(path, sampler);
    for (const other of state.skip_nodes) write(other, skip);
}

function refresh() {
    clearTimeout(board.timer);
    const again = () => (board.asked = ""); // a server that was away is asked again
    board.timer = setTimeout(() => ask().catch(again), PAUSE);
}

async function ask() {
    if (!board.entries.size && !board.checks.size) return;
    if (LiteGraph.vueNodesMode) board.entries.forEach(addPanel);
    const workflow = root().serialize();
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
    for (const entry of board.entries.values()) {
        entry.state = refused(words);
        draw(entry);
    }
}

// Loaders whose model is another than before: chosen on them, or on a widget further out.
function changedLoaders(plan) {
    const found = [board.chosenModel];
    board.chosenModel = null;
    for (const [path, { kind, model }] of Object.entries(plan)) {
        const node = kind === "loader" ? nodeAt(path, root()) : null;
        if (!node) continue;
        const before = board.models.get(node) ?? new Map();
        if (before.has(path) && before.get(path) !== model) found.push(path);
        board.models.set(node, before.set(path, model));
    }
    return found;
}

function show(plan) {
    const loaders = changedLoaders(plan);
    for (const entry of board.entries.values()) {
        const { node } = entry;
        const paths = node.graph ? pathsOf(node, root()) : [];
        entry.path = paths.find((path) => plan[path]) ?? null;
        entry.state = plan[entry.path] ?? refused(UNREAD);
        const { loader, model_recipe: recipe, fitting, depth } = entry.state;
        if (fitting && entry.fresh) write(entry.path, { layers: fitting });
        if (depth) entry.fresh = false;
        if (recipe && loader !== null && loaders.includes(loader)) apply(entry, recipe);
        draw(entry);
    }
    const wrong = new Map(); // node -> errors
    for (const [path, { errors }] of Object.entries(plan)) {
        const node = errors ? nodeAt(path, root()) : null;
        if (node) wrong.set(node, Math.max(errors, wrong.get(node) ?? 0));
    }
    for (const node of new Set([...wrong.keys(), ...board.badges.keys()])) {
        mark(node, wrong.get(node) ?? 0);
    }
}

function mark(node, errors) {
    const words = `${errors} ${errors === 1 ? "error" : "errors"}`;
    const text = errors ? `✖ ${words}` : "";
    const before = board.badges.get(node);
    if ((before?.text ?? "") === text) return;
    const others = node.badges.filter((badge) => badge !== before);
    board.badges.delete(node);
    if (text) board.badges.set(node, new LGraphBadge({ text, fgColor: "#fff", bgColor: "#b3261e" }));
    const oldValue = node.badges;
    node.badges = text ? [...others, board.badges.get(node)] : others;
    const change = { nodeId: node.id, property: "badges", oldValue, newValue: node.badges };
    node.graph?.trigger("node:property:changed", { type: "node:property:changed", ...change });
    if (LiteGraph.vueNodesMode && !board.entries.has(node)) line(board.marks, node, errors ? `error: ${words}` : "");
    node.setDirtyCanvas?.(true, true);
}

// Panels out of sight wait: a large workflow has hundreds.
function draw(entry) {
    const { state, panel, visible } = entry;
    if (!visible || !state) return;
    const text = JSON.stringify(state);
    if (text === entry.drawn) return;
    entry.drawn = text;
    panel.fill(...PARTS[state.kind](entry));
}

const refused = (words) => ({ kind: "refused", refused: words });

const PARTS = {
    refused: ({ state }) => refusedPanel(state),
    layers: ({ path, state }) =>
        layersPanel(state, { set: (layers) => write(path, { layers }) }),
    sampler: (entry) =>
        samplerPanel(entry.node.comfyClass, entry.state, board.recipes, {
            choose: (key) => apply(entry, key),
            restore: () => apply(entry, entry.state.recipe),
        }),
};

function watch(node) {
    for (const found of node.widgets ?? []) {
        const before = found.callback;
        found.callback = function (...values) {
            const result = before?.apply(this, values);
            const byHand = values.length > 1; // a file that is opened gives the value alone
            if (byHand && LOADERS.includes(node.comfyClass) && found.name === "model") {
                board.chosenModel = pathsOf(node, root())[0] ?? null;
                board.asked = "";
            }
            refresh();
            return result;
        };
    }
    after(node, "onConnectionsChange", refresh);
}

// Calls `also` whenever a node's own method was called.
function after(node, method, also) {
    const before = node[method];
    node[method] = function (...values) {
        also();
        return before?.apply(this, values);
    };
}

// A DOM widget costs every frame something, seen or not: on the classic canvas a node gets its own
// when it is first drawn. Nodes 2.0 draws none there, and builds a node fastest with its widgets.
function expectPanel(node) {
    const entry = { node, path: null, state: null, panel: null, visible: false, drawn: "" };
    entry.fresh = !app.configuringGraph; // put down by a person, and not on a model yet
    board.entries.set(node, entry);
    after(node, "onRemoved", () => {
        entry.panel?.remove();
        board.entries.delete(node);
    });
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
    if (entry.panel || board.entries.get(node) !== entry) return;
    entry.panel = addPiece(node, "sd35_panel", HEIGHTS[node.comfyClass], (visible) => {
        entry.visible = visible;
        draw(entry);
    });
}

// What a node told stands below its widgets until it tells something else.
function report(node, text) {
    if (!TELLING.includes(node?.comfyClass) || typeof text !== "string") return;
    line(board.reports, node, text);
}

// Nodes 2.0 draws no badge that comes later: one that has no panel gets a line in its place.
function line(pieces, node, text) {
    if (!pieces.has(node)) {
        if (!text) return;
        const name = pieces === board.reports ? REPORT : "sd35_badge";
        const piece = addPiece(node, name, 20, () => {});
        pieces.set(node, piece);
        after(node, "onRemoved", piece.remove);
    }
    pieces.get(node).fill(...reportPanel(text));
}

// A workflow that is shown again has the outputs that it had, but new nodes.
function reportAgain() {
    const outputs = app.nodeOutputs ?? {};
    for (const [place, output] of Object.entries(outputs)) {
        const parts = place.split(":"); // a node's id, or its subgraph's and its own
        const graph = parts.length > 1 ? root().subgraphs?.get(parts[0]) : root();
        const node = graph?.nodes.find(({ id }) => String(id) === parts.at(-1));
        report(node ?? nodeAt(place, root()), output?.[REPORT]?.[0]);
    }
}

function tell(severity, summary, detail) {
    app.extensionManager?.toast?.add({ severity, summary, detail, life: 20_000 });
}

// The workflow, once nothing of it has changed for a while; after two seconds as it is.
async function settled() {
    let [before, now] = ["", ""];
    for (let rounds = 0; rounds < 5 && (!now || now !== before); rounds += 1) {
        app.canvas.setDirty(true, true);
        await new Promise((done) => setTimeout(done, 4 * PAUSE));
        [before, now] = [now, JSON.stringify(root().serialize())];
    }
    return JSON.parse(now);
}

// Puts this pack's nodes in the places of ComfyUI's own. The new workflow comes in as what Ctrl+Y
// would bring back, so that it is one step of the canvas' own history.
async function useOurs() {
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
    (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
    const body = JSON.stringify(root().serialize());
    const headers = { "Content-Type": "application/json" };
    const answer = await api.fetchApi("/sd35/migrate", { method: "POST", headers, body });
    const found = await answer.json();
    if (!answer.ok) return tell("warn", USE_OURS, found.error);
    if (!found.replaced.length) return tell("info", USE_OURS, found.report);
    if (JSON.stringify(root().serialize()) !== body) {
        return tell("warn", USE_OURS, "The workflow was changed meanwhile, so it stays. Try again.");
    }
    tracker.redoQueue.splice(0, Infinity, found.workflow);
    await tracker.redo();
    tracker.activeState = await settled(); // or the room that panels take would be a step too
    tell("success", USE_OURS, `${found.replaced.join("\n")}\nCtrl+Z takes it back.`);
    if (found.left.length) tell("info", USE_OURS, found.left.join("\n"));
}

app.registerExtension({
    name: "sd35.panels",
    commands: [{ id: "SD35.UseOurs", label: USE_OURS, icon: "pi pi-sync", function: useOurs }],
    getCanvasMenuItems() {
        return offersOurs(root()) ? [null, { content: USE_OURS, callback: useOurs }] : [];
    },
    async setup() {
        const style = { rel: "stylesheet", href: new URL("./sd35.css", import.meta.url).href };
        document.head.append(element("link", style));
        board.recipes = await (await api.fetchApi("/sd35/recipes")).json();
        api.addEventListener("graphChanged", refresh);
        api.addEventListener("sd35.report", ({ detail: { node, text } }) =>
            report(nodeAt(node, root()), text),
        );
        api.addEventListener("executed", ({ detail: { node, display_node: shown, output } }) =>
            report(nodeAt(shown ?? node, root()), output?.[REPORT]?.[0]),
        );
        refresh();
    },
    nodeCreated(node) {
        if (!WATCHED.includes(node.comfyClass)) return;
        if (node.comfyClass in HEIGHTS) expectPanel(node);
        if (node.comfyClass === "SD35Check") {
            board.checks.add(node);
            after(node, "onRemoved", () => board.checks.delete(node));
        }
        watch(node);
        refresh();
    },
    beforeConfigureGraph(graph) {
        board.chosenModel = null;
        board.badges.clear();
        const words = toldApart(graph, LiteGraph.registered_node_types.SD35Loader);
        if (words) {
            app.extensionManager?.toast?.add({ severity: "info", summary: "SD35Loader", detail: words });
        }
    },
    afterConfigureGraph() {
        board.asked = "";
        setTimeout(reportAgain, PAUSE);
        refresh();
    },
});
