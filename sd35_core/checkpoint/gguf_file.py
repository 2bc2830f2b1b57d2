"""SD3.5 in GGUF files, llama.cpp's container; the package gguf reads and decodes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, is_out_of_memory
from ..limits import GGUF_VALUES, bounded
from .tensor_file import Entry, Tensors, unreadable

ARCHITECTURE = "sd3"
EXTENSION = ".gguf"
SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: its shape, where GGUF could not keep it."""


class GGUFFile(Tensors):
    """The tensors of a GGUF file, each decoded when it is asked for, to fp16 (F32 stays).

    Raises CheckpointError when the file is damaged, of another model, or the package is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            import gguf
        except Exception as error:  # a package that does not fit the others raises anything
            raise CheckpointError(
                f"'{self.path.name}' is a GGUF file, and the package that reads these is not "
                f"there or does not work ({error}). Install it into ComfyUI's Python (pip install "
                "--upgrade gguf), or choose a safetensors file."
            ) from error
        self._gguf: Any = gguf
        source = f"'{self.path.name}'"

        class Reader(gguf.GGUFReader):
            """Stops at the file's end; gguf's own reads on there, for hours if a length is off.

            And after as many values as no model has.
            """

            values_read = 0

            def _get(
                self, offset: int, dtype: Any, count: Any = 1, *rest: Any, **named: Any
            ) -> Any:
                self.values_read += 1
                bounded(GGUF_VALUES, self.values_read, source)
                found = super()._get(offset, dtype, count, *rest, **named)
                if len(found) < int(count):
                    raise ValueError("it ends in the middle of a value")
                return found

        try:
            reader = Reader(self.path)
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except CheckpointError:
            raise
        except Exception as error:  # the reader raises whatever a damaged number leads it to
            raise unreadable(self.path, error, "GGUF") from error
        self.metadata = {name: v for name, v in self.fields.items() if isinstance(v, str)}
        architecture = self.fields.get("general.architecture", ARCHITECTURE)
        if architecture != ARCHITECTURE:
            raise CheckpointError(
                f"'{self.path.name}' holds a model of the architecture '{architecture}', expected "
                f"'{ARCHITECTURE}'. Choose a Stable Diffusion 3.5 file."
            )

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.tensors[key]
        kind = tensor.tensor_type.name
        try:
            values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
            decoded = torch.tensor(values, dtype=None if kind == "F32" else torch.float16)
            return decoded.view(self.shape(key))
        except (NotImplementedError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"'{self.path.name}': '{key}' ({kind}) can't be decoded: {error}. Choose another "
                "file of this model."
            ) from error

    def shape(self, key: str) -> tuple[int, ...]:
        """Without decoding the tensor. Raises CheckpointError for a shape that isn't its own."""
        tensor = self.tensors[key]
        sides = self.fields.get(SHAPE + key)
        if sides is None:
            return tuple(int(side) for side in reversed(tensor.shape))
        whole = isinstance(sides, list) and all(type(side) is int and side > 0 for side in sides)
        if not whole or math.prod(sides) != tensor.n_elements:
            raise CheckpointError(
                f"'{self.path.name}': the shape of '{key}' is given as {sides}, expected a list of "
                f"sides of its {tensor.n_elements:,} values. Choose another file of this model."
            )
        return tuple(sides)

    def entry(self, key: str) -> Entry:
        """Type and shape once it is decoded."""
        wide = self.tensors[key].tensor_type.name == "F32"
        return torch.float32 if wide else torch.float16, self.shape(key)

    def stored(self, key: str) -> int:
        """Bytes of a tensor in the file."""
        return int(self.tensors[key].n_bytes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
