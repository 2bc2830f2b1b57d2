// A piece of a node that has as much room as what stands in it.

import { element } from "./dom.js";

const MARGIN = 10; // around a DOM widget, on the classic canvas
const PADDING = 6; // of .sd35-piece, above and below together
const SIDES = 32; // of a node's width that a piece does not have

// What is not on the screen is measured here.
const ruler = element("div", { class: "sd35-piece sd35-ruler" });

const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) target.sd35(isIntersecting);
});
const sized = new ResizeObserver((entries) => {
    for (const { target } of entries) target.sd35();
});

function heightOf(inside, width) {
    if (inside.offsetHeight) return inside.offsetHeight;
    if (!ruler.isConnected) document.body.append(ruler);
    ruler.style.width = `${width - SIDES}px`;
    ruler.replaceChildren(inside.cloneNode(true));
    const height = ruler.firstChild.offsetHeight;
    ruler.replaceChildren();
    return height;
}

// appear(visible) is called when it comes into sight or leaves it. A piece out of sight costs a
// frame nothing: its size is its own, and the browser never looks inside.
export function addPiece(node, name, height, appear) {
    const inside = element("div", { class: "sd35-inside" });
    const box = element("div", { class: "sd35-piece" }, inside);
    for (const kind of ["pointerdown", "wheel"]) {
        box.addEventListener(kind, (event) => {
            if (event.target.closest("button")) event.stopPropagation();
        });
    }
    const room = () => height + 2 * MARGIN;
    const made = node.addDOMWidget(name, name, box, {
        serialize: false,
        hideOnZoom: true,
        hideInPanel: true,
        getMinHeight: room,
        getMaxHeight: room,
    });
    made.serialize = false;
    box.sd35 = appear;
    inside.sd35 = fit;
    seen.observe(box);
    sized.observe(inside);

    function settle(least) {
        box.style.minHeight = `${height}px`;
        const [, lowest] = node.computeSize();
        const high = least ? lowest : Math.max(node.size[1], lowest);
        if (high !== node.size[1]) node.setSize([node.size[0], high]);
    }

    // A node that is as low as it can be stays so; one that a person has made higher stays that.
    function fit() {
        const inner = Math.ceil(heightOf(inside, node.size[0]));
        const wanted = inner ? inner + PADDING : 0;
        if (wanted === height) return;
        const least = node.size[1] <= node.computeSize()[1] + 1;
        height = wanted;
        settle(least);
    }

    settle(false);
    return {
        inside,
        fill(...parts) {
            inside.replaceChildren(...parts);
            fit();
        },
        remove() {
            seen.unobserve(box);
            sized.unobserve(inside);
        },
    };
}
