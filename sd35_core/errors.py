"""Errors worded for the person at the canvas: what happened, what was seen, what to do."""

import errno

import torch

OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
"""What errors of torch and of the system say when there is no more."""


class SD35Error(Exception):
    """Anything this package refuses to do, with a sentence that says why."""


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
