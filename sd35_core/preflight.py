"""What will go wrong, or do nothing, in a set-up for SD3.5: facts in, sentences out.

A fact that is not known is None (or an empty tuple), and then no rule that needs it speaks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from .errors import SettingError
from .guidance import SkipLayers, parse_layers
from .recipes import RECIPES
from .sampling import LEAST_SHIFT, MOST_SHIFT, STEPS_OF_TRAINING, acting_steps, sigmas
from .words import printable

STEPS = range(1, 10_001)
"""What a sampler takes."""

Severity = Literal["error", "warning", "note"]
"""error: the run fails or the picture is spoiled. warning: something does nothing, or looks bad.
note: worth knowing."""

SD3 = "SD3"
"""The kind of model that all this is about."""
CHANNELS = 16
PIXELS_OF_A_PATCH = 16
SMALLEST, LARGEST = 0.25, 2.0
"""Megapixels that SD3.5 was made for."""
CLIP_TOKENS = 77
"""What CLIP-L and CLIP-G were trained with."""
T5_TOKENS = 256
"""What SD3.5 was trained with; beyond it Medium's edges break (its model card)."""
PUBLISHED_WIDTHS = (1536, 2432)
FAMILIES = {1536: "SD3.5 Medium", 2432: "SD3.5 Large", 256: "the model that comes with the pack"}


@dataclass(frozen=True)
class Model:
    """A diffusion model; `kind` is another word than SD3 when it is none, `flow` is false when
    something makes it predict as another kind of model does."""

    recipe: str | None = None
    variant: str | None = None
    depth: int | None = None
    hidden: int | None = None
    context_dim: int | None = None
    pooled_dim: int | None = None
    positions: int | None = None
    packed: bool = False
    kind: str = SD3
    flow: bool = True
    own: bool = True
    """Whether SD3.5 Loader loaded it."""
    of_res4lyf: bool = False


@dataclass(frozen=True)
class Prompt:
    """One side of the conditioning. `width` and `pooled` are sizes, 0 where there is none."""

    text: str | None = None
    tokens: int | None = None
    width: int | None = None
    pooled: int | None = None
    pooled_is_zero: bool = False
    finite: bool = True


@dataclass(frozen=True)
class Encoders:
    """The text encoders: the model that they are combined for, and which there are."""

    made_for: str = "sd3"
    t5: bool | None = None
    others: bool | None = None


@dataclass(frozen=True)
class Skip:
    """Skip Layer Guidance as set in a node; `stock` is the host's own node."""

    layers: str
    scale: float
    start: float
    end: float
    stock: bool = False
    frozen_shift: float = 3.0
    """At which the host's own node turned its shares into noise levels."""


@dataclass(frozen=True)
class Control:
    """A ControlNet on the prompts."""

    hidden: int | None = None
    control_type: str | None = None
    strength: float | None = None
    start: float | None = None
    end: float | None = None
    vae: bool | None = None
    foreign: str | None = None
    hints: int | None = None
    blank: bool = False
    hint_size: tuple[int, int] | None = None
    on_both: bool = True
    by_stock_loader: bool = False
    """Whether ComfyUI's own loader reads it."""


@dataclass(frozen=True)
class Sampling:
    """A sampler's widgets."""

    steps: int | None = None
    cfg: float | None = None
    shift: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    denoise: float | None = None
    own: bool = True
    """Whether it is this pack's sampler, whose shift counts whatever came before."""


@dataclass(frozen=True)
class Latent:
    """What is sampled; sizes are in pixels. `empty`: nothing but zeros."""

    width: int | None = None
    height: int | None = None
    batch: int | None = None
    channels: int | None = None
    empty: bool | None = None
    finite: bool = True
    masked: bool = False
    video: str | None = None
    """The node that made it, where it has a dimension for time."""


