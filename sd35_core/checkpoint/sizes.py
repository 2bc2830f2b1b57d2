"""What a file's tensors take in memory, from its header alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod

import torch

from .gguf_file import GGUFFile
from .layouts import from_diffusers_key, keys_under
from .loading import QUANTIZATION_SUFFIXES
from .tensor_file import Entry, Tensors

MODULATION = "adaLN_modulation"
"""In the names of layers that the modulation cache lets rest."""
TABLES = r"embedding|embed_tokens|shared\."
"""In the names of matrices that are looked up in, for which ComfyUI casts those of 8 bits alone."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights.

    whole: on a card; stored: as the file has them, which loaders that unpack at each use keep;
    resting: those of `whole` that the modulation cache leaves out; table: those of the position
    table, where it has a value for every place; row: numbers of a kept row of modulations; largest:
    those of the largest matrix that is cast at its use; packed: whether they are made into numbers
    at each use.
    """

    whole: int = 0
    stored: int = 0
    resting: int = 0
    table: int = 0
    row: int = 0
    largest: int = 0
    packed: bool = False

    def with_axes(self, positions: int) -> Weights:
        """With the position table as its columns and rows, so many each."""
        return replace(self, whole=self.whole - self.table + self.table // max(positions, 1))

    def cast_to_8_bits(self) -> Weights:
        """All of 16 bits cast to fp8, as a loader's widget does."""
        if self.packed:
            return self
        halves = {name: getattr(self, name) // 2 for name in ("whole", "resting", "table")}
        return replace(self, **halves, packed=True)

    def unpacked_at_use(self) -> Weights:
        """As a loader keeps them that has them in memory as the file does."""
        return replace(self, whole=self.stored, packed=True)


def weights_in(file: Tensors, prefix: str = "") -> Weights:
    """Of a file's tensors under a prefix. Raises CheckpointError for a type that is not known."""
    whole = stored = resting = table = row = largest = 0
    packed = False
    for key in keys_under(file, prefix):
        dtype, shape = file.entry(prefix + key)
        beside = key.endswith(QUANTIZATION_SUFFIXES)
        of_file = prod(shape) * dtype.itemsize
        size = of_file if beside else bytes_on_card((dtype, shape))
        whole += size
        stored += file.stored(prefix + key) if isinstance(file, GGUFFile) else of_file
        place = from_diffusers_key(key)
        name = key if place is None else place.key
        if MODULATION in name:
            resting += size
            row += shape[0] if shape and name.endswith(".weight") else 0
        looked_up = dtype.itemsize > 1 and re.search(TABLES, key)
        if len(shape) == 2 and not looked_up:
            largest = max(largest, prod(shape))
        if name == "pos_embed":
            table += size
        packed = packed or beside or dtype.itemsize == 1
    return Weights(whole, stored, resting, table, row, largest, packed)


def bytes_on_card(entry: Entry) -> int:
    """Bytes of a tensor on a card: wider numbers than 16 bits are kept in 16 there."""
    dtype, shape = entry
    wide = dtype in (torch.float32, torch.float64)
    return prod(shape) * (2 if wide else dtype.itemsize)
