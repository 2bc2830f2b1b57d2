"""A folder is one run's alone for as long as that lives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import SettingError
from ..whole_file import HeldError, held_file
from .config import TrainingConfig
from .dataset import Examples
from .drawing import Drawing
from .run import Run

log = logging.getLogger("sd35")
LOCK = "run.lock"
"""In a run's folder, while the run is alive: whose it is."""


@contextmanager
def run_alone(
    config: TrainingConfig,
    groups: list[Examples] | None = None,
    captions: Sequence[str] = (),
    drawing: Drawing | None = None,
) -> Iterator[Run]:
    """A run as it is or was left in its folder, which is its alone until it ends; from what Run is
    made of.

    Raises what Run and its `resume` do, WriteError, and SettingError where another run is alive.
    """
    folder = Path(config.output)
    try:
        with held_file(folder / LOCK) as locked:
            if not locked:
                log.warning(f"'{folder}' has no locks: let one run at a time train there.")
            run = Run(config, groups, captions, drawing)
            run.resume()
            yield run
    except HeldError as error:
        raise SettingError(
            f"Another run is training in '{folder}' ({error}). Wait until it ends, or stop it; or "
            "choose another folder as 'output'."
        ) from error