@dataclass(frozen=True)
class Lora:
    """A LoRA: how many layers it changes, and how many of them the model has.

    magnitudes: vectors that ComfyUI leaves out; scale: a factor that it does not know of.
    """

    name: str
    strength: float | None = None
    layers: int | None = None
    matched: int | None = None
    magnitudes: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Setup:
    """Everything that leads into one sampler."""

    model: Model | None = None
    positive: Prompt | None = None
    negative: Prompt | None = None
    same_prompts: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    skips: tuple[Skip, ...] = ()
    controls: tuple[Control, ...] = ()
    latent: Latent | None = None
    loras: tuple[Lora, ...] = ()
    vae_channels: int | None = None
    """Of the VAE that decodes; 0 where there is none."""
    vae_name: str | None = None
    encoders: Encoders | None = None
    idle: tuple[str, ...] = ()
    """Other nodes that act on nothing in SD3.5."""
    failing: tuple[str, ...] = ()
    """Other nodes that end in an error with SD3.5."""
    caches: tuple[str, ...] = ()
    """Nodes that leave out steps."""
    shift_nodes: tuple[str, ...] = ()
    """Nodes before the sampler that set a shift."""
    own_nodes: tuple[str, ...] = ()
    """Nodes that need a model from SD3.5 Loader."""

    def controlled(self, control: Control) -> list[int]:
        """The steps in the window of a ControlNet; none where it or they are not known."""
        if control.start is None or control.end is None or control.strength == 0:
            return []
        shift = self.sampling.shift or 3.0
        return acting_steps(self.levels or [], control.start, control.end, shift)

    @property
    def is_sd3(self) -> bool:
        """Whether the model is known to be one."""
        return self.model is not None and self.model.kind == SD3

    @property
    def turbo(self) -> bool:
        return self.model is not None and self.model.recipe == "sd3.5_large_turbo"

    @property
    def nano(self) -> bool:
        return self.model is not None and self.model.recipe == "sd35_nano"

    @cached_property
    def levels(self) -> list[float] | None:
        """The noise level of each step, where they can be known."""
        s, shift = self.sampling, self.sampling.shift or 3.0
        if s.steps is None or not isinstance(s.schedule, str) or s.steps not in STEPS:
            return None
        if not LEAST_SHIFT <= shift <= MOST_SHIFT:
            return None
        if s.schedule in _FOREIGN_SCHEDULES and s.steps > 1:
            lowest = shift / (STEPS_OF_TRAINING - 1 + shift)
            shares = (step / (s.steps - 1) for step in range(s.steps))
            return [_FOREIGN_SCHEDULES[s.schedule](share, lowest) for share in shares]
        try:
            denoise = 1.0 if s.denoise is None else s.denoise
            return sigmas(s.steps, shift, s.schedule, denoise)[:-1].tolist()
        except SettingError:
            return None

    @property
    def published(self) -> bool:
        """Whether it is one of Stability AI's SD3.5 models."""
        variant = self.model.variant if self.model else None
        return variant in ("sd3.5_medium", "sd3.5_large")


@dataclass(frozen=True)
class Finding:
    """One sentence or two for the person at the canvas; `rule` names it for programs."""

    severity: Severity
    rule: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", printable(self.text))

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


Rule = Callable[[Setup], Iterator[Finding]]


def findings(setup: Setup) -> list[Finding]:
    """Everything there is to say about a set-up, errors first."""
    found = [finding for rule in _RULES for finding in rule(setup)]
    order = ("error", "warning", "note")
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.severity))


def report(found: list[Finding]) -> str:
    """One line each, or that there is nothing to say."""
    return "\n".join(map(str, found)) or "Nothing to say: this set-up fits SD3.5."


def _error(rule: str, text: str) -> Finding:
    return Finding("error", rule, text)


def _warning(rule: str, text: str) -> Finding:
    return Finding("warning", rule, text)


def _note(rule: str, text: str) -> Finding:
    return Finding("note", rule, text)


