"""What stands on the nodes of a real canvas, in both renderers, used with mouse and keyboard."""

from __future__ import annotations

import copy
import json
from typing import Any

from tools import bench_canvas, browser
from tools import host as hosts

from ..conftest import PACK
from .board import (
    ADD_SKIP_LAYERS,
    LOADER,
    LONG,
    PANEL,
    SAMPLER,
    SET,
    SKIP,
    add_from_search,
    answered,
    choose,
    empty,
    of,
    opened,
    panel,
    set_widget,
    shot,
    widgets,
    with_skip_layers,
)
from .conftest import read

PLACES = {
    "SD35Loader": (0, 0), "CLIPTextEncode": (420, 0), "SkipLayerGuidance": (420, 320),
    "EmptySD3LatentImage": (0, 420), "SD35Sampler": (900, 0), "VAEDecode": (1320, 0),
    "SaveImage": (1320, 150),
}  # fmt: skip


def test_a_new_guidance_takes_layers_of_the_model_and_an_opened_one_keeps_its_own(
    page: Any,
) -> None:
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    with answered(page):
        of(page, SAMPLER, ADD_SKIP_LAYERS)
    page.wait_for_timeout(1000)
    assert widgets(page, SKIP)["layers"] == "1"
    set_widget(page, SKIP, "layers", "7, 8, 9")
    page.wait_for_timeout(500)
    assert widgets(page, SKIP)["layers"] == "7, 8, 9", "what a person writes stays"
    with answered(page):
        page.evaluate("async () => await app.loadGraphData(app.graph.serialize())")
    page.wait_for_timeout(1000)
    assert widgets(page, SKIP)["layers"] == "7, 8, 9", "what a file says stays"


def test_a_recipe_fills_the_widgets_marks_changes_and_comes_back(page: Any) -> None:
    with_skip_layers(page)
    recipe = panel(page, SAMPLER).locator(".sd35-recipe")
    changed = panel(page, SAMPLER).locator(".sd35-changed")
    assert recipe.inner_text() == "SD3.5 nano + Skip Layer Guidance"
    assert changed.inner_text() == "changed: layers 7, 8, 9 (1)"
    with answered(page):
        panel(page, SAMPLER).locator(".sd35-restore").click()
    assert widgets(page, SKIP)["layers"] == "1" and widgets(page, SKIP)["scale"] == 2.5
    choose(page, "SD3.5 Medium + Skip Layer Guidance")
    assert recipe.inner_text() == "SD3.5 Medium + Skip Layer Guidance"
    seen = widgets(page, SAMPLER)
    wanted = {"steps": 50, "cfg": 4, "shift": 3, "sampler": "dpmpp_2m", "schedule": "normal"}
    assert {name: seen[name] for name in wanted} == wanted
    layers = {"layers": "7, 8, 9", "scale": 2.5, "start": 0.01, "end": 0.2}
    assert {k: v for k, v in widgets(page, SKIP).items() if k in layers} == layers
    assert changed.inner_text() == "as the recipe"
    set_widget(page, SAMPLER, "steps", 20)
    set_widget(page, SKIP, "scale", 1.5)
    assert changed.inner_text() == "changed: steps 20 (50), scale 1.5 (2.5)"
    shot(page, "changed")
    with answered(page):
        panel(page, SAMPLER).locator(".sd35-restore").click()
    assert widgets(page, SAMPLER)["steps"] == 50 and widgets(page, SKIP)["scale"] == 2.5
    assert changed.inner_text() == "as the recipe"


def test_the_list_of_recipes_takes_keys(page: Any) -> None:
    with_skip_layers(page)
    recipe, menu = panel(page, SAMPLER).locator(".sd35-recipe"), page.locator(".sd35-menu")
    recipe.focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.activeElement.innerText") == recipe.inner_text()
    shot(page, "recipes")
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")
    menu.wait_for(state="detached", timeout=LONG)
    assert widgets(page, SAMPLER)["steps"] == 28
    recipe.press("Enter")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    with answered(page):
        page.keyboard.press("Enter")
    menu.wait_for(state="detached", timeout=LONG)
    assert recipe.inner_text() == "SD3.5 Medium"
    assert widgets(page, SAMPLER)["steps"] == 50


