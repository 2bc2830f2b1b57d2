"""What a ComfyUI workflow sets up, read from its JSON and the headers of its files.

    python -m sd35_core.workflow FILE.json [--models COMFYUI/models] [--strict]

prints what SD35Check would say, without running anything. Both formats are read: what the canvas
saves and what it exports for the API.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import SettingError
from .headers import control_in, matched_keys, model_in, model_named, vae_channels
from .preflight import (
    Control,
    Finding,
    Latent,
    Lora,
    Model,
    Prompt,
    Sampling,
    Setup,
    Skip,
    findings,
    report,
)

Graph = dict[str, dict[str, Any]]
"""A prompt in the API's format: node id -> class_type and inputs."""
Link = tuple[str, int]
Find = Callable[[str, str], "Path | None"]
"""(folder, name) -> the file that a widget names."""

IDLE = {
    "FreeU": "FreeU",
    "FreeU_V2": "FreeU V2",
    "HyperTile": "HyperTile",
    "TomePatchModel": "Tome Patch Model",
    "PatchModelAddDownscale": "Kohya Deep Shrink (PatchModelAddDownscale)",
    "HypernetworkLoader": "Hypernetwork Loader",
    "DeepCacheModel": "DeepCache",
}
"""Nodes whose hooks only U-Nets have."""
IDLE_ON_STOCK = {
    "EasyCache": "EasyCache",
    "PerturbedAttention": "Perturbed-Attention Guidance",
    "PerturbedAttentionGuidance": "Perturbed-Attention Guidance",
    "NAGuidance": "Normalized Attention Guidance",
}
"""Nodes that act on a model from SD3.5 Loader, not on one from ComfyUI's own loaders."""
CACHES = {
    "SD35StepCache": "SD3.5 Step Cache",
    "EasyCache": "EasyCache",
    "LazyCache": "LazyCache",
    "ApplyFBCacheOnModel": "First Block Cache",
}
OTHER_PREDICTIONS = {
    "ModelSamplingDiscrete",
    "ModelSamplingContinuousEDM",
    "ModelSamplingContinuousV",
    "ModelSamplingStableCascade",
    "ModelSamplingFlux",
}
SHIFTS = {"ModelSamplingSD3", "ModelSamplingAuraFlow"}
OWN_NODES = {
    "SkipLayerGuidance": "Skip Layer Guidance (SD3.5)",
    "SD35StepCache": "SD3.5 Step Cache",
    "SD35SkipLayerSweep": "SD3.5 Skip Layer Sweep",
}
LOADERS = {
    "SD35Loader": ("model", ("checkpoints", "diffusion_models")),
    "CheckpointLoaderSimple": ("ckpt_name", ("checkpoints",)),
    "UNETLoader": ("unet_name", ("diffusion_models",)),
    "UnetLoaderGGUF": ("unet_name", ("diffusion_models",)),
}
"""Class -> the widget that names the model, and where the file is."""
SAMPLERS = {"SD35Sampler", "SD35SkipLayerSweep", "KSampler", "KSamplerAdvanced", "SamplerCustom",
            "SamplerCustomAdvanced"}  # fmt: skip
CHECK_OUTPUTS = ("model", "positive", "negative", "latent")
"""Inputs of SD35Check that come out again, in this order."""
EMPTY_LATENTS = {"EmptySD3LatentImage": 16, "EmptyLatentImage": 4}
NO_FILE = {"none", "from model file"}
LARGEST_NUMBER = 2.0**63


def setups(graph: Graph, find: Find) -> dict[str, Setup]:
    """Sampler's node id -> what leads into it."""
    reader = Reader(graph, find)
    return {key: reader.setup(key) for key, node in graph.items() if node["class_type"] in SAMPLERS}


def leading_to(graph: Graph, key: str | None) -> set[str]:
    """The samplers that a node stands before; without any, those with the same model.

    A second sampler after the first is not counted.
    """
    reader = Reader(graph, lambda folder, name: None)
    samplers = [k for k, node in graph.items() if node["class_type"] in SAMPLERS]
    if key not in graph:
        return set()
    found = {sampler for sampler in samplers if key in _upwards(graph, sampler)}
    source = reader.link(key, "model")
    return found or {s for s in samplers if source and reader.link(s, "model") == source}