def _model(setup: Setup) -> Iterator[Finding]:
    model = setup.model
    if model is None:
        return
    if model.kind != SD3:
        yield _error(
            "model",
            f"The model is a {model.kind}, not Stable Diffusion 3 or 3.5. Load an SD3.5 file with "
            "SD3.5 Loader.",
        )
    elif not model.own and setup.own_nodes:
        other = "RES4LYF's node of the id SD35Loader" if model.of_res4lyf else "another node"
        beside = " (beside RES4LYF)" if model.of_res4lyf else ""
        yield _error(
            "model loader",
            f"{' and '.join(setup.own_nodes)} need a model from SD3.5 Loader, and this one comes "
            f"from {other}. Load it with SD3.5 Loader{beside}.",
        )
    if not model.flow and setup.sampling.own:
        yield _note(
            "model sampling",
            "A node before the sampler makes the model predict as one of another kind "
            "(ModelSamplingDiscrete or the like). It does nothing here: DPM++ 2M Shift Sampler "
            "puts SD3.5's own in its place. Remove it.",
        )
    elif not model.flow:
        yield _error(
            "model sampling",
            "A node before the sampler makes the model predict as one of another kind "
            "(ModelSamplingDiscrete or the like), which gives noise. Remove it; SD3.5 needs "
            "ModelSamplingSD3 at most.",
        )
    if setup.sampling.own and setup.shift_nodes:
        yield _note(
            "shift twice",
            f"{setup.shift_nodes[0]} does nothing here: the shift of DPM++ 2M Shift Sampler "
            f"({_number(setup.sampling.shift)}) counts. Set it there and remove the node.",
        )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def _sampling(setup: Setup) -> Iterator[Finding]:
    steps, cfg, shift = setup.sampling.steps, setup.sampling.cfg, setup.sampling.shift
    if setup.turbo:
        recipe = RECIPES["sd3.5_large_turbo"]
        if cfg is not None and cfg > 1.5:
            yield _warning(
                "turbo cfg",
                f"cfg is {cfg:g}, but Large Turbo was distilled to go without guidance: colours "
                f"burn, and every step takes twice the time. Set cfg to {recipe.cfg:g}.",
            )
        if steps is not None and steps > 12:
            yield _warning(
                "turbo steps",
                f"steps is {steps}, but Large Turbo was made for {recipe.steps}: more take time "
                f"and don't improve the picture. Set steps to {recipe.steps}.",
            )
        if setup.skips:
            yield _warning(
                "turbo slg",
                "Skip Layer Guidance was made for SD3.5 Medium; on Large Turbo, which goes "
                "without guidance, it spoils the picture. Remove the node.",
            )
    elif setup.published and setup.model is not None and setup.model.variant is not None:
        recipe = RECIPES[setup.model.variant]
        if steps is not None and steps < 10:
            yield _warning(
                "few steps",
                f"steps is {steps}; {recipe.name} needs 20 or more ({recipe.steps} in its recipe), "
                f"and only Large Turbo makes pictures in 4. Set steps to {recipe.steps}.",
            )
        if cfg and cfg < 1.5:
            yield _warning(
                "low cfg",
                f"cfg is {cfg:g}, so the prompt hardly counts; only Large Turbo goes without "
                f"guidance. Set cfg to {recipe.cfg:g}.",
            )
    if cfg == 0:
        yield _warning(
            "zero cfg",
            "cfg is 0, which leaves the negative prompt alone in the picture. Other programs call "
            "it 0 when there is no guidance; here that is 1. Set cfg to 1 for Large Turbo, and to "
            "3.5 to 5 for the others.",
        )
    if cfg is not None and cfg > 7 and not setup.turbo:
        yield _warning(
            "high cfg",
            f"cfg is {cfg:g}: contrast and colours burn. SD3.5 was made for 3.5 to 5; lower it.",
        )
    sampler = setup.sampling.sampler
    if cfg is not None and cfg > 3 and isinstance(sampler, str) and sampler.endswith("_cfg_pp"):
        yield _warning(
            "cfg of cfg++",
            f"The sampler {sampler} counts cfg on another scale: at {cfg:g} the picture burns. Set "
            f"cfg to 0.8 to 2, or take {sampler.removesuffix('_cfg_pp')}.",
        )
    if setup.published and shift is not None and not 1.5 <= shift <= 8:
        yield _warning(
            "shift",
            f"shift is {shift:g}, but SD3.5 was made for 3 (up to 6 for larger pictures). "
            "Set shift to 3.",
        )
    if setup.nano and shift is not None and shift > 2:
        yield _warning(
            "shift",
            f"shift is {shift:g}, but the small model that comes with the pack was trained for 1. "
            "Set shift to 1.",
        )
    if setup.sampling.schedule in ("karras", "exponential", "polyexponential"):
        yield _warning(
            "schedule",
            f"The schedule is {setup.sampling.schedule}, made for models with another range of "
            "noise: on SD3.5 it wastes most steps near the end. Use normal, simple, sgm_uniform "
            "or beta.",
        )
    negative = setup.negative.text if setup.negative else None
    if cfg == 1 and negative and negative.strip():
        yield _note(
            "unused negative",
            "cfg is 1, so the negative prompt does nothing. Empty it, or raise cfg.",
        )
    if cfg not in (None, 1) and setup.same_prompts:
        yield _warning(
            "same prompts",
            "The negative prompt is the positive one, so guidance cancels itself and cfg does "
            "nothing. Connect a negative prompt of its own; an empty one will do.",
        )


