// A list below a button, over everything. Arrow keys, Home, End and Tab move, Enter chooses,
// Escape closes. A <select> does the same, but makes the browser lay out every frame of a drag.

import { element } from "./dom.js";

// entries: [{text, chosen, choose()}].
export function openMenu(button, entries) {
    const items = entries.map(({ text, chosen, choose }) => {
        const onclick = () => {
            list.hidePopover();
            choose();
        };
        return element("button", { role: "menuitemradio", "aria-checked": chosen, onclick }, text);
    });
    const list = element("div", { class: "sd35-menu", role: "menu", popover: "auto" }, ...items);
    list.addEventListener("toggle", ({ newState }) => newState === "closed" && list.remove());
    list.addEventListener("keydown", (event) => {
        event.stopPropagation(); // or ComfyUI takes it for the canvas
        const here = items.indexOf(document.activeElement);
        const next = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: -1 }[event.key];
        if (next === undefined) return;
        event.preventDefault();
        items.at(next % items.length).focus();
    });
    document.body.append(list);
    list.showPopover();
    const { left, bottom } = button.getBoundingClientRect();
    list.style.left = `${Math.max(0, Math.min(left, innerWidth - list.offsetWidth))}px`;
    list.style.top = `${Math.max(0, Math.min(bottom, innerHeight - list.offsetHeight))}px`;
    (items[entries.findIndex(({ chosen }) => chosen)] ?? items[0]).focus();
}
