"""What a ComfyUI workflow sets up, read from its graph and the headers of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ..sampling.schedules import DEFAULT_SHIFT
from .graph import Budget, Graph, Link, TooLargeError
from .headers import control_in, model_in, model_named
from .holdings import FindFile, Holdings
from .known_nodes import (
    CACHES,
    CHECKPOINT_LOADER,
    FAILING,
    IDLE,
    IDLE_ON_PROMPTS,
    IDLE_ON_STOCK,
    LOADERS,
    OTHER_PREDICTIONS,
    SAMPLER_NODES,
    SHIFTS,
    SKIPS_OF_THE_HOST,
    STOCK_CONTROLNET_LOADERS,
    TEXT_LOADERS,
    is_theirs,
)
from .lora_files import lora_in
from .own_nodes import (
    FROM_MODEL,
    LOADER,
    NAMES,
    NEED_OUR_MODEL,
    NONE,
    SAMPLER,
    SKIP,
    SWEEP,
    UPSCALE,
)
from .setup import (
    Card,
    Control,
    Encoders,
    Lora,
    LoraFile,
    Model,
    Prompt,
    Sampling,
    Setup,
    Skip,
)

MOST = 100
"""Nodes of one kind before a sampler."""


def setups(
    graph: Graph, find_file: FindFile, budget: Budget | None = None, card: Card | None = None
) -> dict[str, Setup]:
    """Sampler's node id -> what leads into it."""
    reader = Reader(graph, find_file, budget, card)
    return {
        key: reader.setup(key) for key, node in graph.items() if node["class_type"] in SAMPLER_NODES
    }


