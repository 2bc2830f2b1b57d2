"""What the canvas draws on this pack's nodes: answers to the workflow that is open there.

The page asks with the canvas' own JSON; all arithmetic and all words are here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..errors import SettingError
from ..network.config import VARIANTS
from ..sampling.guidance import SkipLayers, parse_layers
from ..sampling.recipes import LAYER_PRESETS, MEDIUM_LAYERS, RECIPES, Recipe, layers_text
from .check import findings
from .finding import Finding
from .graph import Budget, TooLargeError
from .holdings import FindFile
from .links import leading_to
from .own_nodes import ALIAS, CHECK, LOADER, SAMPLER, SKIP, UPSCALE
from .reader import Reader
from .setup import Card, Setup
from .workflow_file import api_graph, parsed

LARGEST_ANSWER = 4_000_000
"""Characters of JSON; a sampler of 50 steps takes about a thousand."""
SETTINGS = ("steps", "cfg", "shift", "sampler", "schedule")
"""A sampler's widgets that a recipe fills."""
CHOSEN = "sd35_recipe"
"""The property of a sampler on the canvas that keeps its recipe."""


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """A recipe as widgets: those of the node that samples, and those of Skip Layer Guidance."""
    values = {name: getattr(recipe, name) for name in SETTINGS}
    skip, enlarging = recipe.skip_layers, recipe.enlarging
    widgets = {"scale": 0.0} if skip is None else skip_values(skip)
    return {
        "name": recipe.name,
        "node": UPSCALE if enlarging else SAMPLER,
        "sampler": {**values, **(asdict(enlarging) if enlarging else {})},
        "skip": widgets,
    }


def skip_values(skip: SkipLayers) -> dict[str, Any]:
    window = {"scale": skip.scale, "start": skip.start, "end": skip.end}
    return {"layers": layers_text(skip.layers), **window}


def answer(
    body: bytes, find_file: FindFile, seconds: float = math.inf, card: Card | None = None
) -> str:
    """A workflow in JSON -> JSON: node id -> what to draw on it.

    Raises SettingError for no workflow, and for one that takes more than so many seconds.
    """
    budget = Budget(seconds)
    graph = api_graph(parsed(body), budget)
    reader = Reader(graph, find_file, budget, card)
    found, length = [], 0
    for key, node in graph.items():
        budget.spend()
        if node["class_type"] not in PANELS:
            continue
        kind, panel = PANELS[node["class_type"]]
        drawn = {"kind": kind, **panel(reader, key)}
        budget.spend()
        found.append(f"{json.dumps(key)}: {json.dumps(drawn, allow_nan=False)}")
        length += len(found[-1])
        if length > LARGEST_ANSWER:
            raise TooLargeError(
                "The workflow is too large to check: its samplers have too many steps in all. It "
                "can be queued all the same."
            )
    return f"{{{', '.join(found)}}}"


def sampler_panel(reader: Reader, key: str) -> dict[str, Any]:
    """The curve with its windows, the recipe and what differs from it, and what to say."""
    setup = reader.setup(key)
    chain = list(reader.chain(key, "model", "model1"))
    skips = [k for k in chain if reader.kind(k) == SKIP]
    likely, chosen = likely_recipe(setup), reader.graph[key]["properties"].get(CHOSEN)
    own = isinstance(chosen, str) and chosen in RECIPES and fits_node(RECIPES[chosen], setup)
    recipe = _with_skips(chosen, setup) if own else likely
    found = findings(setup)
    return {
        "recipe": recipe,
        "model_recipe": likely,
        "loader": next((k for k in chain if reader.kind(k) == LOADER), None),
        "skip_nodes": skips,
        "changed": changed(reader, key, skips, recipe) if recipe else [],
        "sigmas": setup.sigmas or [],
        "bands": bands(setup),
        "findings": [[finding.severity, finding.text] for finding in found],
        "errors": errors(found),
    }


def likely_recipe(setup: Setup) -> str | None:
    """The recipe of what is connected: the model, and what steers it."""
    recipe = setup.model.recipe if setup.model else None
    kinds = [control.control_type for control in setup.controls]
    with_control = f"{recipe}_{kinds[0]}" if kinds else ""
    found = _with_skips(with_control if with_control in RECIPES else recipe, setup)
    if setup.upscaling is None:
        return found
    larger = f"{found}_{4 if (setup.upscaling.factor or 0) > 3 else 2}x"
    return larger if larger in RECIPES else None


