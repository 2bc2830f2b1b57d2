"""Which of ComfyUI's own nodes of an SD3.5 workflow become which of this pack's, and which stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property

from ..checkpoint.tensor_file import SAFETENSORS
from ..sampling.guidance import SkipLayers, shares_around
from ..sampling.recipes import layers_text
from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import DEFAULT_SHIFT, SCHEDULES, acting_steps
from ..words import printable
from .beside import encoders_beside, vae_beside
from .graph import Link
from .headers import control_in, control_named
from .known_nodes import (
    KEEPING_THE_MODEL,
    LOADERS,
    SAMPLER_NODES,
    SHIFTS,
    TEXT_LOADERS,
    USING_THE_MODEL,
    is_theirs,
)
from .own_nodes import ENCODERS, FROM_MODEL, LOADER, NAMES, NONE, SAMPLER, SKIP
from .reader import Reader
from .rewriting import Passed, Swap
from .setup import SD3, Setup
from .shapes import CONTROL_APPLY, CONTROL_LOADER

MOST_STEPS, LEAST_DENOISE = 1000, 0.01
"""What this pack's sampler takes; KSampler goes further."""
AS_COMFYUI = {"reference": "ComfyUI"}
"""Set on a ControlNet, so that it draws what ComfyUI's own loader does."""
SAMPLER_NAMES = {
    "sampler_name": "sampler", "scheduler": "schedule", "latent_image": "latent",
    **{n: n for n in ("model", "positive", "negative", "seed", "steps", "cfg", "denoise")},
}  # fmt: skip
APPLY_NAMES = {
    "start_percent": "start", "end_percent": "end",
    **{n: n for n in ("positive", "negative", "control_net", "vae", "image", "strength")},
}  # fmt: skip
LOADER_NAMES = {
    "CheckpointLoaderSimple": {"ckpt_name": "model"},
    "UNETLoader": {"unet_name": "model", "weight_dtype": "weight_dtype"},
}
CLIP_LOADERS = TEXT_LOADERS.keys() - {LOADER}
SKIP_LAYERS = {"SkipLayerGuidanceSD3": "layers", "SkipLayerGuidanceDiT": "double_layers"}
"""ComfyUI's own guidance -> its widget with the layers of two streams, which are all of SD3's."""