def _denoise(setup: Setup) -> Iterator[Finding]:
    denoise, latent = setup.sampling.denoise, setup.latent
    if denoise is None or latent is None or latent.empty is None:
        return
    if denoise < 1 and latent.empty:
        yield _warning(
            "denoise of nothing",
            f"denoise is {denoise:g}, but the latent is empty: that gives a grey blur. Set "
            "denoise to 1, or connect a picture through VAE Encode.",
        )
    if denoise == 1 and not latent.empty and not latent.masked:
        yield _note(
            "denoise of all",
            "denoise is 1, so nothing of the picture in the latent is kept, only its size. Lower "
            "denoise (0.4 to 0.8) to keep some.",
        )


_FOREIGN_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "karras": lambda share, lowest: (1 + share * (lowest ** (1 / 7) - 1)) ** 7,
    "exponential": lambda share, lowest: lowest**share,
}
"""Share of the steps and lowest level -> level. Karras et al. 2022, equation 5, rho 7."""


def _skip_layers(setup: Setup) -> Iterator[Finding]:
    depth = setup.model.depth if setup.model else None
    for skip in setup.skips:
        if skip.scale == 0 or not skip.layers.strip():
            yield _note(
                "slg off",
                f"Skip Layer Guidance does nothing: its scale is {skip.scale:g} and its layers are "
                f"'{skip.layers}'. Set both, or remove the node.",
            )
            continue
        try:
            layers = parse_layers(skip.layers, depth)
        except SettingError as error:
            yield _error("slg layers", str(error))
            continue
        if skip.start >= skip.end:
            yield _error(
                "slg window",
                f"Skip Layer Guidance starts at {skip.start:g} and ends at {skip.end:g}: no step "
                "lies between. Make end the larger.",
            )
            continue
        yield from _skip_steps(setup, skip, layers)
        variant = setup.model.variant if setup.model else None
        if variant == "sd3.5_large" and layers <= {7, 8, 9} and not setup.turbo:
            yield _warning(
                "slg large",
                f"Layers {', '.join(map(str, sorted(layers)))} are SD3.5 Medium's; on Large they "
                "do nothing good, and users report ruined pictures. Remove the node, or look for "
                "layers with SD3.5 Skip Layer Sweep.",
            )
        cfg = setup.sampling.cfg
        if variant == "sd3.5_medium" and cfg is not None and cfg > 6:
            yield _warning(
                "slg cfg",
                f"cfg is {cfg:g} and Skip Layer Guidance adds to it; Medium was made for cfg 4 "
                "with it. Lower cfg.",
            )


def _skip_steps(setup: Setup, skip: Skip, layers: frozenset[int]) -> Iterator[Finding]:
    """On how many steps it fires."""
    steps = setup.sampling.steps
    if steps is None:
        return
    if skip.stock:
        levels = setup.levels
        if levels is None:
            return
        window = (skip.start, skip.end, skip.frozen_shift)
        acting = len(acting_steps(levels, *window, closed=True))
        if acting == 0 or acting > 0.4 * steps:
            yield _warning(
                "slg steps",
                f"ComfyUI's own skip-layer node goes by noise level: with {steps} steps of "
                f"{setup.sampling.schedule} it acts on {acting}. Use Skip Layer Guidance (SD3.5), "
                "which counts steps.",
            )
        return
    own = SkipLayers(layers, skip.scale, skip.start, skip.end)
    if not own.acting(steps):
        yield _warning(
            "slg steps",
            f"Skip Layer Guidance acts on none of the {steps} steps: between {skip.start:g} and "
            f"{skip.end:g} of them lies no whole one. Raise end or steps.",
        )


