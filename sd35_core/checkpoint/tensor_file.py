"""Files of named tensors, read one tensor at a time; models in several files are read as one."""

from __future__ import annotations

import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, is_out_of_memory
from ..limits import HEADER, PIECES, TENSORS, bounded
from ..whole_file import WriteError, sweep, write_whole

StateDict = dict[str, Tensor]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the formats that occur in models."""
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on: scales that are powers of two
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
SAFETENSORS = (".safetensors", ".sft")
"""How the names of such files end, in small letters."""
NUMBERED = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.safetensors|\.sft)", re.IGNORECASE)
"""The names of a model's files where it has several, as diffusers and transformers save it."""


Entry = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""


class Piece(NamedTuple):
    """One file of a model: its version, and where its tensors' bytes begin."""

    path: Path
    version: tuple[int, int]
    start: int


class Tensors(Mapping[str, Tensor]):
    """A model's tensors by name, each read when it is asked for.

    path: the file's; metadata: what it says of itself in words.
    """

    path: Path
    metadata: dict[str, str]

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Without reading the tensor."""

    def entry(self, key: str) -> Entry:
        """Type and shape; without reading the tensor where a header tells."""
        tensor = self[key]
        return tensor.dtype, tuple(tensor.shape)


class TensorFile(Tensors):
    """The tensors of a safetensors file.

    Of a model that was saved in several files, `name-00001-of-00003.safetensors`, any one stands
    for all. A tensor gets memory of its own, so the file can be replaced or deleted afterwards.
    Raises CheckpointError, here or on reading, when a file is missing, damaged or became another,
    and for a header beyond `limits`, before anything parses it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata = {}
        self.entries: dict[str, tuple[Piece, dict[str, Any]]] = {}
        for path in pieces_of(self.path):
            self._add(path)

    def _add(self, path: Path) -> None:
        source = f"'{path.name}'"
        try:
            with path.open("rb") as file:
                version = version_of(file)
                length = int.from_bytes(file.read(8), "little")
                if length <= version[0]:  # of a longer one safe_open says what it is
                    bounded(HEADER, length, source)
                with safe_open(path, framework="pt") as checked:
                    self.metadata |= checked.metadata() or {}
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise unreadable(path, error) from error
        header.pop("__metadata__", None)
        piece = Piece(path, version, 8 + length)
        self.entries |= {key: (piece, entry) for key, entry in header.items()}
        bounded(TENSORS, len(self.entries), source)

    def __getitem__(self, key: str) -> Tensor:
        piece, entry = self.entries[key]
        dtype, shape = self.entry(key)
        begin, end = entry["data_offsets"]
        data = bytearray(end - begin)
        rest = memoryview(data)
        try:
            with piece.path.open("rb", buffering=0) as file:
                if version_of(file) != piece.version:
                    raise CheckpointError(
                        f"'{piece.path.name}' was replaced by another file while it was read. "
                        "Wait until that one is whole, then queue again."
                    )
                file.seek(piece.start + begin)
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise OSError(f"it ended in the middle of '{key}'")
                    rest = rest[count:]
        except OSError as error:
            raise unreadable(piece.path, error) from error
        values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return values.view(shape)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.entries[key][1]["shape"])

    def entry(self, key: str) -> Entry:
        """Type and shape, without reading the tensor. Raises CheckpointError for a type that is
        not known."""
        piece, entry = self.entries[key]
        if entry["dtype"] not in DTYPES:
            known = f"known are {', '.join(DTYPES)}"
            raise unreadable(piece.path, ValueError(f"dtype {entry['dtype']} of '{key}'; {known}"))
        return DTYPES[entry["dtype"]], self.shape(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def pieces_of(path: Path) -> list[Path]:
    """The files of a model, by the name of any of them: one, or all that lie beside it under
    numbered names. Raises CheckpointError when some of those are missing."""
    match = NUMBERED.fullmatch(path.name)
    if match is None:
        return [path]
    count = bounded(PIECES, int(match[3]), f"'{path.name}'")
    names = [f"{match[1]}-{i:05}-of-{match[3]}{match[4]}" for i in range(1, count + 1)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"'{path.name}' is one of {count} files of a model, and {len(missing)} of them are not "
            f"beside it, '{missing[0]}' among them. Put all {count} into one folder."
        )
    return [path.with_name(name) for name in names]


def is_later_piece(name: str) -> bool:
    """Whether a file's name is that of a model's second file or a later one."""
    match = NUMBERED.fullmatch(name)
    return match is not None and int(match[2]) > 1


def read_file(path: str | Path) -> tuple[StateDict, dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises CheckpointError."""
    file = TensorFile(path)
    return dict(file), file.metadata


def version_of(file: IO[bytes]) -> tuple[int, int]:
    """What tells an open file from one that took its place: size and time."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def unreadable(path: str | Path, error: Exception, kind: str = "safetensors") -> Exception:
    """The error for a file that is no whole file of its kind, or is gone; lack of memory stays
    what it is."""
    path = Path(path)
    if is_out_of_memory(error):
        return MemoryError(str(error))
    if path.is_dir():
        inside = sorted(str(p.relative_to(path)) for p in path.glob("**/*.safetensors"))[:3]
        return CheckpointError(
            f"'{path.name}' is a folder, expected a file"
            + (f". Choose one in it: {', '.join(inside)}." if inside else " with a model.")
        )
    if not path.is_file():
        return CheckpointError(
            f"'{path.name}' is not there: it was moved or deleted. Put it back, or choose another "
            "file."
        )
    return CheckpointError(
        f"'{path.name}' can't be read as a {kind} file ({path.stat().st_size:,} bytes): {error}. "
        "It was probably not downloaded to its end; download it again."
    )


def write_file(
    path: str | Path, tensors: StateDict, metadata: dict[str, Any], replace: bool = True
) -> None:
    """Write a safetensors file, whole or not at all; `replace`: where one of that name is.

    Raises CheckpointError when the system refuses; what was there before is then still there.
    """
    entries = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    aligned = sorted(entries, key=lambda key: (-entries[key][0].itemsize, key))
    ordered = {key: entries[key] for key in aligned}
    write_as_made(path, ordered, ((key, tensors[key]) for key in aligned), metadata, replace)


def write_as_made(
    path: str | Path,
    entries: Mapping[str, Entry],
    made: Iterable[tuple[str, Tensor]],
    metadata: dict[str, Any],
    replace: bool = True,
) -> None:
    """The same with tensors that come one after the other, so that few are in memory.

    They lie in the file as `entries` has them, but for small ones of odd lengths, which would put
    others out of step: these are last. One that comes before its turn is kept until then.
    """
    odd = {key: entry for key, entry in entries.items() if _bytes(entry) % 8}
    even = {key: entry for key, entry in entries.items() if key not in odd}
    entries = even | dict(sorted(odd.items(), key=lambda each: -each[1][0].itemsize))
    text = {key: v if isinstance(v, str) else json.dumps(v) for key, v in metadata.items()}
    size = sum(_bytes(entry) for entry in entries.values())
    sweep(Path(path).parent)
    try:
        write_whole(path, _pieces(entries, made, text), replace=replace, size=size)
    except WriteError as error:
        raise CheckpointError(str(error)) from error


def _bytes(entry: Entry) -> int:
    return entry[0].itemsize * prod(entry[1])


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none where no such file is."""
    if not path.is_file():
        return {}
    try:
        return TensorFile(path).metadata
    except CheckpointError:
        return {}


def _pieces(
    entries: Mapping[str, Entry], made: Iterable[tuple[str, Tensor]], metadata: dict[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file: the length of its header, the header, the tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, entry in entries.items():
        begin, end = end, end + _bytes(entry)
        header[key] = {
            "dtype": names[entry[0]], "shape": list(entry[1]), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    waiting: StateDict = {}
    turns = iter(entries)
    turn = next(turns, None)
    for key, tensor in made:
        assert (tensor.dtype, tuple(tensor.shape)) == entries[key], key
        waiting[key] = tensor
        while turn in waiting:
            flat = waiting.pop(turn).detach().cpu().contiguous().flatten()
            yield flat.view(torch.uint8).numpy().data
            turn = next(turns, None)
    assert turn is None and not waiting, f"{turn} was not made"