def fits_node(recipe: Recipe, setup: Setup) -> bool:
    """Whether a recipe is for a node that enlarges, and the node does; or neither."""
    return (recipe.enlarging is None) == (setup.upscaling is None)


def _with_skips(recipe: str | None, setup: Setup) -> str | None:
    """A recipe, or where Skip Layer Guidance acts the same model's with it, if there is one."""
    with_skips = f"{recipe}_slg"
    acts = any(skip.scale for skip in setup.skips)
    return with_skips if acts and with_skips in RECIPES else recipe


def changed(reader: Reader, key: str, skips: list[str], recipe: str) -> list[list[Any]]:
    """[node, widget, value, the recipe's] of each widget that differs."""
    values = recipe_values(RECIPES[recipe])
    wanted = [(key, name, value) for name, value in values["sampler"].items()]
    wanted += [(node, name, value) for node in skips for name, value in values["skip"].items()]
    seen = [(node, name, reader.value(node, name), value) for node, name, value in wanted]
    return [list(entry) for entry in seen if entry[2] is not None and entry[2] != entry[3]]


def bands(setup: Setup) -> list[dict[str, Any]]:
    """For each guidance and ControlNet, the steps on which it acts."""
    found = []
    for skip in setup.skips:
        if skip.stock:
            continue
        try:
            layers = parse_layers(skip.layers)
        except SettingError:
            continue
        own = SkipLayers(layers, skip.scale, skip.start, skip.end)
        acting = own.acting(len(setup.sigmas or [0.0]) - 1)
        found.append({"kind": "skip", "name": "Skip Layer Guidance", "steps": acting})
    for control in setup.controls:
        if control.start is None or control.end is None:
            continue
        name = f"{control.control_type or ''} ControlNet".strip()
        found.append({"kind": "control", "name": name, "steps": setup.controlled(control)})
    return found


def skip_panel(reader: Reader, key: str) -> dict[str, Any]:
    """The layers of the model before the node and which of them the text means."""
    model = reader.model(list(reader.chain(key, "model", "model1")))
    depth = model.depth if model else None
    text = reader.value(key, "layers")
    panel = {"depth": depth, "layers": [], "error": None, "errors": 0}
    panel["presets"] = LAYER_PRESETS.get((model.recipe if model else None) or "", [])
    try:
        panel["layers"] = sorted(parse_layers(text if isinstance(text, str) else "", depth))
    except SettingError as error:
        panel |= {"error": str(error), "errors": 1}
        if text == layers_text(MEDIUM_LAYERS.layers) and depth is not None:
            panel["fitting"] = layers_within(depth, panel["presets"])
    return panel


def layers_within(depth: int, presets: list[list[str]]) -> str:
    """What a new node's layers become on a model that has not Medium's: those that are known for
    it, else as far in as Medium's are in its own."""
    if presets:
        return presets[0][1]
    whole = VARIANTS["sd3.5_medium"].depth
    return layers_text(frozenset(layer * depth // whole for layer in MEDIUM_LAYERS.layers))


def errors(found: list[Finding]) -> int:
    """How many of them are errors, for the badge on a node."""
    return sum(finding.severity == "error" for finding in found)


def check_panel(reader: Reader, key: str) -> dict[str, Any]:
    """What SD3.5 Check would find by the workflow alone."""
    found: dict[Finding, None] = {}
    for sampler in sorted(leading_to(reader.graph, key)):
        found.update(dict.fromkeys(findings(reader.setup(sampler))))
    return {"errors": errors(list(found))}


def loader_panel(reader: Reader, key: str) -> dict[str, Any]:
    """Which model is chosen, so that the page sees when it is another one."""
    return {"model": reader.value(key, "model")}


PANELS: dict[str, tuple[str, Callable[[Reader, str], dict[str, Any]]]] = {
    SAMPLER: ("sampler", sampler_panel),
    UPSCALE: ("sampler", sampler_panel),
    SKIP: ("layers", skip_panel),
    CHECK: ("check", check_panel),
    LOADER: ("loader", loader_panel),
    ALIAS: ("loader", loader_panel),
}
"""Class of a node -> the kind of its panel, and what is on it; the last three draw none."""