def _controls(setup: Setup) -> Iterator[Finding]:
    if len(setup.controls) == 0:
        return
    hidden = setup.model.hidden if setup.model else None
    levels = setup.levels
    for control in setup.controls:
        what = f"{control.control_type or 'SD3.5'} ControlNet"
        if control.foreign:
            yield _error(
                "control kind",
                f"The ControlNet is {control.foreign}, which can't steer SD3.5. Choose one of "
                "Stability AI's for SD3.5.",
            )
            continue
        if control.hidden and hidden and control.hidden != hidden:
            made, used = (
                FAMILIES.get(width, f"width {width}") for width in (control.hidden, hidden)
            )
            yield _error(
                "control base",
                f"The {what} was made for {made}, but the model is {used}. Choose the ControlNet "
                f"made for this model, or load {made}.",
            )
        if control.by_stock_loader and control.hidden and control.hidden not in PUBLISHED_WIDTHS:
            yield _error(
                "control loader",
                f"ComfyUI's own ControlNet loader ends in a size mismatch with a ControlNet "
                f"{control.hidden} wide: it knows the published ones alone. Load it with SD3.5 "
                "ControlNet Loader.",
            )
        if control.vae is False:
            yield _error(
                "control vae",
                f"The {what} reads its picture through a VAE, and none is connected. Connect the "
                "VAE output of SD3.5 Loader to the node that applies it.",
            )
        strength, start, end = control.strength, control.start, control.end
        if strength == 0 or (start is not None and start == end):
            why = "its strength is 0" if strength == 0 else f"its window is {start:g} to {end:g}"
            yield _note(
                "control off", f"The {what} does nothing: {why}. Set it, or remove the node."
            )
        elif start is not None and end is not None and start > end:
            yield _error(
                "control window",
                f"The {what} starts at {start:g} and ends at {end:g}: no step lies between. Make "
                "end the larger.",
            )
        elif (
            start is not None
            and end is not None
            and levels is not None
            and not setup.controlled(control)
        ):
            yield _warning(
                "control steps",
                f"The {what} acts on none of the {len(levels)} steps: its window is "
                f"{start:g} to {end:g}. Widen it.",
            )
        if strength is not None and strength > 1.5:
            yield _warning(
                "control strength",
                f"The strength of the {what} is {strength:g}; above 1 pictures break. Stability AI "
                "recommends 0.6 to 1.",
            )
        if control.blank:
            yield _warning(
                "control blank",
                f"The picture for the {what} is one colour all over, so there is nothing to "
                "follow. Look at it with Preview Image; for canny, lower canny_low and canny_high.",
            )
        yield from _hint_shape(setup, control, what)
        if setup.turbo:
            yield _note(
                "control turbo",
                f"The {what} was made for Large; on Large Turbo it is untried. If the picture "
                "breaks, load Large.",
            )
        if not control.on_both and setup.sampling.cfg not in (None, 1):
            yield _note(
                "control one side",
                f"The {what} is on one of the two prompts alone: guidance then doubles its pull, "
                "and a step takes two calls. Use SD3.5 ControlNet Apply, which takes both.",
            )


def _hint_shape(setup: Setup, control: Control, what: str) -> Iterator[Finding]:
    latent = setup.latent
    if latent is None:
        return
    if control.hints and latent.batch and control.hints not in (1, latent.batch):
        yield _error(
            "control batch",
            f"The {what} has {control.hints} pictures for {latent.batch} latents. Give it one, or "
            "one for each latent.",
        )
    if control.hint_size and latent.width and latent.height:
        width, height = control.hint_size
        apart = (width / height) / (latent.width / latent.height)
        if not 0.9 < apart < 1.11:
            yield _warning(
                "control shape",
                f"The picture for the {what} is {width}x{height}, the latent "
                f"{latent.width}x{latent.height}: it will be cropped to that shape. Make them "
                "alike if its edges matter.",
            )