class Planner:
    """Decides for every node. `changes` has what becomes of those that go; `replaced` and `left` a
    line each for the person.

    fixed: nodes that stay, and why. linked: whether a widget's value comes from elsewhere; seen:
    whether all that a node leads to is in the graph. Raises TooLargeError as the reader does.
    """

    def __init__(
        self,
        reader: Reader,
        fixed: Mapping[str, str],
        linked: Callable[[str, str], bool] | None = None,
        seen: Callable[[str], bool] = lambda key: True,
    ):
        self.reader, self.graph, self.fixed, self.seen = reader, reader.graph, fixed, seen
        self.linked = linked or (lambda key, name: reader.link(key, name) is not None)
        self._setup = cache(reader.setup)
        self.changes: dict[str, Swap | Passed] = {}
        self.replaced: list[str] = []
        self.left: list[str] = []
        for kinds, decide in (
            (LOADER_NAMES, self._loader),
            ({"ControlNetLoader"}, self._control_loader),
            ({"KSampler"}, self._sampler),
            ({"ControlNetApplySD3", "ControlNetApplyAdvanced"}, self._apply),
            (SKIP_LAYERS, self._skip),
            ({"SkipLayerGuidanceDiTSimple", *OTHER_SAMPLERS}, self._other),
        ):
            for key in self._of(*kinds):
                self._decide(key, decide)
        self._pass_shifts()

    def _of(self, *kinds: str) -> Iterator[str]:
        for kind in kinds:
            yield from self._by_kind.get(kind, ())

    @cached_property
    def _by_kind(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, node in self.graph.items():
            found.setdefault(node["class_type"], []).append(key)
        return found

    @cached_property
    def _followers(self) -> dict[Link, list[str]]:
        found: dict[Link, list[str]] = {}
        for key, node in self.graph.items():
            self.reader.budget.spend()
            for value in node["inputs"].values():
                if isinstance(value, list):
                    found.setdefault((value[0], value[1]), []).append(key)
        return found

    def _decide(self, key: str, decide: Callable[[str], Swap | str | None]) -> None:
        """None: the node has nothing to do with SD3.5."""
        self.reader.budget.spend()
        found = decide(key)
        if isinstance(found, Swap) and key in self.fixed:
            found = self.fixed[key]
        if isinstance(found, str):
            self.left.append(printable(f"{self._named(key)} stays: {found}."))
        elif found is not None:
            self.changes[key] = found
            shift = found.values.get("shift")
            more = "" if shift is None else f", with shift {shift:g}"
            self.replaced.append(f"{self._named(key)} is {NAMES[found.kind]} now{more}.")

    def _named(self, key: str) -> str:
        return printable(f"{self.graph[key]['class_type']} ({key})")

    def _loader(self, key: str) -> Swap | str | None:
        kind = self.graph[key]["class_type"]
        names = LOADER_NAMES[kind]
        model = self.reader.model([key])
        if model is None:
            return "whether its file is an SD3.5 model is not known"
        if model.kind != SD3:
            return None
        name = self.reader.text(key, LOADERS[kind][0])
        if name is None or not name.lower().endswith(SAFETENSORS):
            return "SD3.5 Loader reads safetensors alone"
        foreign = self._foreign(key)
        if foreign is not None:
            return f"{self._named(foreign)} may do something else to the model of SD3.5 Loader"
        inside = kind == "CheckpointLoaderSimple"
        used = [inside and bool(self._followers.get((key, slot))) for slot in (1, 2)]
        values = dict.fromkeys(ENCODERS, FROM_MODEL if used[0] else NONE)
        values["vae"] = FROM_MODEL if used[1] else NONE
        if key not in self.fixed:
            values |= self._beside(key, used)
        return Swap(LOADER, names, values)

    def _foreign(self, key: str) -> str | None:
        """A node on the model's way that is not known to act alike on ours."""
        waiting, seen = [key], {key}
        while waiting:
            for follower in self._followers.get((waiting.pop(), 0), ()):
                self.reader.budget.spend()
                kind = self.reader.kind(follower)
                if kind in KEEPING_THE_MODEL and follower not in seen:
                    seen.add(follower)
                    waiting.append(follower)
                elif kind not in KEEPING_THE_MODEL and kind not in USING_THE_MODEL:
                    return follower
        return None

    def _beside(self, key: str, used: list[bool]) -> dict[str, str]:
        """The files of text encoders and a VAE that one SD3.5 Loader can load as well: where there
        is one loader of each kind in the same graph."""
        found: dict[str, str] = {}
        for place, kinds, read in (
            (1, CLIP_LOADERS, encoders_beside),
            (2, ("VAELoader",), vae_beside),
        ):
            others = [k for k in self._of(*kinds) if _graph(k) == _graph(key)]
            mains = [k for k in self._of(*LOADER_NAMES) if _graph(k) == _graph(key)]
            if used[place - 1] or len(others) != 1 or len(mains) != 1 or others[0] in self.fixed:
                continue
            files = None if self._set_outside(others[0]) else read(self.reader, others[0])
            if files is not None:
                found |= files
                self.changes[others[0]] = Passed(key, place)
                self.replaced.append(f"{self._named(others[0])} is in {NAMES[LOADER]} now.")
        return found

    def _set_outside(self, key: str) -> bool:
        """Whether any widget of a loader has its value from elsewhere."""
        return any(self.linked(key, name) for name in self.graph[key]["inputs"])

    def _control_loader(self, key: str) -> Swap | str | None:
        name = self.reader.text(key, "control_net_name") or ""
        path = self.reader.file(("controlnet",), name)
        facts = control_in(path) if path else control_named(name)
        if facts.foreign or not name.lower().endswith(SAFETENSORS):
            return None
        if facts.hidden is None:
            return "whether its file is a ControlNet for SD3.5 is not known"
        return Swap(CONTROL_LOADER, {"control_net_name": "control_net"}, AS_COMFYUI)

    def _apply(self, key: str) -> Swap | str | None:
        link = self.reader.link(key, "control_net")
        if link is None or not self._is(link[0], CONTROL_LOADER):
            return None
        if self.reader.link(key, "vae") is None:
            return "no VAE is connected"
        start, end = (self.reader.number(key, name) for name in ("start_percent", "end_percent"))
        if start is not None and end is not None and start >= end:
            return f"it starts at {start:g} and ends at {end:g}"
        return Swap(CONTROL_APPLY, APPLY_NAMES)

    def _is(self, key: str, kind: str) -> bool:
        """Whether a node is one of this pack's, or becomes one."""
        change = self.changes.get(key)
        if kind == LOADER and is_theirs(self.graph[key]["inputs"]):
            return False
        return self.reader.kind(key) == kind or (isinstance(change, Swap) and change.kind == kind)

    def _sampler(self, key: str) -> Swap | str | None:
        setup = self._setup(key)
        if setup.model is None:
            return "whether its model is SD3.5 is not known"
        if setup.model.kind != SD3:
            return None
        s = setup.sampling
        for what, name, known in (
            ("sampler", s.sampler, SAMPLERS),
            ("scheduler", s.schedule, SCHEDULES),
        ):
            if name not in known:
                seen = "is set from elsewhere" if name is None else f"is {name}"
                return f"its {what} {seen}; this pack has {', '.join(known)}"
        if s.steps is not None and s.steps > MOST_STEPS:
            return f"it takes {s.steps} steps, and {MOST_STEPS} are the most here"
        if s.denoise is not None and not LEAST_DENOISE <= s.denoise <= 1:
            return f"its denoise is {s.denoise:g}"
        chain = self._chain(key)
        foreign = [k for k in chain[:-1] if self.reader.kind(k) not in KEEPING_THE_MODEL]
        if foreign:
            return f"{self._named(foreign[0])} before it may set a schedule of its own"
        shift = self._shift(chain)
        if shift is None:
            return "its shift is set from elsewhere"
        return Swap(SAMPLER, SAMPLER_NAMES, {"shift": shift})

    def _other(self, key: str) -> str | None:
        """Nodes that people may expect to be replaced."""
        if self.reader.kind(key) not in OTHER_SAMPLERS:
            return "this pack has no guidance without the negative prompt"
        setup = self._setup(key)
        return OTHER_SAMPLERS[self.reader.kind(key)] if setup.is_sd3 else None

    def _chain(self, key: str) -> list[str]:
        """The nodes on the model's way into a sampler, from it up."""
        guider = self.reader.link(key, "guider")
        return list(self.reader.chain(guider[0] if guider else key, "model", "model1"))

    def _shift(self, chain: list[str]) -> float | None:
        """What the last node before a chain's end set; None where that is not written in it."""
        for key in chain:
            if self.reader.kind(key) in SHIFTS:
                return None if self.linked(key, "shift") else self.reader.number(key, "shift")
        return DEFAULT_SHIFT

    def _pass_shifts(self) -> None:
        """A shift whose samplers all have it themselves now is not needed any more."""
        for key in self._of(*SHIFTS):
            connected = isinstance(self.graph[key]["inputs"].get("model"), list)
            if connected and key not in self.fixed and self._leads_to_own(key):
                self.changes[key] = Passed()
                self.replaced.append(f"{self._named(key)} is in {NAMES[SAMPLER]} now.")

    def _leads_to_own(self, key: str) -> bool:
        """Whether a model goes to this pack's samplers alone, through its own guidance at most."""
        waiting, seen, found = [key], {key}, False
        while waiting:
            node = waiting.pop()
            if not self.seen(node):
                return False
            for follower in self._followers.get((node, 0), ()):
                self.reader.budget.spend()
                if self._is(follower, SKIP) and follower not in seen:
                    seen.add(follower)
                    waiting.append(follower)
                elif self._is(follower, SAMPLER):
                    found = True
                elif follower not in seen:
                    return False
        return found

    def _skip(self, key: str) -> Swap | str | None:
        after = [k for k in self._of(*SAMPLER_NODES) if key in self._chains[k]]
        setups = [self._setup(k) for k in after]
        if not any(setup.is_sd3 for setup in setups):
            return None
        if not all(self._is(k, SAMPLER) for k in after):
            return "another sampler than this pack's counts its steps in another way"
        chain = self._chains[after[0]]
        before = chain[chain.index(key) + 1 :]
        if not before or not self._is(before[-1], LOADER):
            return f"it needs a model from {NAMES[LOADER]}"
        if any(setup.controls for setup in setups):
            return "beside a ControlNet the two differ after the layers that are left out"
        return self._fitted(key, before, setups)

    @cached_property
    def _chains(self) -> dict[str, list[str]]:
        return {key: self._chain(key) for key in self._of(*SAMPLER_NODES)}

    def _fitted(self, key: str, before: list[str], setups: list[Setup]) -> Swap | str:
        """The guidance that acts on the same layers in the same steps."""
        widget = SKIP_LAYERS[self.graph[key]["class_type"]]
        if any(
            self.linked(key, name) for name in (widget, "start_percent", "end_percent", "scale")
        ):
            return "its settings come from elsewhere"
        text = self.reader.text(key, widget) or ""
        numbers = [self.reader.number(key, n) for n in ("scale", "start_percent", "end_percent")]
        shift, depth = self._shift(before), setups[0].model and setups[0].model.depth
        if shift is None or depth is None or None in numbers:
            return "not all of its settings are known"
        if self.reader.number(key, "rescaling_scale"):
            return "this pack's guidance does not rescale"
        scale, start, end = (number or 0.0 for number in numbers)
        layers = frozenset(int(n) for n in re.findall(r"\d{1,4}", text) if int(n) < depth)
        if not layers or not scale:
            return "it does nothing: no layer that is there, or scale 0"
        runs = [setup.sigmas for setup in setups]
        if any(sigmas is None for sigmas in runs):
            return "the steps of its run are not known"
        steps = [(acting_steps(s, start, end, shift, closed=True), len(s) - 1) for s in runs if s]
        for ends in ((start, end), *(shares_around(acting, count) for acting, count in steps)):
            own = SkipLayers(layers, scale, *ends)
            if all(acting and own.acting(count) == acting for acting, count in steps):
                values = {"layers": layers_text(layers), "start": ends[0], "end": ends[1]}
                return Swap(SKIP, {"model": "model", "scale": "scale"}, values)
        acting, count = steps[0]
        said = f"steps {acting[0]} to {acting[-1]}" if acting else "no step"
        return f"it acts on {said} of {count}, from 0, which shares of the steps can't say"


def _graph(key: str) -> str:
    """The subgraph that a node is in, by its id in the API's form."""
    return key.rpartition(":")[0]


OTHER_SAMPLERS = {
    "KSamplerAdvanced": "this pack's sampler has no first and last step",
    "SamplerCustomAdvanced": "it has a schedule and a guider of its own",
    "SamplerCustom": "it has a schedule of its own",
}
"""Class -> why it stays."""
