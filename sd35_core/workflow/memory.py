"""What a set-up takes of a card's memory, phase by phase, from headers and shapes alone.

ComfyUI unloads one model when the next needs its place, so the most is the largest of the phases
and not their sum: the text encoders, then the model with its ControlNets, then the VAE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from ..checkpoint.sizes import MODULATION, Weights
from ..network.config import VARIANTS, MMDiTXConfig, Shapes
from ..network.latent import PIXELS
from ..network.mmditx import MMDiTX
from ..network.modulation_cache import MOST_ROWS
from ..network.peak import NetworkCall, peak_of_call
from ..quantization.plan import Plan, planned_bytes
from .setup import SD3, Card, Model, Setup

GB = 1e9
KEPT_FREE = 12 * 2**30 // 10
"""Bytes beside its weights that ComfyUI keeps free for a model at least (0.8 GiB for its work and
0.4 GiB for other programs)."""
OTHERS = 4 * 2**30 // 10
FOR_A_CELL = 16 * 2**20 // 1000
"""What ComfyUI sets aside for SD3, for each cell of a latent and each byte of a number."""
CLIP_TOKENS, LEAST_T5_TOKENS, STEP_OF_TOKENS = 77, 77, 64
FULL_SIZE_TENSORS = 4
"""Tensors of a VAE's decoder that exist at once where they are largest: the way round a block, the
input of a convolution, its output, and what the convolution makes for itself (3.7 to 4.2 measured
with SD3.5's VAE on a CPU)."""
TILE = 512
"""Pixels of a side of a tile in which ComfyUI's VAE decodes."""
FP32 = 4
"""Bytes of a number in ComfyUI's text encoders, for which it casts each matrix at its use."""
MOST_SIDE, MOST_BATCH = 2**16, 2**12
"""Of pixels and of latents, beyond which nothing is reckoned."""

TEXT, SAMPLING, DECODING = "text encoding", "sampling", "VAE decode"


@dataclass(frozen=True)
class Phase:
    """Bytes while one thing is done: weights by what they are, and work beside them.

    least: work with one prompt at a time; aside: what ComfyUI keeps free for the work.
    """

    name: str
    weights: tuple[tuple[str, int], ...]
    work: int
    least: int
    aside: int = 0

    @property
    def total(self) -> int:
        """What it takes."""
        return self.held + self.work

    @property
    def held(self) -> int:
        return sum(size for _, size in self.weights)

    @property
    def wanted(self) -> int:
        """From which memory on all weights stay on the card."""
        return self.held + max(self.work, self.aside)

    def words(self) -> str:
        parts = [*self.weights, ("work", self.work)]
        return ", ".join(
            f"{name} {in_gb(size)}" for name, size in parts if size > 0.01 * self.total
        )


def phases(setup: Setup, card: Card) -> list[Phase]:
    """In their order; those of which something is not known are left out."""
    found = [*_encoding(setup), *_sampling(setup, card), *_decoding(setup, card)]
    if not card.keeps_all:
        return found
    every = tuple(part for phase in found for part in phase.weights)
    return [Phase(p.name, every, p.work, p.least) for p in found]


def unknown_parts(setup: Setup) -> list[str]:
    """What is not reckoned with, for the person."""
    known = {
        "the text encoders": setup.encoders is not None and setup.encoders.weights is not None,
        "the model": setup.model is not None and setup.model.weights is not None,
        "a ControlNet": all(control.weights for control in setup.controls),
        "the size of the latent": sides(setup) is not None,
        "the VAE": setup.vae is not None,
    }
    return [name for name, here in known.items() if not here]


def _encoding(setup: Setup) -> Iterator[Phase]:
    encoders = setup.encoders
    if encoders is None or encoders.weights is None:
        return
    rest = encoders.weights - encoders.t5_weights
    weights = (("T5", encoders.t5_weights), ("CLIP", rest))
    work = FP32 * encoders.largest
    yield Phase(TEXT, weights, work, work, KEPT_FREE)


def _sampling(setup: Setup, card: Card) -> Iterator[Phase]:
    model, size = setup.model, sides(setup)
    if model is None or model.kind != SD3 or model.weights is None or size is None:
        return
    shape, weights = shape_of(model), model.weights
    if shape is None or not all(control.weights for control in setup.controls):
        return
    batch = (setup.latent and setup.latent.batch) or 1
    texts = 1 + (setup.sampling.cfg != 1.0)
    rows = batch * (texts + any(skip.scale and not skip.stock for skip in setup.skips))
    height, width = (-(-side // PIXELS) for side in size)
    call = NetworkCall(
        rows, height, width, tokens(setup), card.number, weights.packed,
        residuals=sum(control.layers for control in setup.controls),
    )  # fmt: skip
    most, least = (peak_of_call(shape, replace(call, rows=count)) for count in (rows, batch))
    aside = max(KEPT_FREE, FOR_A_CELL * card.number * batch * height * width + OTHERS)
    loras = sum(lora.file.weights for lora in setup.loras if lora.strength != 0)
    beside = (
        ("ControlNets", sum(control.weights or 0 for control in setup.controls)),
        ("LoRAs", loras if weights.packed else 0),
    )
    whole = Phase(SAMPLING, (("model", weights.whole), *beside), most, least, aside)
    kept = max(1, min(MOST_ROWS, texts * (setup.sampling.steps or MOST_ROWS)))
    resting = (
        ("model", weights.whole - weights.resting),
        ("modulations", kept * card.number * (weights.row + shape.hidden)),
    )
    fits = card.keeps_all or whole.wanted <= card.memory
    rests = model.modulation_cache == "on" or (model.modulation_cache == "auto" and not fits)
    yield replace(whole, weights=(*resting, *beside)) if rests else whole


def _decoding(setup: Setup, card: Card) -> Iterator[Phase]:
    size = sides(setup)
    if setup.vae is None or setup.vae.widest is None or size is None:
        return
    tiled = setup.vae.tiled and setup.upscaling is None
    height, width = (min(side, TILE) if tiled else side for side in size)
    work = FULL_SIZE_TENSORS * setup.vae.widest * height * width * card.number
    yield Phase(DECODING, (("VAE", setup.vae.weights),), work, work)


def sides(setup: Setup) -> tuple[int, int] | None:
    """Height and width in pixels, where they are known and no impossible ones."""
    latent = setup.latent
    if latent is None or not latent.width or not latent.height or latent.video:
        return None
    if not (
        PIXELS <= min(latent.width, latent.height) <= max(latent.width, latent.height) <= MOST_SIDE
    ):
        return None
    return (latent.height, latent.width) if (latent.batch or 1) in range(1, MOST_BATCH) else None


def tokens(setup: Setup) -> int:
    """Of the longer prompt, with CLIP's, in whole steps: a few more or less change nothing."""
    prompts = (setup.positive, setup.negative)
    most = max((p.tokens or 0 for p in prompts if p is not None), default=0)
    t5 = max(LEAST_T5_TOKENS, -(-most // STEP_OF_TOKENS) * STEP_OF_TOKENS)
    return CLIP_TOKENS + t5


def shape_of(model: Model) -> MMDiTXConfig | None:
    """The network's shape as far as memory goes."""
    if not model.depth or not model.hidden or not model.context_dim or not model.pooled_dim:
        return None
    return MMDiTXConfig(
        model.depth, model.hidden, model.context_dim, model.pooled_dim, 1, True,
        (0,) if model.dual else (),
    )  # fmt: skip


def memory_line(setup: Setup) -> list[str]:
    """The sum in one line; none where nothing is known."""
    found = phases(setup, setup.card) if setup.card else []
    if not found or setup.card is None:
        return []
    most = max(found, key=lambda phase: phase.total)
    return [
        f"Memory: about {in_gb(most.total)} of {in_gb(setup.card.memory)} GB, most in "
        f"{most.name} ({most.words()}).{_left_out(setup)}"
    ]


def memory_table(setup: Setup) -> list[str]:
    """Each phase in a line."""
    if setup.card is None:
        return []
    size, lines = setup.card.memory, []
    for phase in phases(setup, setup.card):
        fits = "whole" if phase.wanted <= size else "partly in main memory"
        if phase.name == DECODING and phase.wanted > size:
            fits = "in tiles"
        numbers = "".join(f"{in_gb(n):>9}" for n in (phase.held, phase.work, phase.total))
        lines.append(f"  {phase.name:14}{numbers}   {fits} ({phase.words()})")
    if lines:
        heads = "".join(f"{head:>9}" for head in ("weights", "work", "in all"))
        lines = [
            "Memory in GB, about, computed from the files' headers:",
            f"  {'':14}{heads}   on a card of {in_gb(size)}",
            *lines,
        ]
    said = _left_out(setup).strip()
    return [*lines, *([said] if said else [])]


def _left_out(setup: Setup) -> str:
    found = unknown_parts(setup)
    return f" Memory that is not known and not counted: {', '.join(found)}." if found else ""


def in_gb(size: float) -> str:
    return f"{size / GB:.1f}" if size >= 0.95 * GB else f"{size / GB:.2g}"


@cache
def warm_up() -> None:
    """Do what takes a second once: torch's first call on "meta", the published models' sizes."""
    peak_of_call(VARIANTS["sd3_medium"], NetworkCall(1, 2, 2, 1))
    for variant in VARIANTS:
        planned_weights(variant, None)


@cache
def planned_weights(variant: str, plan: Plan | None) -> Weights:
    """A published model's weights on a card by a plan, in 16 bits by none."""
    shapes = _published_shapes(variant)
    adaln = {key: shape for key, shape in shapes.items() if MODULATION in key}
    row = sum(shape[0] for key, shape in adaln.items() if key.endswith(".weight"))
    whole, resting = (planned_bytes(found, plan) for found in (shapes, adaln))
    return Weights(whole, resting=resting, row=row, packed=plan is not None)


@cache
def _published_shapes(variant: str) -> Shapes:
    network = MMDiTX(replace(VARIANTS[variant], axes=True), device="meta")
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