def _upwards(graph: Graph, sampler: str) -> set[str]:
    """Everything that leads to a sampler without another one between."""
    seen: set[str] = set()
    waiting = [sampler]
    while waiting:
        for value in graph[waiting.pop()]["inputs"].values():
            source = str(value[0]) if isinstance(value, list) and len(value) == 2 else ""
            if source in graph and source not in seen:
                seen.add(source)
                if graph[source]["class_type"] not in SAMPLERS:
                    waiting.append(source)
    return seen


class Reader:
    """Walks up the links of a workflow; `find` finds the files that its widgets name."""

    def __init__(self, graph: Graph, find: Find):
        self.graph, self.find = graph, find

    def kind(self, key: str) -> str:
        return self.graph[key]["class_type"] if key in self.graph else ""

    def link(self, key: str, name: str) -> Link | None:
        """What is connected to an input, through nodes that only pass it on."""
        seen = set()
        value = self.graph[key]["inputs"].get(name)
        while isinstance(value, list) and len(value) == 2 and str(value[0]) in self.graph:
            source, slot = str(value[0]), value[1]
            if not isinstance(slot, int):
                return None
            if self.kind(source) == "SD35Check" and slot < len(CHECK_OUTPUTS):
                passed = CHECK_OUTPUTS[slot]
            elif self.kind(source) in ("Reroute", "ReroutePrimitive"):
                passed = next(iter(self.graph[source]["inputs"]), "")
            else:
                return source, slot
            if (source, slot) in seen:
                return None
            seen.add((source, slot))
            value = self.graph[source]["inputs"].get(passed)
        return None

    def value(self, key: str, *names: str) -> Any:
        """The widget's value; through a link, that of a node with a single `value`."""
        for name in names:
            value = self.graph[key]["inputs"].get(name)
            if isinstance(value, list):
                link = self.link(key, name)
                value = self.graph[link[0]]["inputs"].get("value") if link else None
            if value is not None and not isinstance(value, list):
                return value
        return None

    def number(self, key: str, *names: str) -> float | None:
        """A widget's number; None for what no widget can hold."""
        value = self.value(key, *names)
        usable = isinstance(value, (int, float)) and abs(value) <= LARGEST_NUMBER
        return float(value) if usable else None

    def whole(self, key: str, name: str) -> int | None:
        number = self.number(key, name)
        return None if number is None else int(number)

    def chain(self, key: str, *names: str) -> Iterator[str]:
        """Nodes upwards along the first of the named inputs that is connected."""
        seen: set[str] = set()
        while key not in seen:
            seen.add(key)
            link = next((found for name in names if (found := self.link(key, name))), None)
            if link is None:
                return
            key = link[0]
            yield key

    def setup(self, sampler: str) -> Setup:
        """What leads into one sampler."""
        guider = self.link(sampler, "guider")
        source = guider[0] if guider else sampler
        chain = list(self.chain(source, "model", "model1"))
        model = self.model(chain)
        sampling = self.sampling(sampler, source, chain)
        wanted = self.link(source, "positive") or self.link(source, "conditioning")
        unwanted = self.link(source, "negative")
        positive, controlled = self.prompt(wanted)
        negative, also_controlled = self.prompt(unwanted)
        kinds = [self.kind(key) for key in chain]
        idle = {**IDLE, **({} if model is None or model.own else IDLE_ON_STOCK)}
        return Setup(
            model=model,
            positive=positive,
            negative=negative,
            same_prompts=wanted == unwanted is not None,
            sampling=sampling,
            skips=tuple(self.skips(chain)),
            controls=tuple(
                replace(self.control(key), on_both=key in also_controlled or negative is None)
                for key in controlled
            ),
            latent=self.latent(self.link(sampler, "latent") or self.link(sampler, "latent_image")),
            loras=tuple(self.loras(chain, model)),
            vae_channels=self.vae(sampler),
            idle=tuple(idle[kind] for kind in kinds if kind in idle),
            caches=tuple(CACHES[kind] for kind in kinds if kind in CACHES),
            shift_nodes=tuple(kind for kind in kinds if kind in SHIFTS),
            own_nodes=tuple(
                OWN_NODES[kind] for kind in [self.kind(sampler), *kinds] if kind in OWN_NODES
            ),
        )

    def file(self, folders: tuple[str, ...], name: Any) -> Path | None:
        if not isinstance(name, str) or name in NO_FILE:
            return None
        return next((path for folder in folders if (path := self.find(folder, name))), None)

    def model(self, chain: list[str]) -> Model | None:
        """Facts of the file at the chain's end; of its name alone where it is not there."""
        if not chain or self.kind(chain[-1]) not in LOADERS:
            return None
        loader = self.kind(chain[-1])
        widget, folders = LOADERS[loader]
        name = self.value(chain[-1], widget)
        if not isinstance(name, str):
            return None
        path = self.file(folders, name)
        facts = model_in(path) if path else model_named(name)
        flow = not any(self.kind(key) in OTHER_PREDICTIONS for key in chain)
        return replace(facts, flow=flow, own=loader == "SD35Loader") if facts else None

    def sampling(self, sampler: str, source: str, chain: list[str]) -> Sampling:
        """The widgets of whichever nodes make the steps."""
        own = self.kind(sampler) in ("SD35Sampler", "SD35SkipLayerSweep")
        sigmas = self.link(sampler, "sigmas")
        steps = sigmas[0] if sigmas else sampler
        chosen = self.link(sampler, "sampler")
        shift = self.number(steps, "shift")
        if shift is None:
            shift = self.shift_before(chain)
        return Sampling(
            steps=self.whole(steps, "steps"),
            cfg=self.number(source, "cfg"),
            shift=shift,
            sampler=self.value(chosen[0] if chosen else sampler, "sampler", "sampler_name"),
            schedule=self.value(steps, "schedule", "scheduler"),
            denoise=self.number(steps, "denoise"),
            own=own,
        )

    def shift_before(self, chain: list[str]) -> float:
        """What the last node that sets a shift left; a loader's own is 3."""
        for key in chain:
            if self.kind(key) in SHIFTS:
                return self.number(key, "shift") or 3.0
        return 3.0

    def skips(self, chain: list[str]) -> Iterator[Skip]:
        for place, key in enumerate(chain):
            kind = self.kind(key)
            stock = kind in ("SkipLayerGuidanceDiT", "SkipLayerGuidanceSD3")
            if kind != "SkipLayerGuidance" and not stock:
                continue
            layers = self.value(key, "layers", "double_layers")
            numbers = [
                self.number(key, *names)
                for names in (("scale",), ("start", "start_percent"), ("end", "end_percent"))
            ]
            if not isinstance(layers, str) or None in numbers:
                continue
            scale, start, end = (number or 0.0 for number in numbers)
            frozen = self.shift_before(chain[place + 1 :])
            yield Skip(layers, scale, start, end, stock=stock, frozen_shift=frozen)

    def prompt(self, link: Link | None) -> tuple[Prompt | None, list[str]]:
        """A prompt's text and the nodes that put a ControlNet on it."""
        controlled: list[str] = []
        zero, seen = False, set()
        while link is not None and link not in seen:
            seen.add(link)
            key, slot = link
            inputs = self.graph[key]["inputs"]
            if "control_net" in inputs:
                controlled.append(key)
            zero = zero or self.kind(key) == "ConditioningZeroOut"
            text = self.value(key, "text", "t5xxl")
            if isinstance(text, str):
                prompt = Prompt(text=text, tokens=about_tokens(text), pooled_is_zero=zero)
                return prompt, controlled
            side = "negative" if slot == 1 and "negative" in inputs else "positive"
            names = (side, "conditioning", "conditioning_1", "conditioning_to")
            link = next((found for name in names if (found := self.link(key, name))), None)
        return (Prompt(pooled_is_zero=zero) if seen else None), controlled

    def control(self, key: str) -> Control:
        """A node that applies a ControlNet."""
        loader = self.link(key, "control_net")
        name = self.value(loader[0], "control_net", "control_net_name") if loader else None
        path = self.file(("controlnet",), name)
        facts = control_in(path) if path else Control()
        return replace(
            facts,
            strength=self.number(key, "strength"),
            start=self.number(key, "start", "start_percent"),
            end=self.number(key, "end", "end_percent"),
            vae=self.vae_of(key) != 0,
        )

    def latent(self, link: Link | None, seen: frozenset[Link] = frozenset()) -> Latent | None:
        """Where the latent comes from; None where that can't be told."""
        if link is None or link in seen:
            return None
        key, kind = link[0], self.kind(link[0])
        width, height = (self.whole(key, side) for side in ("width", "height"))
        if kind in EMPTY_LATENTS:
            batch = self.whole(key, "batch_size") or 1
            return Latent(width, height, batch, EMPTY_LATENTS[kind], empty=True)
        if kind in ("VAEEncode", "VAEEncodeTiled"):
            return Latent(empty=False)
        if kind in ("VAEEncodeForInpaint", "InpaintModelConditioning"):
            return Latent(empty=False, masked=True)
        names = ("samples", "latent", "latent_image")
        before = next((found for name in names if (found := self.link(key, name))), None)
        found = self.latent(before, seen | {link})
        if found is None:
            return Latent(empty=False) if kind in SAMPLERS else None
        if kind == "SetLatentNoiseMask":
            return replace(found, masked=True)
        if kind in SAMPLERS:
            return replace(found, empty=False, channels=16)
        if kind == "LatentUpscale":
            return replace(found, width=width, height=height)
        return replace(found, width=None, height=None, batch=None, empty=None)

    def loras(self, chain: list[str], model: Model | None) -> Iterator[Lora]:
        for key in chain:
            name = self.value(key, "lora_name")
            if not isinstance(name, str):
                continue
            path = self.file(("loras",), name)
            strength = self.number(key, "strength_model")
            keys, matched = matched_keys(path, model) if path and model else (None, None)
            yield Lora(name, strength, keys, matched)

    def vae(self, sampler: str) -> int | None:
        """The channels of the VAE that decodes what a sampler gives."""
        if "vae" in self.graph[sampler]["inputs"]:
            return self.vae_of(sampler)
        for key, node in self.graph.items():
            if node["class_type"].startswith("VAEDecode"):
                samples = self.link(key, "samples")
                if samples and samples[0] == sampler:
                    return self.vae_of(key)
        return None

    def vae_of(self, key: str) -> int | None:
        """0 for none at all, None where it can't be told."""
        link = self.link(key, "vae")
        if link is None:
            return 0
        if self.kind(link[0]) == "SD35Loader" and self.value(link[0], "vae") == "none":
            return 0
        name = self.value(link[0], "vae", "vae_name")
        path = self.file(("vae",), name)
        return vae_channels(path) if path else None


