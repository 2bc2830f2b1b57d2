"""Train the two text encoders, before the pictures: python -m tools.nano.text

SD3.5 takes its text encoders ready-made and never trains them. Like CLIP's, these are made to
know what words look like: a linear layer on each encoder's pooled output must tell the looks of
the things in the caption (the principal components of their pictures), where they are, how
large and how many, and the colours behind them.
"""

from __future__ import annotations

import argparse
import random
from functools import cache
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd35_core.checkpoint.tensor_file import write_file
from sd35_core.encoders.text_encoder import ClipTextModel, Tokenize, clip_g, clip_l
from sd35_core.training.dataset import tokens_of

from .pictures import emoji_folder, nano_folder
from .prepare import clip_tokenizer
from .scenes import COLOURS, NUMERALS, THINGS, Scene, draw_scene, draw_two, sprite_of

LOOKS = 40
"""How many numbers describe the looks of a thing."""

TOKENS = 24
"""More than the longest caption has; the encoders are causal, so later tokens don't matter."""

FIRST_UNSEEN_SEED = 2_000_000


@cache
def looks() -> Tensor:
    """Of every thing: (256, LOOKS), mean 0, variance 1 on average, the first ones larger."""
    folder = emoji_folder()
    drawn = numpy.stack([numpy.asarray(sprite_of(name, 16, folder)) for name in THINGS])
    pixels = torch.from_numpy(drawn).float() / 255
    pixels[..., :3] *= pixels[..., 3:]
    pixels = pixels.flatten(1) - pixels.flatten(1).mean(dim=0)
    u, s, _ = torch.linalg.svd(pixels, full_matrices=False)
    components = u[:, :LOOKS] * s[:LOOKS].sqrt()
    return components / components.square().mean().sqrt()


def described(scene: Scene) -> Tensor:
    """What the pooled output must tell: (2 * LOOKS + 16,)."""
    names, nothing = list(THINGS), torch.zeros(LOOKS)
    first = looks()[names.index(scene.names[0])]
    second = looks()[names.index(scene.names[1])] if len(scene.names) > 1 else nothing
    placed = scene.placed()
    counts = [float(scene.count == count) for count in (1, *NUMERALS)]
    kinds = [float(len(scene.names) == 2), float(scene.place == "stacked")]
    where = [placed[0].x, placed[0].y, 8 * placed[0].share - 4]
    grounds = [c / 64 - 2 for i in (0, -1) for c in COLOURS[scene.colours[i]]]
    rest = torch.tensor([2 * v for v in (*counts, *kinds)] + where + grounds)
    return torch.cat([first, second, rest])


class Reader(nn.Module):
    """A text encoder with the linear layer that is thrown away afterwards."""

    def __init__(self, encoder: ClipTextModel):
        super().__init__()
        self.encoder = encoder
        self.tell = nn.Linear(encoder.config.hidden_size, len(described(draw_scene(0))))
        encoder.initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        _, pooled = self.encoder(tokens)
        return self.tell(pooled)


def batch_of(
    first_seed: int, count: int, tokenize: Tokenize, unseen: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Token ids of both encoders, and what they must tell."""
    seeds = range(first_seed, first_seed + count)
    scenes = [draw_scene(seed, unseen) for seed in seeds]
    if not unseen:  # pairs are what is hard to read: half of them at least
        scenes[::2] = [draw_two(random.Random(seed)) for seed in seeds[::2]]
    tokens = tokens_of([scene.caption for scene in scenes], tokenize)
    wanted = torch.stack([described(scene) for scene in scenes])
    return [tokens[name][:, :TOKENS].long() for name in ("tokens_l", "tokens_g")], wanted


def loss_of(told: Tensor, wanted: Tensor) -> Tensor:
    """Squared error, and cross entropy of which thing's looks, or none, are the nearest."""
    loss = (told - wanted).square().mean()
    options = torch.cat([looks(), torch.zeros(1, LOOKS)])
    for part in (slice(0, LOOKS), slice(LOOKS, 2 * LOOKS)):
        right = torch.cdist(wanted[:, part], options).argmin(dim=1)
        distances = torch.cdist(told[:, part], options).square()
        loss = loss + 0.1 * F.cross_entropy(-distances / 8, right)
    return loss


def train(readers: list[Reader], tokenize: Tokenize, steps: int, batch: int, rate: float) -> None:
    """Both at once, each on its own."""
    parameters = [p for reader in readers for p in reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    for step in range(steps):
        tokens, wanted = batch_of(step * batch, batch, tokenize)
        losses = [loss_of(reader(ids), wanted) for reader, ids in zip(readers, tokens)]
        optimiser.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            shown = ", ".join(f"{loss.item():.4f}" for loss in losses)
            print(f"step {step + 1} of {steps}, losses {shown}", flush=True)


@torch.no_grad()
def names_right(reader: Reader, tokens: Tensor, wanted: Tensor) -> tuple[float, float]:
    """How often the first and the second thing's looks are nearest to the right thing's."""
    told, shares = reader(tokens), []
    for part in (slice(0, LOOKS), slice(LOOKS, 2 * LOOKS)):
        there = wanted[:, part].any(dim=1)
        nearest = [torch.cdist(t[there, part], looks()).argmin(dim=1) for t in (told, wanted)]
        shares.append((nearest[0] == nearest[1]).float().mean().item())
    return shares[0], shares[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=nano_folder() / "text.safetensors")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    encoders = {"clip_l": clip_l(48, 3, 3), "clip_g": clip_g(64, 4, 3)}
    readers = [Reader(ClipTextModel(config)) for config in encoders.values()]
    tokenize = clip_tokenizer()
    train(readers, tokenize, options.steps, options.batch, options.rate)
    tokens, wanted = batch_of(FIRST_UNSEEN_SEED, 2000, tokenize, unseen=True)
    tensors: dict[str, Tensor] = {}
    for name, reader, ids in zip(encoders, readers, tokens):
        first, second = names_right(reader, ids, wanted)
        print(f"{name}: first thing {first:.1%}, second thing {second:.1%} of unseen captions")
        state = reader.encoder.state_dict()
        tensors |= {f"text_encoders.{name}.transformer.{key}": t for key, t in state.items()}
    built = {name: config.described() for name, config in encoders.items()}
    write_file(options.out, tensors, {"sd35_config": {"text_encoders": built}})
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
