// RES4LYF, another pack, has a node SD35Loader too. A workflow is put right before it is opened,
// so that neither pack's widgets get the other's values (nodes/host/namesake.py does so for the API).

const LOADER = "SD35Loader";
const ALIAS = "SD35ModelLoader";
const THEIRS = ["model_name", "weight_dtype", "clip_name1", "clip_name2_opt", "clip_name3_opt", "vae_name"];
const OURS = ["model", "clip_l", "clip_g", "t5xxl", "vae", "weight_dtype", "modulation_cache"];

function isTheirs(node) {
    const names = (node.inputs ?? []).map((input) => input.widget?.name ?? input.name);
    if (names.includes("model_name")) return true;
    if (names.includes("clip_l")) return false;
    if (node.properties?.cnr_id) return /res4lyf/i.test(node.properties.cnr_id);
    return Array.isArray(node.widgets_values) && node.widgets_values.length === THEIRS.length;
}

function ourValues(values) {
    const given = Object.fromEntries(THEIRS.map((name, place) => [name, values[place]]));
    const found = { clip_l: "none", clip_g: "none", t5xxl: "none" };
    for (const name of [given.clip_name1, given.clip_name2_opt, given.clip_name3_opt]) {
        const plain = String(name).toLowerCase();
        const kind = plain.includes("t5") ? "t5xxl" : plain.includes("clip_g") ? "clip_g" : "clip_l";
        if (plain === ".use_ckpt_clip") for (const key in found) found[key] = "from model file";
        else if (name && plain !== ".none") found[kind] = name;
    }
    const vae = given.vae_name === ".use_ckpt_vae" ? "from model file" : given.vae_name;
    const all = { model: given.model_name, ...found, vae, weight_dtype: given.weight_dtype ?? "default" };
    return OURS.map((name) => all[name] ?? "auto");
}

function everyNode(graph) {
    const inside = (graph.definitions?.subgraphs ?? []).flatMap((inner) => inner.nodes ?? []);
    return [...(graph.nodes ?? []), ...inside];
}

// Changes the workflow; returns what a person has to be told, or nothing.
export function toldApart(graph, registered) {
    const oursIsThere = registered?.nodeData?.input?.required?.clip_l !== undefined;
    let changed = 0;
    for (const node of everyNode(graph)) {
        if (node.type !== LOADER || isTheirs(node) === !oursIsThere) continue;
        changed += 1;
        if (!oursIsThere) {
            node.type = ALIAS;
        } else if (Array.isArray(node.widgets_values)) {
            node.widgets_values = ourValues(node.widgets_values);
            node.inputs = (node.inputs ?? []).filter((input) => !input.widget);
        }
    }
    if (!changed) return "";
    return oursIsThere
        ? "This workflow was made with RES4LYF's SD35Loader; SD3.5 Loader stands in its place. Look at its files."
        : "RES4LYF has a node SD35Loader too, and ComfyUI keeps that one. SD3.5 Loader is here as SD3.5 Loader (beside RES4LYF).";
}
