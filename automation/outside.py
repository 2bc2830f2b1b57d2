"""What comes from outside (servers, tables, manifests): JSON of known depth, fields of known
types, names that are no paths. All errors are ValueErrors without a name of the file or server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sd35_core.words import printable

LARGEST = 16_000_000
"""Bytes of a workflow."""
DEEPEST = 64
"""Lists and objects in one another; copying and writing them takes a level of Python's stack."""
LONGEST_NAME = 255
"""Bytes; no file system has longer ones."""
MOST_LETTERS = 10
"""Of a suffix."""
RESERVED = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}
"""Windows' devices, with whatever suffix."""

Types = type | tuple[type, ...]


def parsed(data: bytes | str) -> Any:
    """JSON. Raises ValueError when it is none, or nested deeper than DEEPEST."""
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [found]
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return found
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def read(path: Path) -> Any:
    """The JSON in a file of at most LARGEST bytes. Raises OSError and ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST / 1e6:.0f} MB")
    return parsed(data)


def _inside(found: Any) -> Any:
    if isinstance(found, dict):
        return found.values()
    return found if isinstance(found, list) else ()


def fields(found: Any, types: Mapping[str, Types], needed: set[str] | None = None) -> Any:
    """An object whose fields have these types, where they are there; `needed` ones have to be, all
    if not given. Raises ValueError that names the first that is wrong."""
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {shown(found)}")
    for name, kinds in types.items():
        if name not in found:
            if needed is None or name in needed:
                raise ValueError(f"'{name}' is missing")
        elif not is_a(found[name], kinds):
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            wanted = " or ".join(WORDS[kind] for kind in kinds)
            raise ValueError(f"'{name}' is {shown(found[name])}, expected {wanted}")
    return found


WORDS: dict[type, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


def is_a(value: Any, kinds: Types) -> bool:
    """isinstance as JSON has it: true is no number."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def shown(value: Any) -> str:
    """A value in an error."""
    return printable(json.dumps(value, ensure_ascii=False, default=str), 60)


def is_file_name(name: Any) -> bool:
    """Whether a text is one name in a folder, on some system: no path, no control character."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "replace")) <= LONGEST_NAME
        and name not in (".", "..")
        and not set(name) & {"/", "\\"}
        and printable(name) == name
    )


def is_safe_name(name: Any) -> bool:
    """Whether every system can keep a file of that name, and shows it."""
    return (
        is_file_name(name)
        and not set(name) & set('<>:"|?*')
        and name == name.rstrip(". ")
        and not name.startswith(".")
        and not is_reserved(name)
    )


def is_reserved(name: str) -> bool:
    """Whether it is a device of Windows."""
    return name.partition(".")[0].rstrip(" ").casefold() in RESERVED


def suffix_of(name: str) -> str:
    """A file name's suffix; ".bin" where it is none that names a format."""
    suffix = PurePosixPath(name).suffix
    letters = suffix[1:]
    usable = letters.isascii() and letters.isalnum() and len(letters) <= MOST_LETTERS
    return suffix if usable else ".bin"
