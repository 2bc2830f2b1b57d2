"""Files that are whole or not there: the only way in which this pack and its tools write one; and
files that are held, so that two don't write at once.

Standard library alone, so that automation and tools can use it before there is a torch.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .words import printable

PARTIAL = re.compile(r"\.sd35-[0-9a-f]{16}\.partial")
"""Names of files that are being written, or were when their writer was killed."""
OLD_SECONDS = 86_400.0
"""After so long without a change nobody writes such a file any more."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_NEW |= sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
_IN_USE = (5, 32, 33)
"""Windows' errors for a file that another program has open."""
_HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""The systems' errors for a lock that another has."""
_LOCKED_BYTE = 1 << 20
"""Of a lock's file on Windows, where what is locked can't be read: far behind the words."""
_ROOM = "Make room on the disk or choose another folder"
_RIGHT = "You may not write there; choose another folder"
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EFBIG: _ROOM,
    getattr(errno, "EDQUOT", errno.ENOSPC): _ROOM,
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: _RIGHT,
    errno.ENAMETOOLONG: "Choose a shorter name",
}


class WriteError(OSError):
    """A file that could not be written: which, how large, why, and what to do."""


class HeldError(OSError):
    """A lock that another has: what that says of itself."""


def write_whole(
    path: str | Path,
    pieces: bytes | Iterable[bytes | memoryview],
    *,
    replace: bool,
    size: int | None = None,
) -> None:
    """Write a file that has its name only once it is whole and on the disk; folders are made.

    With `replace` a file of that name is replaced; a link is itself replaced, never what it
    points at. Without it nothing is, whoever else writes there. Where the file system has no hard
    links the name is then first taken by an empty file; a writer killed in that moment leaves it.
    size: of the pieces together, in bytes, for the error.

    Raises WriteError when the system refuses, and what the pieces raise; what was there before
    is then unharmed. Killed, it leaves a file of a name like PARTIAL, for `sweep`.
    """
    target = Path(path)
    with _worded(target, size):
        _check(target, replace)
    with _written(target, pieces, size) as partial:
        _put(partial, target, replace)


def write_new(path: str | Path, pieces: bytes | Iterable[bytes | memoryview]) -> Path:
    """The same under the first name of `free_name`, which it gives; nothing is replaced."""
    with _written(Path(path), pieces, None) as partial:
        while True:
            target = free_name(path)
            try:
                _put(partial, target, replace=False)
            except FileExistsError:  # another was sooner
                continue
            return target


def write_text(path: str | Path, text: str, *, replace: bool) -> None:
    """A text as UTF-8, its lines ended as they are."""
    write_whole(path, text.encode(), replace=replace)


def write_picture(path: str | Path, picture: Any, *, replace: bool, **settings: Any) -> None:
    """A picture of Pillow, in the format of the name's end. settings: as for its `save`."""
    kind = Path(path).suffix[1:].lower()
    data = io.BytesIO()
    picture.save(data, {"jpg": "jpeg"}.get(kind, kind), **settings)
    write_whole(path, data.getvalue(), replace=replace)


def free_name(path: str | Path, taken: Callable[[Path], bool] = os.path.lexists) -> Path:
    """The path, or with _2, _3 and so on where one is `taken`: by default where anything is."""
    path = found = Path(path)
    number = 2
    while taken(found):
        found = path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
    return found


def sweep(folder: str | Path, seconds: float = OLD_SECONDS) -> None:
    """Remove what killed writers left in a folder, if it has not changed for so long."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > seconds:
                        os.unlink(entry.path)


@contextmanager
def held_file(path: str | Path) -> Iterator[bool]:
    """Hold a file as a lock, which no other process and no other part of this one has then.

    The system lets go of it when the process ends, however it ends; what is left of the file keeps
    nobody out. False on a file system without locks, where nobody is kept out.

    Raises HeldError at once where another has it, WriteError where no file can be.
    """
    target = Path(path)
    with _worded(target, None):
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        handle = os.open(target, flags, 0o666)
    try:
        locked = _locked(handle, target)
        with suppress(OSError):  # words for others, who can do without
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        try:
            yield locked
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                target.unlink()
    finally:
        os.close(handle)


def _locked(handle: int, path: Path) -> bool:
    """False where the file system can't. Raises HeldError."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return False
        whose = "its lock is held"
        with suppress(OSError, ValueError):
            whose = path.read_text(encoding="utf-8")
        raise HeldError(printable(whose, 100)) from error
    if not os.fstat(handle).st_nlink:  # who held it took the file away in this moment
        raise HeldError("it has just ended")
    return True


@contextmanager
def _written(
    target: Path, pieces: bytes | Iterable[bytes | memoryview], size: int | None
) -> Iterator[Path]:
    """The pieces in a file beside the target, to be put in its place."""
    if isinstance(pieces, bytes):
        pieces, size = [pieces], len(pieces)
    partial = target.parent / f".sd35-{secrets.token_hex(8)}.partial"
    worded = functools.partial(_worded, target, size)
    try:
        with worded():
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial, _NEW, 0o666)  # the system takes the umask off
        try:
            for piece in pieces:
                with worded():
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[os.write(handle, rest) :]
            with worded():
                os.fsync(handle)
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        with worded():
            os.close(handle)
            yield partial
    finally:
        with suppress(OSError, ValueError):
            os.unlink(partial)
    if os.name != "nt":
        with suppress(OSError):  # not every file system can; the file is there all the same
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _check(target: Path, replace: bool) -> None:
    """Find out before the work what would be found out after it."""
    if os.path.isdir(target) and not os.path.islink(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not replace and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _put(partial: Path, target: Path, replace: bool) -> None:
    """Give a written file its name. Raises OSError, FileExistsError above all."""
    if replace:
        os.replace(partial, target)
    elif os.name == "nt":
        os.rename(partial, target)  # which refuses there
    else:
        try:
            os.link(partial, target)
        except FileExistsError:
            raise
        except OSError:
            os.close(os.open(target, _NEW, 0o666))
            try:
                os.replace(partial, target)
            except OSError:
                os.unlink(target)
                raise


@contextmanager
def _worded(target: Path, size: int | None) -> Iterator[None]:
    """The system's errors become a WriteError."""
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError is of a name with a NUL
        raise WriteError(_sentence(target, size, error)) from error


def _sentence(target: Path, size: int | None, error: OSError | ValueError) -> str:
    name, there = f"'{printable(target)}'", os.path.lexists(target)
    if isinstance(error, IsADirectoryError):
        return f"{name} is a folder. Choose a name for the file."
    if isinstance(error, FileExistsError) and there:
        return (
            f"{name} is there already and was not replaced. Choose another name, or move that "
            "file away."
        )
    reason = getattr(error, "strerror", None) or str(error)
    advice = _ADVICE.get(getattr(error, "errno", None) or 0, "Choose another folder or name")
    if isinstance(error, FileExistsError):
        reason = "its folder is a file"
    elif there and getattr(error, "winerror", None) in _IN_USE:
        reason = "another program has the file of that name open, or it is protected"
        advice = "Close that program, then try again"
    how_large = "" if size is None else f" ({_megabytes(size)})"
    unharmed = "; the earlier file of that name is unharmed" if there else ""
    return f"{name} could not be written{how_large}: {reason}. {advice}{unharmed}."


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.{0 if size >= 1e7 else 1}f} MB"
