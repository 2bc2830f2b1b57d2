"""A sheet of pictures: rows of them, each under its label."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LEAST_WIDTH = 256
"""Pixels; narrower pictures are enlarged on the sheet, so that their labels can be read."""
DARK, LIGHT = 0.13, 0.9


def sheet(pictures: Tensor, labels: list[str], columns: int) -> Tensor:
    """Pictures (N, H, W, 3), 0..1, and a label for each -> one picture (1, H', W', 3).

    Below LEAST_WIDTH every pixel is repeated a whole number of times.
    """
    times = max(1, -(-LEAST_WIDTH // pictures.shape[2]))
    height, width = pictures.shape[1] * times, pictures.shape[2] * times
    strip, gap = width // 9, width // 32
    down, right = strip + height + gap, width + gap
    rows = -(-len(pictures) // columns)
    out = torch.full((1, rows * down + gap, columns * right + gap, 3), DARK)
    for i, (picture, text) in enumerate(zip(pictures, labels)):
        y, x = gap + i // columns * down, gap + i % columns * right
        out[0, y : y + strip, x : x + width] = label(text, strip, width)[:, :, None]
        large = picture.repeat_interleave(times, 0).repeat_interleave(times, 1)
        out[0, y + strip : y + strip + height, x : x + width] = large
    return out


def label(text: str, height: int, width: int) -> Tensor:
    """Light text on dark, (height, width), 0..1; smaller where it would not fit."""
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    size = height * 0.6
    font = ImageFont.load_default(size)
    while draw.textlength(text, font) > width and size > 2:
        size *= 0.95
        font = ImageFont.load_default(size)
    draw.text((0, height / 2), text, fill=255, font=font, anchor="lm")
    ink = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return DARK + (LIGHT - DARK) * ink