def _prompts(setup: Setup) -> Iterator[Finding]:
    model = setup.model
    for side, prompt in (("positive", setup.positive), ("negative", setup.negative)):
        if prompt is None:
            continue
        if not prompt.finite:
            yield _error(
                "prompt numbers",
                f"The {side} prompt's encoding holds values that are not numbers, so the picture "
                "would be black. T5 in fp16 can do that; use a bf16 or fp8 file.",
            )
        if model and prompt.width and model.context_dim and prompt.width != model.context_dim:
            yield _error(
                "prompt width",
                f"The {side} prompt's encoding is {prompt.width} wide, the model takes "
                f"{model.context_dim}: it was made by another model's CLIP. Encode it with the "
                "CLIP output of SD3.5 Loader.",
            )
        if prompt.pooled == 0:
            yield _error(
                "pooled missing",
                f"The {side} prompt has no pooled text, which SD3.5 needs. Encode it with CLIP "
                "Text Encode from SD3.5 Loader's CLIP.",
            )
        elif model and prompt.pooled and model.pooled_dim and prompt.pooled != model.pooled_dim:
            yield _error(
                "pooled width",
                f"The {side} prompt's pooled text is {prompt.pooled} wide, the model takes "
                f"{model.pooled_dim}. Encode it with the CLIP output of SD3.5 Loader.",
            )
        if prompt.tokens is not None and prompt.tokens > T5_TOKENS:
            yield _warning(
                "long prompt",
                f"The {side} prompt has about {prompt.tokens} T5 tokens; SD3.5 was trained with "
                f"{T5_TOKENS}, beyond which edges break and the end is hardly read. Shorten it.",
            )
    positive = setup.positive
    if positive is not None and positive.pooled_is_zero:
        yield _warning(
            "pooled empty",
            "The positive prompt's pooled text is all zeros (ConditioningZeroOut, or CLIP-L and "
            "CLIP-G left out), so the picture hardly follows it. Load CLIP-L and CLIP-G.",
        )
    if positive is not None and positive.text is not None and not positive.text.strip():
        yield _warning("empty prompt", "The positive prompt is empty. Write what to draw.")


def _encoders(setup: Setup) -> Iterator[Finding]:
    encoders = setup.encoders
    if encoders is None or not setup.is_sd3 or setup.nano:
        return
    if encoders.made_for != "sd3":
        yield _error(
            "encoder type",
            f"The text encoders are combined for {encoders.made_for}, which gives a prompt that "
            "SD3.5 can't read. Set the loader's type to sd3.",
        )
    elif encoders.t5 and encoders.others is False:
        yield _warning(
            "t5 alone",
            "T5 is the only text encoder, so the pooled text is empty and the picture hardly "
            "follows the prompt. Load CLIP-L and CLIP-G beside it.",
        )
    text = (setup.positive and setup.positive.text) or ""
    long = setup.positive is not None and (setup.positive.tokens or 0) > CLIP_TOKENS
    if encoders.made_for == "sd3" and encoders.t5 is False and (long or '"' in text):
        yield _note(
            "t5 missing",
            f"There is no T5 among the text encoders, and the prompt "
            f"{'is long' if long else 'asks for letters'}: SD3.5 follows that less well without "
            "it. Load t5xxl (a file in fp8 will do), or shorten the prompt.",
        )


def _latent(setup: Setup) -> Iterator[Finding]:
    latent = setup.latent
    if latent is None:
        return
    if latent.video and setup.is_sd3:
        yield _error(
            "latent video",
            f"The latent comes from {latent.video}, which makes one for videos, with a dimension "
            "for time that SD3.5 does not take. Use EmptySD3LatentImage.",
        )
    if not latent.finite:
        yield _error(
            "latent numbers",
            "The latent holds values that are not numbers, so the picture would be black. Look "
            "for the node that made it.",
        )
    if latent.channels not in (None, CHANNELS) and not latent.empty:
        yield _error(
            "latent channels",
            f"The latent has {latent.channels} channels, SD3.5's have {CHANNELS}: it was encoded "
            "by another model's VAE. Encode the picture with SD3.5's.",
        )
    width, height = latent.width, latent.height
    if not width or not height:
        return
    rest = [side for side in (width, height) if side % PIXELS_OF_A_PATCH]
    if rest:
        near = [PIXELS_OF_A_PATCH * round(side / PIXELS_OF_A_PATCH) for side in (width, height)]
        yield _warning(
            "size multiple",
            f"{width}x{height} is no multiple of {PIXELS_OF_A_PATCH}, so SD3.5 pads it and the "
            f"edge suffers. Use {near[0]}x{near[1]}.",
        )
    side = setup.model.positions * PIXELS_OF_A_PATCH if setup.model and setup.model.positions else 0
    if side and max(width, height) > side:
        yield _error(
            "size table",
            f"{width}x{height} is larger than the model's position table, which ends at "
            f"{side}x{side}. Use a smaller latent, and enlarge the picture afterwards.",
        )
    elif setup.published:
        size = width * height / 2**20
        if not SMALLEST * 0.98 <= size <= LARGEST * 1.02:
            yield _warning(
                "size",
                f"{width}x{height} is {size:.2f} megapixels; SD3.5 was made for {SMALLEST} to "
                f"{LARGEST:g}, best near 1. {_SIZE_HELP[size > 1]}",
            )
    elif setup.nano and not 128 <= min(width, height) <= max(width, height) <= 192:
        yield _warning(
            "size",
            f"{width}x{height}: the small model that comes with the pack draws 128x128 well, up to "
            "192 on a side, and little else. Use 128x128.",
        )


