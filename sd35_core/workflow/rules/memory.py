"""Rules about memory: what does not fit a card whole, and what would."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...network.config import VARIANTS
from ...quantization.plan import Plan
from ..finding import Finding, note, warning
from ..memory import DECODING, SAMPLING, TEXT, Phase, in_gb, phases, planned_weights, sides
from ..setup import Card, Setup

BITS = (8, 4, 3, 2)


def about_memory(setup: Setup) -> Iterator[Finding]:
    card = setup.card
    if card is None:
        return
    found = sorted(phases(setup, card), key=lambda phase: -phase.wanted)
    short = [phase for phase in found if phase.wanted > card.memory]
    if card.keeps_all and short:
        yield warning(
            "memory",
            f"The models together take about {in_gb(short[0].total)} GB of main memory "
            f"({short[0].words()}), and this machine has {in_gb(card.memory)}: it will swap, which "
            "takes very long, or end. Take files of fewer bits (SD3.5 Quantize), do without T5, or "
            "use fewer pixels.",
        )
        return
    for phase in short:
        if phase.name == SAMPLING and phase.least > card.memory:
            yield warning(
                "memory work",
                f"Sampling takes about {in_gb(phase.least)} GB beside all weights, and the card "
                f"has {in_gb(card.memory)}: it will run out of memory. Use fewer pixels or a "
                "smaller batch.",
            )
        else:
            yield note("memory", _ABOUT[phase.name](setup, card, phase))


def _of_sampling(setup: Setup, card: Card, phase: Phase) -> str:
    free = phase.wanted - phase.held
    return (
        f"The card has {in_gb(card.memory)} GB; sampling takes about {in_gb(phase.total)} "
        f"({phase.words()}), and ComfyUI wants {in_gb(free)} free beside the weights. It keeps a "
        "part of the model in main memory and carries it over in every step: slower, not broken. "
        f"{_smaller(setup, card, phase)}"
    )


def _smaller(setup: Setup, card: Card, phase: Phase) -> str:
    """What to change about sampling."""
    said = []
    variant = setup.model.variant if setup.model else None
    weights = dict(phase.weights)
    beside = phase.wanted - weights["model"]
    if variant in VARIANTS:
        sizes = {bits: planned_weights(variant, Plan(bits)).whole + beside for bits in BITS}
        smaller = [bits for bits in BITS if sizes[bits] < 0.9 * phase.wanted]
        enough = [bits for bits in smaller if sizes[bits] <= card.memory]
        if chosen := (enough or smaller[-1:]):
            said.append(
                f"the model in {chosen[0]} bits (SD3.5 Quantize), which makes that "
                f"{in_gb(sizes[chosen[0]])} in all"
            )
    elif setup.model and setup.model.weights and not setup.model.weights.packed:
        said.append("the model in fewer bits (SD3.5 Quantize)")
    if setup.model and setup.model.modulation_cache == "off" and setup.model.own:
        said.append("modulation_cache auto in SD3.5 Loader")
    if weights.get("ControlNets", 0) > 0.1 * phase.wanted:
        said.append("the ControlNet in 8 bits")
    if phase.wanted - phase.held > 0.3 * phase.wanted:
        said.append("fewer pixels or a smaller batch")
    return f"What helps: {'; '.join(said or ['a smaller model'])}."


def _of_encoding(setup: Setup, card: Card, phase: Phase) -> str:
    sizes = dict(phase.weights)
    helps = "" if not sizes["T5"] else (
        f" A T5 in fp8 takes half of one in 16 bits; without any (t5xxl: none) the rest takes "
        f"{in_gb(sizes['CLIP'])} GB."
    )  # fmt: skip
    return (
        f"The card has {in_gb(card.memory)} GB; the text encoders take about {in_gb(phase.total)} "
        f"({phase.words()}). ComfyUI keeps a part of them in main memory, which costs some seconds "
        f"with each new prompt and nothing afterwards.{helps}"
    )


def _of_decoding(setup: Setup, card: Card, phase: Phase) -> str:
    height, width = sides(setup) or (0, 0)
    return (
        f"Decoding {width}x{height} takes about {in_gb(phase.total)} GB ({phase.words()}), and the "
        f"card has {in_gb(card.memory)}: ComfyUI decodes in tiles when it runs out, by itself. VAE "
        "Decode (Tiled) does so at once."
    )


_ABOUT: dict[str, Callable[[Setup, Card, Phase], str]] = {
    TEXT: _of_encoding,
    SAMPLING: _of_sampling,
    DECODING: _of_decoding,
}