def test_the_curve_has_a_point_for_each_step_and_shows_what_acts(page: Any) -> None:
    with_skip_layers(page)
    set_widget(page, SKIP, "layers", "1")
    for steps, acting in ((27, 5), (50, 9), (6, 1)):
        set_widget(page, SAMPLER, "steps", steps)
        points = panel(page, SAMPLER).locator("polyline").get_attribute("points").split()
        assert len(points) == steps + 1
        legend = panel(page, SAMPLER).locator(".sd35-legend").inner_text()
        assert f"{steps} steps" in legend and f"Skip Layer Guidance: {acting}" in legend


def test_a_layer_is_toggled_and_the_text_stays_the_truth(page: Any) -> None:
    with_skip_layers(page)
    toggles = panel(page, SKIP).locator(".sd35-layer")
    assert toggles.count() == 4
    set_widget(page, SKIP, "layers", "1-2")
    pressed = [toggles.nth(i).get_attribute("aria-pressed") for i in range(4)]
    assert pressed == ["false", "true", "true", "false"]
    with answered(page):
        toggles.nth(3).click()
    assert widgets(page, SKIP)["layers"] == "1, 2, 3"
    with answered(page):
        toggles.nth(1).click()
    assert widgets(page, SKIP)["layers"] == "2, 3"
    set_widget(page, SKIP, "layers", "9")
    assert "there is no layer 9" in panel(page, SKIP).locator(".sd35-error").inner_text()
    with answered(page):
        panel(page, SKIP).locator(".sd35-preset", has_text="layer 1").click()
    assert widgets(page, SKIP)["layers"] == "1"
    shot(page, "layers")


def test_a_workflow_that_is_too_large_says_so_on_the_panel_until_it_is_not(page: Any) -> None:
    workflow = read(PACK / "workflows" / "text_to_image.json")
    note = {"id": 99, "type": "Note", "pos": [0, 0], "size": [200, 100], "inputs": [],
            "outputs": [], "widgets_values": ["x" * 2_100_000]}  # fmt: skip
    opened(page, {**workflow, "nodes": [*workflow["nodes"], note], "last_node_id": 99})
    words = page.locator(f"{PANEL} .sd35-findings").first
    assert "too large to check: more than 2 MB" in words.inner_text()
    shot(page, "too_large")
    page.evaluate("() => { app.graph.remove(app.graph.getNodeById(99)); }")
    set_widget(page, SAMPLER, "steps", 27)
    assert "27 steps" in panel(page, SAMPLER).locator(".sd35-legend").inner_text()


def test_opening_a_hostile_number_harms_neither_page_nor_server(page: Any) -> None:
    prompt = read(PACK / "workflows" / "api" / "text_to_image.json")
    prompt["5"]["inputs"].update(denoise=1e-300, shift=-5.0)
    with answered(page):
        page.evaluate("async (p) => { await app.loadApiJson(p, 'hostile'); }", prompt)
    set_widget(page, SAMPLER, "denoise", 1.0)
    set_widget(page, SAMPLER, "shift", 1.0)
    assert "28 steps" in panel(page, SAMPLER).locator(".sd35-legend").inner_text()


def test_choosing_a_model_fills_the_sampler(page: Any) -> None:
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    set_widget(page, SAMPLER, "steps", 7)
    set_widget(page, SAMPLER, "shift", 3.0)
    set_widget(page, LOADER, "model", "sd35_nano.safetensors")
    page.wait_for_timeout(300)
    seen = widgets(page, SAMPLER)
    assert (seen["steps"], seen["shift"]) == (28, 1)


def test_opening_a_file_in_the_apis_format_keeps_its_settings(page: Any) -> None:
    prompt = read(PACK / "workflows" / "api" / "text_to_image.json")
    prompt["5"]["inputs"].update(steps=7, cfg=2.0, sampler="euler")
    with answered(page):
        page.evaluate("async (p) => { await app.loadApiJson(p, 'settings'); }", prompt)
    page.wait_for_timeout(500)
    seen = widgets(page, SAMPLER)
    assert (seen["steps"], seen["cfg"], seen["sampler"]) == (7, 2, "euler")
    changed = panel(page, SAMPLER).locator(".sd35-changed").inner_text()
    assert changed == "changed: steps 7 (28), cfg 2 (4), sampler euler (dpmpp_2m)"