def about_tokens(text: str) -> int:
    """How many tokens T5 makes of a text, about: a piece is six letters at most."""
    pieces = re.findall(r"\w+|[^\w\s]", text)
    return 1 + sum(-(-len(piece) // 6) for piece in pieces)


def api_graph(workflow: dict[str, Any]) -> Graph:
    """The API's form of a workflow in either format.

    Raises SettingError for something else, and for a canvas file that does not name its widgets.
    """
    if "nodes" in workflow and "links" in workflow:
        try:
            return _from_canvas(workflow)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SettingError(
                f"The workflow's nodes or links are damaged ({error!r}). Open it in ComfyUI and "
                "save it again."
            ) from error
    graph = workflow.get("prompt", workflow)
    if (
        not isinstance(graph, dict)
        or not graph
        or not all(
            isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs"), dict)
            for node in graph.values()
        )
    ):
        raise SettingError(
            "This is no ComfyUI workflow: neither the canvas' format (nodes, links) nor the API's "
            "(class_type, inputs). Save one in ComfyUI with Workflow > Save or > Export (API)."
        )
    return graph


SEED_MODES = {"fixed", "increment", "decrement", "randomize"}
MUTED, BYPASSED = 2, 4


def _from_canvas(workflow: dict[str, Any]) -> Graph:
    if workflow.get("definitions", {}).get("subgraphs"):
        raise SettingError(
            "The workflow has subgraphs, which can't be read in this format. Export it with "
            "Workflow > Export (API) and check that file."
        )
    links = {link[0]: link for link in workflow["links"] if isinstance(link, list)}
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    graph: Graph = {}
    for key, node in nodes.items():
        if node.get("mode") in (MUTED, BYPASSED):
            continue
        inputs: dict[str, Any] = {}
        values = node.get("widgets_values") or []
        if isinstance(values, dict):
            inputs.update(values)
            values = []
        rest = iter(values)
        for slot in node.get("inputs", ()):
            name = slot["name"]
            if "widget" in slot:
                value = next(rest, None)
                if isinstance(value, str) and value in SEED_MODES:
                    value = next(rest, None)
                inputs[name] = value
            if slot.get("link") is not None:
                source = _source(links, nodes, slot["link"])
                if source is not None:
                    inputs[name] = list(source)
        named = any("widget" in slot for slot in node.get("inputs", ()))
        if values and not named and node["type"] in SAMPLERS | LOADERS.keys():
            raise SettingError(
                f"The workflow's {node['type']} does not name its widgets: it was saved by an "
                "old ComfyUI. Open it in a newer one and save it again."
            )
        graph[key] = {"class_type": str(node["type"]), "inputs": inputs}
    return graph


def _source(links: dict[Any, Any], nodes: dict[str, Any], number: Any) -> Link | None:
    """Where a link comes from, through bypassed nodes."""
    for _ in range(len(nodes) + 1):
        link = links.get(number)
        if link is None or str(link[1]) not in nodes:
            return None
        node, slot, kind = nodes[str(link[1])], link[2], link[5]
        if node.get("mode") == MUTED:
            return None
        if node.get("mode") != BYPASSED:
            return str(link[1]), slot
        passed = [i for i in node.get("inputs", ()) if i.get("type") == kind]
        passed = [i.get("link") for i in passed if i.get("link") is not None]
        if not passed:
            return None
        number = passed[min(slot, len(passed) - 1)]
    return None


def files_under(folder: Path | None) -> Find:
    """Files by name in a `models` folder, and those that come with the pack."""
    own = Path(__file__).resolve().parent.parent / "models"

    def find(kind: str, name: str) -> Path | None:
        plain = name.replace("\\", "/").removeprefix(f"{kind}/")
        if folder is not None:
            with suppress(OSError, ValueError):  # a name that the system can't have
                root = (folder / kind).resolve()
                path = (root / plain).resolve()
                if path.is_relative_to(root) and path.is_file():
                    return path
        return next((path for path in own.rglob("*.safetensors") if path.name == plain), None)

    return find


def check(workflow: dict[str, Any], find: Find) -> dict[str, list[Finding]]:
    """Sampler's node id -> what there is to say. Raises SettingError for no workflow."""
    return {key: findings(setup) for key, setup in setups(api_graph(workflow), find).items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sd35_core.workflow", description="Check a workflow without running it."
    )
    parser.add_argument("file", type=Path, help="as the canvas saves it, or exported for the API")
    parser.add_argument("--models", type=Path, help="ComfyUI's models folder")
    parser.add_argument("--strict", action="store_true", help="warnings fail too")
    options = parser.parse_args(arguments)
    try:
        workflow = json.loads(options.file.read_text(encoding="utf-8"))
        found = check(workflow if isinstance(workflow, dict) else {}, files_under(options.models))
    except (OSError, ValueError, RecursionError, SettingError) as error:
        sys.stderr.write(f"{options.file}: {error}\n")
        return 2
    if not found:
        sys.stdout.write("There is no sampler in this workflow.\n")
    for key, said in found.items():
        sys.stdout.write(f"Sampler {key}:\n{report(said)}\n")
    worst = {finding.severity for said in found.values() for finding in said}
    return int("error" in worst or (options.strict and "warning" in worst))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
