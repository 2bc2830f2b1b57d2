"""A set-up for SD3.5 as facts.

A fact that is not known is None (or an empty tuple), and then no rule that needs it speaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from ..checkpoint.sizes import Weights
from ..errors import SettingError
from ..network.config import VARIANTS
from ..sampling.recipes import NANO, RECIPES, TURBO, Fits
from ..sampling.schedules import (
    DEFAULT_SHIFT,
    LEAST_SHIFT,
    MOST_SHIFT,
    STEPS_OF_TRAINING,
    acting_steps,
    make_sigmas,
)

STEPS = range(1, 10_001)
"""What a sampler takes."""
SD3 = "SD3"
"""The kind of model that all this is about."""
PUBLISHED_WIDTHS = tuple({config.hidden for config in VARIANTS.values()})


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
    dual: bool = False
    """Whether blocks have a second attention."""
    weights: Weights | None = None
    modulation_cache: str = "off"


@dataclass(frozen=True)
class Card:
    """What there is to sample on: bytes of its memory, those of a number there (2 or 4), and
    whether all models stay in it, as on a processor."""

    memory: int
    number: int = 2
    keeps_all: bool = False


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
    weights: int | None = None
    """Bytes of all of them on a card, of T5 alone, and numbers of the largest matrix."""
    t5_weights: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Skip:
    """Skip Layer Guidance as set in a node; `stock` is the host's own node."""

    layers: str
    scale: float
    start: float
    end: float
    stock: bool = False
    frozen_shift: float = DEFAULT_SHIFT
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
    of_the_sampler: bool = False
    """Whether the node that samples makes its picture, as an upscaler does."""
    by_stock_loader: bool = False
    """Whether ComfyUI's own loader reads it."""
    weights: int | None = None
    layers: int = 0


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
class LoraFile:
    """What a LoRA's file changes, and how many of its layers of a diffusion model are in this one.

    hidden: the width of the model that it was made for; text: layers of text encoders; ranks: least
    and most; alpha and scale (alpha over rank) as its metadata say them, which ComfyUI does not
    read: `alphas` says whether they stand among the values too, which it does; magnitudes: DoRA's
    vectors under diffusers' names, which it leaves out; misfits: why a layer is not in this model,
    how many share that, and one of them.
    """

    layers: int | None = None
    matched: int | None = None
    magnitudes: int = 0
    scale: float = 1.0
    alpha: float | None = None
    alphas: bool = False
    ranks: tuple[int, int] | None = None
    hidden: int | None = None
    made_for: str = ""
    spelling: str = ""
    text: int = 0
    misfits: tuple[tuple[str, int, str], ...] = ()
    weights: int = 0


@dataclass(frozen=True)
class Lora:
    """A LoRA on the model."""

    name: str
    strength: float | None = None
    file: LoraFile = LoraFile()


@dataclass(frozen=True)
class Upscaling:
    """What an upscaler's widgets say, in pixels; `longest` is the result's longer side.

    whole_table: whether tiles take their positions from the place in the whole picture.
    """

    factor: float | None = None
    longest: int | None = None
    tile: int | None = None
    overlap: int | None = None
    whole_table: bool = False


@dataclass(frozen=True)
class Vae:
    """The VAE that decodes: bytes of its weights, the channels of its widest tensor that is as
    large as the picture, and whether it decodes in tiles."""

    weights: int
    widest: int | None = None
    tiled: bool = False


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
    upscaling: Upscaling | None = None
    """Of a sampler that enlarges; its latent is then a tile's."""
    vae_channels: int | None = None
    """Of the VAE that decodes; 0 where there is none."""
    vae_name: str | None = None
    vae: Vae | None = None
    card: Card | None = None
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
        shift = self.sampling.shift or DEFAULT_SHIFT
        return acting_steps(self.sigmas or [], control.start, control.end, shift)

    @property
    def is_sd3(self) -> bool:
        """Whether the model is known to be one."""
        return self.model is not None and self.model.kind == SD3

    @property
    def fits(self) -> Fits:
        """What the model still draws well with."""
        recipe = RECIPES.get((self.model.recipe if self.model else None) or "")
        return recipe.fits if recipe else Fits()

    @property
    def turbo(self) -> bool:
        return self.model is not None and self.model.recipe == TURBO

    @property
    def nano(self) -> bool:
        return self.model is not None and self.model.recipe == NANO

    @cached_property
    def sigmas(self) -> list[float] | None:
        """The run's noise levels, with 0 at the end, where they can be known: (steps + 1,)."""
        s, shift = self.sampling, self.sampling.shift or DEFAULT_SHIFT
        if s.steps is None or s.schedule is None or s.steps not in STEPS:
            return None
        if not LEAST_SHIFT <= shift <= MOST_SHIFT:
            return None
        if s.schedule in _FOREIGN_SCHEDULES and s.steps > 1:
            lowest = shift / (STEPS_OF_TRAINING - 1 + shift)
            shares = (step / (s.steps - 1) for step in range(s.steps))
            return [*(_FOREIGN_SCHEDULES[s.schedule](share, lowest) for share in shares), 0.0]
        try:
            denoise = 1.0 if s.denoise is None else s.denoise
            return make_sigmas(s.steps, shift, s.schedule, denoise).tolist()
        except SettingError:
            return None

    @property
    def published(self) -> bool:
        """Whether it is one of Stability AI's SD3.5 models."""
        variant = self.model.variant if self.model else None
        return variant in ("sd3.5_medium", "sd3.5_large")


_FOREIGN_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "karras": lambda share, lowest: (1 + share * (lowest ** (1 / 7) - 1)) ** 7,
    "exponential": lambda share, lowest: lowest**share,
}
"""Share of the steps and lowest level -> level. Karras et al. 2022, equation 5, rho 7."""
