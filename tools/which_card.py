"""The README's table: which SD3.5 on which card. python tools/which_card.py [--write]

Everything in it is computed from the models' shapes by what SD3.5 Check computes with; --write puts
it into the README, and a test holds the README to it.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from sd35_core.encoders.t5 import T5Config, T5Encoder
from sd35_core.encoders.text_encoder import ClipTextModel, clip_g, clip_l
from sd35_core.network.config import VARIANTS
from sd35_core.quantization.plan import Plan
from sd35_core.whole_file import write_text
from sd35_core.workflow.headers import model_of
from sd35_core.workflow.memory import DECODING, Phase, in_gb, phases, planned_weights
from sd35_core.workflow.setup import Card, Encoders, Latent, Sampling, Setup, Vae

README = Path(__file__).resolve().parent.parent / "README.md"
CARDS = (6, 8, 10, 12, 16, 24)
"""GB."""
MODELS = {
    "Medium": ("sd3.5_medium", Sampling(steps=50, cfg=5.0)),
    "Large": ("sd3.5_large", Sampling(steps=40, cfg=4.5)),
    "Large Turbo": ("sd3.5_large", Sampling(steps=4, cfg=1.0)),
}
FORMATS = {
    "16 bits": None, "8 bits (int8, fp8)": Plan(8), "4 bits": Plan(4), "3 bits": Plan(3),
    "2 bits": Plan(2),
}  # fmt: skip
SIDE = 1024
VAE_NUMBERS = 83_819_683
"""Of SD3.5's VAE, which is 256 channels wide at the picture's size."""
BEGIN, END = "<!-- which card -->", "<!-- /which card -->"


def rows() -> list[tuple[str, str, Setup]]:
    """What, in which format, and the set-up that it is."""
    latent = Latent(SIDE, SIDE, 1)
    found = []
    for name, (variant, sampling) in MODELS.items():
        plain = model_of(VARIANTS[variant], variant, packed=False)
        for form, plan in FORMATS.items():
            weights = planned_weights(variant, plan)
            model = replace(plain, weights=weights, modulation_cache="auto")
            found.append((name, form, Setup(model=model, sampling=sampling, latent=latent)))
    with torch.device("meta"):
        t5 = numbers(T5Encoder(T5Config(4096, 64, 24)))
        clips = sum(numbers(ClipTextModel(config))
                    for config in (clip_l(768, 12, 12), clip_g(1280, 20, 32)))  # fmt: skip
    for form, size in (("T5 in 16 bits", 2 * t5), ("T5 in fp8", t5), ("no T5", 0)):
        largest = 4096 * 10240 if size else 1280 * 5120
        encoders = Encoders(weights=2 * clips + size, t5_weights=size, largest=largest)
        found.append(("Text encoders", form, Setup(encoders=encoders)))
    vae = Setup(vae=Vae(2 * VAE_NUMBERS, 256), latent=latent)
    return [*found, ("VAE, decoding", "16 bits", vae)]


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on(size: int, setup: Setup) -> tuple[Phase, str]:
    """What a set-up takes of a card of so many GB, and how it fits."""
    card = Card(size * 10**9)
    (phase,) = phases(setup, card)
    if phase.wanted > card.memory:
        return phase, "in tiles" if phase.name == DECODING else "partly"
    return phase, "cache" if "modulations" in dict(phase.weights) else "whole"


def table() -> str:
    """In Markdown."""
    heads = ["", "format", "weights", "takes", *(f"{size} GB" for size in CARDS)]
    lines = [heads, ["---"] * len(heads)]
    for name, form, setup in rows():
        most, _ = on(10_000, setup)
        fits = [on(size, setup)[1] for size in CARDS]
        lines.append([name, form, in_gb(most.held), in_gb(most.total), *fits])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    if "--write" not in sys.argv[1:]:
        print(table())
        return 0
    text = README.read_text(encoding="utf-8")
    between = re.compile(f"(?<={BEGIN}\n).*(?=\n{END})", re.DOTALL)
    write_text(README, between.sub(lambda _: table(), text), replace=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
