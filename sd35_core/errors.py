"""Errors worded for the person at the canvas: what happened, what was seen, what to do."""

import errno

import torch

from .words import printable

OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
"""What errors of torch and of the system say when there is no more."""


class SD35Error(Exception):
    """Anything this package refuses to do, with a sentence that says why: a line or several.

    What a stranger's file or workflow put into a line can't begin another one.
    """

    def __init__(self, *lines: str):
        super().__init__(*map(printable, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class CheckpointError(SD35Error):
    """A file that is not what was asked for, or is damaged."""


class SettingError(SD35Error):
    """A widget value or an input that can't work."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in whatever library's words, that memory ended."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in OUT_OF_MEMORY)
