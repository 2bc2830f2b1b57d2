// The sigma curve of a run as an SVG, with the steps on which something acts shaded.

import { shape } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 96;
const EDGE = 6;

export function curve(sigmas, bands) {
    const steps = Math.max(sigmas.length - 1, 0);
    const x = (step) => EDGE + (step / Math.max(steps, 1)) * (WIDTH - 2 * EDGE);
    const y = (sigma) => HEIGHT - EDGE - sigma * (HEIGHT - 2 * EDGE);
    const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "sd35-curve" });
    svg.append(shape("rect", { class: "sd35-ground", width: WIDTH, height: HEIGHT, rx: 4 }));
    for (const band of bands) {
        const part = shape("g", { class: `sd35-band-${band.kind}` });
        for (const [first, last] of runs(band.steps)) {
            const width = x(last + 1) - x(first);
            part.append(shape("rect", { x: x(first), y: EDGE, width, height: HEIGHT - 2 * EDGE }));
        }
        svg.append(part);
    }
    const places = sigmas.map((sigma, step) => [x(step).toFixed(1), y(sigma).toFixed(1)]);
    if (steps) svg.append(shape("polyline", { class: "sd35-line", points: places.join(" ") }));
    const dots = places.map(([left, top]) => `M${left} ${top}h.01`).join("");
    if (steps <= 60) svg.append(shape("path", { class: "sd35-dots", d: dots }));
    return svg;
}

// [3, 4, 5, 9] -> [[3, 5], [9, 9]]
export function runs(steps) {
    const found = [];
    for (const step of steps) {
        const last = found[found.length - 1];
        if (last && last[1] === step - 1) last[1] = step;
        else found.push([step, step]);
    }
    return found;
}