_SIZE_HELP = (
    "Use a larger latent, and shrink the picture afterwards.",
    "Use about 1024x1024, and enlarge the picture afterwards.",
)


def _vae(setup: Setup) -> Iterator[Finding]:
    if setup.vae_channels == 0:
        yield _error(
            "vae missing",
            "There is no VAE to decode with: it was set to 'none', or the file holds none. Choose "
            "the SD3.5 VAE in SD3.5 Loader.",
        )
    elif setup.vae_channels not in (None, CHANNELS):
        yield _error(
            "vae channels",
            f"The VAE has {setup.vae_channels} latent channels, SD3.5's has {CHANNELS}: it is "
            "another model's. Choose the SD3.5 VAE in SD3.5 Loader.",
        )
    elif setup.is_sd3 and _FLUX_VAE.fullmatch(setup.vae_name or ""):
        yield _warning(
            "vae name",
            f"'{setup.vae_name}' is FLUX's VAE by its name: it has as many channels as SD3.5's and "
            "another scale, so colours come out wrong. Choose the SD3.5 VAE.",
        )


_FLUX_VAE = re.compile(r"(.*[\\/])?(ae|flux[^\\/]*)\.(safetensors|sft)", re.IGNORECASE)


def _loras(setup: Setup) -> Iterator[Finding]:
    for lora in setup.loras:
        if lora.strength == 0:
            yield _note(
                "lora off", f"The LoRA '{lora.name}' has strength 0 and does nothing. Remove it."
            )
            continue
        if lora.layers and lora.matched == 0:
            yield _warning(
                "lora nothing",
                f"The LoRA '{lora.name}' does nothing: ComfyUI finds none of its {lora.layers} "
                "layers in this model. It was made for another one (SDXL, Flux?), or its names "
                "begin in a way that ComfyUI does not know; choose one for SD3.5.",
            )
        elif lora.layers and lora.matched is not None and lora.matched < lora.layers:
            yield _warning(
                "lora part",
                f"Of the LoRA '{lora.name}' only {lora.matched} of {lora.layers} layers are in "
                "this model. It was made for another variant (Large for Medium?).",
            )
        if lora.magnitudes:
            yield _warning(
                "lora dora",
                f"The LoRA '{lora.name}' is a DoRA as diffusers saves it: ComfyUI leaves out its "
                f"{lora.magnitudes} magnitudes, so it draws otherwise than where it was trained. "
                "Save it in kohya's layout (dora_scale).",
            )
        if lora.scale != 1.0 and lora.strength is not None:
            yield _warning(
                "lora alpha",
                f"The LoRA '{lora.name}' was trained with {lora.scale:g} times its weights (alpha "
                "over rank), which stands in its metadata alone, and ComfyUI does not read that. "
                f"Set its strength to {lora.scale * lora.strength:g} where {lora.strength:g} is "
                "meant.",
            )
    if setup.model and setup.model.packed and any(lora.strength != 0 for lora in setup.loras):
        yield _note(
            "lora quantized",
            "The model is quantized: the LoRA is added to the unpacked weights at every use, "
            "exactly, and costs some time. Nothing is to be done.",
        )


def _others(setup: Setup) -> Iterator[Finding]:
    for name in setup.idle:
        yield _warning(
            "idle",
            f"{name} does nothing on SD3.5: it hooks into parts that this model does not have. "
            "Remove it.",
        )
    for name in setup.failing:
        yield _error(
            "failing",
            f"{name} is made for U-Nets and ends in an error with SD3.5. Remove it.",
        )
    if len(setup.caches) > 1:
        yield _warning(
            "caches",
            f"{' and '.join(setup.caches)} both leave out steps, each counting on what the other "
            "leaves out. Keep one.",
        )


_RULES: tuple[Rule, ...] = (
    _model, _sampling, _denoise, _skip_layers, _controls, _prompts, _encoders, _latent, _vae,
    _loras, _others,
)  # fmt: skip
