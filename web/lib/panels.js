// What stands on the nodes: pure functions from the server's answers to elements.

import { curve } from "./curve.js";
import { element } from "./dom.js";
import { openMenu } from "./menu.js";

const MARKS = { error: "✖", warning: "▲", note: "•" };

// recipes: key -> {name, node}. on: {choose(key), restore()}.
export function samplerPanel(kind, state, recipes, on) {
    const fitting = Object.entries(recipes).filter(([, { node }]) => node === kind);
    const entries = fitting.map(([key, { name }]) => ({
        text: name,
        chosen: key === state.recipe,
        choose: () => on.choose(key),
    }));
    const choice = element(
        "button",
        {
            class: "sd35-recipe",
            title: "Fills the widgets with the settings that a model was made for.",
            "aria-haspopup": "menu",
            onclick: () => openMenu(choice, entries),
        },
        element("span", {}, recipes[state.recipe]?.name ?? "Recipe"),
    );
    const restore = element(
        "button",
        { class: "sd35-restore", title: "Back to the recipe", onclick: on.restore },
        "↺",
    );
    restore.disabled = state.changed.length === 0;
    const changed = state.changed.map(([, widget, seen, wanted]) => `${widget} ${seen} (${wanted})`);
    const words = changed.length ? `changed: ${changed.join(", ")}` : "as the recipe";
    return [
        element("div", { class: "sd35-row" }, choice, restore),
        element(
            "div",
            { class: "sd35-changed", title: `${words}\nIn brackets: what the recipe says.` },
            state.recipe ? words : "",
        ),
        curve(state.sigmas, state.bands),
        element("div", { class: "sd35-legend" }, ...legend(state)),
        element("div", { class: "sd35-findings" }, ...said(state)),
    ];
}

function legend({ sigmas, bands }) {
    const items = [element("span", {}, `${Math.max(sigmas.length - 1, 0)} steps`)];
    for (const band of bands) {
        const count = `${band.name}: ${band.steps.length}`;
        items.push(element("span", { class: `sd35-key-${band.kind}` }, count));
    }
    return items;
}

function said({ findings, model_recipe: known }) {
    if (findings.length || !known) return findings.map(finding);
    return [element("div", { class: "sd35-note" }, "✓ Nothing to say: this fits SD3.5.")];
}

function finding([severity, text]) {
    return element("div", { class: `sd35-${severity}` }, `${MARKS[severity]} ${text}`);
}

export function refusedPanel({ refused }) {
    return [element("div", { class: "sd35-findings" }, finding(["warning", refused]))];
}

// A report as a node told it: a line each, what is grave in its colour.
export function reportPanel(text) {
    if (!text) return [];
    const lines = text.trim().split("\n").map((line) => {
        const [, severity, words] = line.match(/^(error|warning|note): (.*)$/) ?? [];
        return severity ? finding([severity, words]) : element("div", {}, line);
    });
    return [element("div", { class: "sd35-report" }, ...lines)];
}

// on: {set(layers)}.
export function layersPanel(state, on) {
    if (state.depth === null) {
        const words = "Connect SD3.5 Loader to see the model's layers.";
        return [element("div", { class: "sd35-changed" }, words)];
    }
    const chosen = new Set(state.layers);
    const toggles = Array.from({ length: state.depth }, (_, layer) => {
        const pressed = chosen.has(layer);
        return element(
            "button",
            {
                class: "sd35-layer",
                "aria-pressed": pressed,
                title: `Layer ${layer}${pressed ? ": skipped" : ""}`,
                onclick: () => {
                    if (pressed) chosen.delete(layer);
                    else chosen.add(layer);
                    on.set([...chosen].sort((a, b) => a - b).join(", "));
                },
            },
            `${layer}`,
        );
    });
    const presets = state.presets.map(([name, layers]) =>
        element("button", { class: "sd35-preset", onclick: () => on.set(layers) }, name),
    );
    return [
        element("div", { class: "sd35-layers" }, ...toggles),
        element("div", { class: "sd35-row" }, ...presets),
        element("div", { class: "sd35-error" }, state.error ?? ""),
    ];
}