def test_the_panel_says_what_the_check_would(page: Any) -> None:
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    set_widget(page, SAMPLER, "cfg", 15.0)
    warning = panel(page, SAMPLER).locator(".sd35-warning")
    assert "cfg is 15" in warning.inner_text()
    set_widget(page, SAMPLER, "cfg", 4.0)
    assert warning.count() == 0


def test_saved_and_opened_again_the_workflow_is_the_same(page: Any) -> None:
    with_skip_layers(page)
    choose(page, "SD3.5 Medium + Skip Layer Guidance")
    set_widget(page, SAMPLER, "steps", 33)

    def saved() -> dict[str, Any]:
        data = json.loads(page.evaluate("() => JSON.stringify(app.graph.serialize())"))
        return {k: v for k, v in data.items() if k not in ("extra", "id", "revision")}

    before, exported = saved(), browser.exported(page)
    shared = copy.deepcopy(before)
    opened(page, shared)
    assert saved() == before and browser.exported(page) == exported
    assert "sd35_panel" not in json.dumps(exported)
    changed = panel(page, SAMPLER).locator(".sd35-changed").inner_text()
    assert changed == "changed: steps 33 (50)"


def add(page: Any, words: str, kind: str) -> None:
    """As a person does, in one renderer: the other has the same search box."""
    if page.renderer == "classic":
        page.evaluate("(kind) => app.graph.add(LiteGraph.createNode(kind))", kind)
    else:
        add_from_search(page, words)


def arrange(page: Any, places: dict[str, tuple[int, int]]) -> None:
    for kind, place in places.items():
        of(page, kind, "node.pos = values[0]; app.canvas.setDirty(true, true);", place)
    page.evaluate("() => app.canvas.deselectAll()")
    page.wait_for_timeout(500)


def drag_link(page: Any, source: str, output: int, target: str, name: str) -> None:
    """Drag from a node's output to a node's input, by their places on the screen."""
    points = page.evaluate(
        """([source, output, target, name]) => {
            const find = (kind) => app.graph.nodes.filter((n) => n.type === kind);
            const [from] = find(source);
            const all = find(target);
            const to = all[all.length - 1];
            const input = to.inputs.findIndex((i) => i.name === name);
            const place = ([x, y]) => {
                const { offset, scale } = app.canvas.ds;
                const box = app.canvas.canvas.getBoundingClientRect();
                return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale];
            };
            return [place(from.getOutputPos(output)), place(to.getInputPos(input))];
        }""",
        [source, output, target, name],
    )
    links = "() => app.graph.serialize().links.length"
    before = page.evaluate(links)
    for _ in range(5):
        page.mouse.move(points[0][0] + 3, points[0][1] + 3)
        page.mouse.move(*points[0])
        page.wait_for_timeout(150)
        page.mouse.down()
        page.mouse.move(*points[1], steps=6)
        page.wait_for_timeout(150)
        page.mouse.up()
        page.wait_for_timeout(300)
        if page.evaluate(links) > before:
            return
    raise AssertionError(f"no link from {source} to {target}.{name}")


