// Where a node stands, in words that the server shares: "7:12" is node 12 in the subgraph that
// node 7 stands for.

const INPUTS = -10; // the id of a subgraph's entrance, among its links

export function pathsOf(node, graph) {
    if (node.graph === graph) return [String(node.id)];
    const inside = graph.nodes.filter((found) => found.subgraph);
    return inside.flatMap(({ id, subgraph }) => pathsOf(node, subgraph).map((p) => `${id}:${p}`));
}

export function nodeAt(path, root) {
    let graph = root;
    let node = null;
    for (const id of String(path).split(":")) {
        node = graph?.nodes.find((found) => String(found.id) === id);
        graph = node?.subgraph;
    }
    return node ?? null;
}

// The widget that decides what a node's widget of that name is: its own, or the one that a node
// further out shows in its place. None where another node decides.
export function decisive(path, name, root) {
    const node = nodeAt(path, root);
    const input = node?.inputs?.find((found) => found.name === name);
    if (input?.link == null) {
        const widget = node?.widgets?.find((found) => found.name === name);
        return widget ? { node, widget } : null;
    }
    const link = node.graph.getLink?.(input.link) ?? node.graph.links.get(input.link);
    const slash = path.lastIndexOf(":");
    if (Number(link?.origin_id) !== INPUTS || slash < 0) return null;
    return decisive(path.slice(0, slash), node.graph.inputs[link.origin_slot].name, root);
}