class Reader(Holdings):
    """Reads what leads into a sampler; `card` is what there is to sample on, where it is known."""

    def __init__(
        self,
        graph: Graph,
        find_file: FindFile,
        budget: Budget | None = None,
        card: Card | None = None,
    ):
        super().__init__(graph, find_file, budget)
        self.card = card

    def setup(self, sampler: str) -> Setup:
        """What leads into one sampler."""
        guider = self.link(sampler, "guider")
        source = guider[0] if guider else sampler
        chain = list(self.chain(source, "model", "model1"))
        model = self.model(chain)
        sampling = self.sampling(sampler, source, chain)
        wanted = self.link(source, "positive") or self.link(source, "conditioning")
        unwanted = self.link(source, "negative")
        positive, way = self.prompt(wanted)
        negative, other_way = self.prompt(unwanted)
        controlled, also_controlled = (
            [key for key in keys if "control_net" in self.graph[key]["inputs"]]
            for keys in (way, other_way)
        )
        if self.kind(sampler) == UPSCALE and self.link(sampler, "control_net"):
            controlled, also_controlled = [*controlled, sampler], [*also_controlled, sampler]
        kinds = [self.kind(key) for key in chain]
        idle = {**IDLE, **({} if model is None or model.own else IDLE_ON_STOCK)}
        return Setup(
            model=model,
            positive=positive,
            negative=negative,
            same_prompts=wanted == unwanted is not None,
            sampling=sampling,
            skips=few("Skip Layer Guidances", self.skips(chain))[::-1],
            controls=tuple(
                replace(self.control(key), on_both=key in also_controlled or negative is None)
                for key in few("ControlNets", controlled)
            ),
            latent=self.sampled(sampler),
            upscaling=self.upscaling(sampler),
            loras=few("LoRAs", self.loras(chain, model)),
            vae_channels=self.vae(sampler),
            vae_name=self.vae_name(sampler),
            vae=self.vae_held(sampler),
            card=self.card,
            encoders=self.encoders(way),
            idle=(
                *(idle[kind] for kind in kinds if kind in idle),
                *(IDLE_ON_PROMPTS[k] for k in map(self.kind, way) if k in IDLE_ON_PROMPTS),
            ),
            failing=tuple(FAILING[kind] for kind in kinds if kind in FAILING),
            caches=tuple(CACHES[kind] for kind in kinds if kind in CACHES),
            shift_nodes=tuple(kind for kind in kinds if kind in SHIFTS),
            own_nodes=tuple(
                NAMES[kind] for kind in [self.kind(sampler), *kinds] if kind in NEED_OUR_MODEL
            ),
        )

    def model(self, chain: list[str]) -> Model | None:
        """Facts of the file at the chain's end; of its name alone where it is not there."""
        if not chain or self.kind(chain[-1]) not in LOADERS:
            return None
        loader = self.kind(chain[-1])
        widget, folders = LOADERS[loader]
        theirs = loader == LOADER and is_theirs(self.graph[chain[-1]]["inputs"])
        name = self.value(chain[-1], "model_name" if theirs else widget)
        if not isinstance(name, str):
            return None
        path = self.file(folders, name)
        facts = model_in(path) if path else model_named(name)
        flow = not any(self.kind(key) in OTHER_PREDICTIONS for key in chain)
        if facts is None:
            return None
        own = loader == LOADER and not theirs
        facts = replace(facts, flow=flow, own=own, of_res4lyf=theirs)
        return replace(
            facts,
            weights=self.as_loaded(chain[-1], facts),
            modulation_cache=(self.text(chain[-1], "modulation_cache") or "auto") if own else "off",
        )

    def sampling(self, sampler: str, source: str, chain: list[str]) -> Sampling:
        """The widgets of whichever nodes make the steps."""
        own = self.kind(sampler) in (SAMPLER, SWEEP, UPSCALE)
        sigmas = self.link(sampler, "sigmas")
        steps = sigmas[0] if sigmas else sampler
        chosen = self.link(sampler, "sampler")
        shift = self.number(steps, "shift")
        if shift is None:
            shift = self.shift_before(chain)
        cfg = self.number(source, "cfg", "cfg_conds")
        if self.kind(source) == "BasicGuider":
            cfg = 1.0
        elif self.value(sampler, "sampler_mode") in ("unsample", "resample"):
            cfg = None  # RES4LYF's ways back to noise, which go without guidance
        return Sampling(
            steps=self.whole(steps, "steps"),
            cfg=cfg,
            shift=shift,
            sampler=self.text(chosen[0] if chosen else sampler, "sampler", "sampler_name"),
            schedule=self.text(steps, "schedule", "scheduler"),
            denoise=self.number(steps, "denoise"),
            own=own,
        )

    def shift_before(self, chain: list[str]) -> float:
        """What the last node that sets a shift left, else the loader's own."""
        for key in chain:
            if self.kind(key) in SHIFTS:
                return self.number(key, "shift") or DEFAULT_SHIFT
        return DEFAULT_SHIFT

    def skips(self, chain: list[str]) -> Iterator[Skip]:
        """From the loader on; `frozen` is the shift that a node finds before it."""
        frozen = DEFAULT_SHIFT
        for key in reversed(chain):
            kind = self.kind(key)
            if kind in SHIFTS:
                frozen = self.number(key, "shift") or DEFAULT_SHIFT
            stock = kind in SKIPS_OF_THE_HOST
            if kind != SKIP and not stock:
                continue
            layers = self.text(key, "layers", "double_layers")
            numbers = [
                self.number(key, *names)
                for names in (("scale",), ("start", "start_percent"), ("end", "end_percent"))
            ]
            if kind == "SkipLayerGuidanceDiTSimple":  # the prompt without it is its negative
                numbers[0] = 1.0
            if layers is None or None in numbers:
                continue
            scale, start, end = (number or 0.0 for number in numbers)
            yield Skip(layers, scale, start, end, stock=stock, frozen_shift=frozen)

    def prompt(self, link: Link | None) -> tuple[Prompt | None, list[str]]:
        """A prompt's text and the nodes on its way, from the sampler up."""
        way: list[str] = []
        zero, seen = False, set()
        while link is not None and link not in seen:
            self.budget.spend()
            seen.add(link)
            key, slot = link
            inputs = self.graph[key]["inputs"]
            way.append(key)
            zero = zero or self.kind(key) == "ConditioningZeroOut"
            text = self.value(key, "text", "t5xxl")
            if isinstance(text, str):
                prompt = Prompt(text=text, tokens=about_tokens(text), pooled_is_zero=zero)
                return prompt, way
            side = "negative" if slot == 1 and "negative" in inputs else "positive"
            names = (side, "conditioning", "conditioning_1", "conditioning_to")
            link = next((found for name in names if (found := self.link(key, name))), None)
        return (Prompt(pooled_is_zero=zero) if seen else None), way

    def encoders(self, way: list[str]) -> Encoders | None:
        """The text encoders of the prompt at the way's end."""
        known = (*TEXT_LOADERS, CHECKPOINT_LOADER)
        loader = next(
            (key for key in self.chain(way[-1], "clip") if self.kind(key) in known), None
        ) if way else None  # fmt: skip
        if loader is None:
            return None
        kind = self.kind(loader)
        if kind == CHECKPOINT_LOADER:
            return self.weighed(Encoders(), loader)
        names = [self.value(loader, widget) for widget in TEXT_LOADERS[kind]]
        files = [name for name in names if isinstance(name, str) and name != NONE]
        made_for = self.value(loader, "type")
        if kind == "TripleCLIPLoader" or not isinstance(made_for, str):
            made_for = "sd3"
        t5 = sum("t5" in name.lower() for name in files)
        if FROM_MODEL in files or any(not isinstance(name, str) for name in names):
            return self.weighed(Encoders(made_for), loader)
        return self.weighed(Encoders(made_for, t5=bool(t5), others=len(files) > t5), loader)

    def control(self, key: str) -> Control:
        """A node that applies a ControlNet."""
        loader = self.link(key, "control_net")
        name = self.value(loader[0], "control_net", "control_net_name") if loader else None
        path = self.file(("controlnet",), name)
        facts = control_in(path) if path else Control()
        stock = loader is not None and self.kind(loader[0]) in STOCK_CONTROLNET_LOADERS
        return replace(
            facts,
            by_stock_loader=stock,
            of_the_sampler=self.kind(key) == UPSCALE,
            strength=self.number(key, "strength"),
            start=0.0 if self.kind(key) == UPSCALE else self.number(key, "start", "start_percent"),
            end=self.number(key, "end", "end_percent"),
            vae=self.vae_of(key) != 0,
        )

    def loras(self, chain: list[str], model: Model | None) -> Iterator[Lora]:
        for key in chain:
            name = self.value(key, "lora_name")
            if not isinstance(name, str):
                continue
            path = self.file(("loras",), name)
            strength = self.number(key, "strength_model")
            yield Lora(name, strength, lora_in(path, model) if path else LoraFile())


def few(what: str, found: Iterable[Any]) -> tuple[Any, ...]:
    """All of them. Raises TooLargeError when one sampler has more than MOST."""
    first = tuple(islice(found, MOST + 1))
    if len(first) > MOST:
        raise TooLargeError(
            f"The workflow is too large to check: a sampler has more than {MOST} {what}. It can be "
            "queued all the same."
        )
    return first


def about_tokens(text: str) -> int:
    """How many tokens T5 makes of a text, about: a piece is six letters at most."""
    pieces = re.findall(r"\w+|[^\w\s]", text)
    return 1 + sum(-(-len(piece) // 6) for piece in pieces)