def test_every_node_comes_from_the_search_box(page: Any, server: hosts.Server) -> None:
    info = hosts.call(server.url, "/object_info")
    ours = {key: n["display_name"] for key, n in info.items() if n["category"] == "SD3.5"}
    assert len(ours) >= 11
    empty(page)
    for kind, name in ours.items():
        add(page, name, kind)
    arrange(page, {kind: (400 * (i % 4), 620 * (i // 4)) for i, kind in enumerate(ours)})
    seen = page.evaluate("() => app.graph.nodes.map((n) => n.type)")
    assert sorted(seen) == sorted(ours)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(500)
    shot(page, "all_nodes")


def test_a_workflow_is_built_by_hand_and_gives_a_picture(page: Any) -> None:
    empty(page)
    for words, kind in (
        ("SD3.5 Loader", "SD35Loader"), ("CLIP Text Encode (Prompt)", "CLIPTextEncode"),
        ("EmptySD3LatentImage", "EmptySD3LatentImage"),
        ("Skip Layer Guidance (SD3.5)", "SkipLayerGuidance"),
        ("DPM++ 2M Shift Sampler (SD3.5)", "SD35Sampler"), ("VAE Decode", "VAEDecode"),
        ("Save Image", "SaveImage"),
    ):  # fmt: skip
        add(page, words, kind)
    arrange(page, PLACES)
    for source, output, target, name in (
        ("SD35Loader", 0, "SkipLayerGuidance", "model"),
        ("SD35Loader", 1, "CLIPTextEncode", "clip"),
        ("SkipLayerGuidance", 0, "SD35Sampler", "model"),
        ("CLIPTextEncode", 0, "SD35Sampler", "positive"),
        ("CLIPTextEncode", 0, "SD35Sampler", "negative"),
        ("EmptySD3LatentImage", 0, "SD35Sampler", "latent"),
        ("SD35Sampler", 0, "VAEDecode", "samples"),
        ("SD35Loader", 2, "VAEDecode", "vae"),
        ("VAEDecode", 0, "SaveImage", "images"),
    ):
        drag_link(page, source, output, target, name)
    of(page, "CLIPTextEncode", SET, "text", "a big owl on a purple background")
    for side in ("width", "height"):
        of(page, "EmptySD3LatentImage", SET, side, 128)
    with answered(page):
        panel(page, SKIP).locator(".sd35-preset", has_text="layer 1").click()
    choose(page, "SD3.5 nano (comes with the pack)")
    assert "guidance cancels itself" in panel(page, SAMPLER).inner_text()
    browser.run(page)
    shot(page, "by_hand")


def test_three_hundred_nodes_open_whole(page: Any) -> None:
    with answered(page):
        bench_canvas.opening_and_dragging(page, bench_canvas.OURS)
    page.wait_for_timeout(500)
    assert page.evaluate("() => app.graph.nodes.length") == bench_canvas.NODES
    assert page.evaluate("() => app.graph.nodes.filter((n) => n.has_errors).length") == 0
    assert "as the recipe" not in panel(page, SAMPLER).first.inner_text()
    assert "40 steps" in panel(page, SAMPLER).first.inner_text()


def test_the_panels_follow_a_reload_and_a_change_of_renderer(page: Any) -> None:
    with_skip_layers(page)
    set_widget(page, SAMPLER, "steps", 20)
    before = page.evaluate("() => JSON.stringify(app.graph.serialize())")
    with answered(page):
        page.evaluate("async (text) => app.loadGraphData(JSON.parse(text))", before)
    set_widget(page, SAMPLER, "steps", 11)
    assert "11 steps" in panel(page, SAMPLER).inner_text()
    here = page.renderer != "classic"
    try:
        browser.set_renderer(page, not here)
        assert "11 steps" in panel(page, SAMPLER).inner_text()
        opened(page, json.loads(before))
        assert "20 steps" in panel(page, SAMPLER).inner_text()
        assert panel(page, SKIP).locator(".sd35-layer").count() == 4
    finally:
        browser.set_renderer(page, here)


def test_panels_in_a_subgraph_show_what_they_show_outside(page: Any) -> None:
    with_skip_layers(page)
    outside = panel(page, SAMPLER).locator(".sd35-changed").inner_text()
    with answered(page):
        page.evaluate(
            """(kinds) => {
                const graph = app.graph;
                const items = graph.nodes.filter((n) => kinds.includes(n.type));
                const { subgraph } = graph.convertToSubgraph(new Set(items));
                app.canvas.setGraph(subgraph);
            }""",
            [SAMPLER, SKIP],
        )
    page.wait_for_timeout(1500)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(500)
    shot(page, "subgraph")
    assert panel(page, SAMPLER).locator(".sd35-changed").inner_text() == outside
    assert panel(page, SKIP).locator(".sd35-layer").count() == 4


def test_a_set_up_that_fits_says_so(page: Any) -> None:
    opened(page, read(PACK / "workflows" / "text_to_image.json"))
    said = page.locator(PANEL).locator(".sd35-findings").first
    assert "Nothing to say" in said.inner_text()
