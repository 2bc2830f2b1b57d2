"""The largest sizes that a model file may ask for, whatever its layout.

A header of a few bytes can name any number. It is held against these before it is built or read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .errors import CheckpointError


class Limit(NamedTuple):
    """From `least` to `most` of something; `what` is said of it in an error."""

    what: str
    most: int
    least: int = 1


BLOCKS = Limit("the number of blocks", 200)
"""SD3.5 Large has 38; 200 are built in a third of a second."""
CONTROLNET_LAYERS = Limit("the number of ControlNet layers", 100)
"""Stability's have up to 19, and more than the base has blocks can't be used."""
TEXT_LAYERS = Limit("the number of text encoder layers", 100)
"""CLIP-G has 32."""
HIDDEN = Limit("the width of the blocks", 16384)
"""Large has 2432; a Linear of 16384 x 65536 is the largest in a block, 4 GB at fp32."""
CONTEXT = Limit("the width of the prompt's encoding", 65536)
"""SD3.5 takes 4096; one Linear reads it."""
POOLED = Limit("the width of the pooled text", 65536)
"""SD3.5 takes 2048; one Linear reads it."""
TEXT_WIDTH = Limit("the width of the text encoder", 16384)
"""CLIP-G has 1280; the words' table has 49408 rows of it."""
TEXT_HEADS = Limit("the number of the text encoder's heads", 256)
"""CLIP-G has 20."""
POSITIONS = Limit("the side of the position table", 4096)
"""Medium has 384; 4096 would do for 65536 x 65536 pixels."""
CHANNELS = Limit("the number of latent channels", 1024)
"""SD3.5 has 16; a patch of them is one input of a Linear."""
PATCH = Limit("the side of a patch", 16)
"""SD3.5 has 2."""
HEADER = Limit("the length of its header in bytes", 8_000_000, least=0)
"""Large's takes 0.1 MB; 8 MB are parsed in a sixth of a second, into 10 times as much memory."""
TENSORS = Limit("the number of its tensors", 100_000, least=0)
"""A checkpoint with all text encoders has 2,000; every reader goes through their names."""
PIECES = Limit("the number of its files", 1000)
"""Large in fp32 has 4 of 10 GB."""
COMFY_QUANT = Limit("the length of its comfy_quant in bytes", 4096)
"""A JSON text of about 100."""
DESCRIPTION = Limit("the length of its sd35_config in bytes", 65536)
"""A JSON text of about 300."""
GGUF_VALUES = Limit("the number of values in its header", 200_000)
"""Large's has 8,000, T5's words 130,000; gguf reads each by a call."""
DIGITS = Limit("the number of digits of a block's number", 4)
"""Python refuses to read a number of 5,000 digits."""


def bounded(limit: Limit, value: object, source: str) -> int:
    """A size that a file asks for. Raises CheckpointError, naming `source`, when it is no whole
    number within the limit."""
    if type(value) is int and limit.least <= value <= limit.most:
        return value
    seen = f"{value:,}" if type(value) is int else f"no whole number ({type(value).__name__})"
    raise CheckpointError(
        f"{source}: {limit.what} is {seen}; it can be {limit.least} to {limit.most:,}. The file is "
        "damaged or was not made for SD3.5; choose another, or download this one again."
    )


def counted(keys: Iterable[str], name: str, limit: Limit, source: str) -> int:
    """How many blocks there are, by keys such as `name`.0.weight; 0 without any.

    Raises CheckpointError, naming `source`, when they are too many or when one between is missing.
    """
    number = re.compile(rf"{re.escape(name)}\.([0-9]+)\.")
    found = {match[1] for key in keys if (match := number.match(key))}
    for digits in found:
        bounded(DIGITS, len(digits), source)
    numbers = set(map(int, found))
    count = bounded(limit, max(numbers) + 1, source) if numbers else 0
    missing = sorted(set(range(count)) - numbers)
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of {count} blocks: it has '{name}.{count - 1}' and no "
            f"'{name}.{missing[0]}'. The file is incomplete; download it again."
        )
    return count


def check_filled(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise CheckpointError for a matrix without values: a file of no size can give it any sides,
    and a host builds what they say. (An empty list of values is a mark in some files.)"""
    for key, shape in shapes.items():
        if len(shape) > 1 and not all(shape):
            raise CheckpointError(
                f"{source}: '{key}' has shape {list(shape)}, which holds no values. The file is "
                "damaged; download the original again."
            )
