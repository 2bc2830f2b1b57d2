"""A run on a command line: a bar, or a line a minute, and Ctrl-C."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .config import BEST
from .run import Run

log = logging.getLogger("sd35")
MINUTE = 60.0


def train(run: Run) -> None:
    """Train to the last step, with a progress bar, or a line a minute where there is no terminal;
    Ctrl-C finishes the step, saves, stops."""
    from tqdm import tqdm

    config, smooth, said = run.config, 0.0, time.monotonic()
    with (
        _until_interrupted() as interrupted,
        tqdm(
            total=config.steps, initial=run.step, unit="step", mininterval=1.0, disable=None
        ) as bar,
    ):

        def show(loss: float) -> None:
            nonlocal smooth, said
            smooth = loss if smooth == 0 else 0.98 * smooth + 0.02 * loss
            bar.update()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            if bar.disable and time.monotonic() - said > MINUTE:
                said = time.monotonic()
                log.info(f"step {run.step} of {config.steps}, loss {smooth:.4f}")

        def drawn(count: int, total: int) -> None:
            nonlocal said
            bar.set_postfix_str(f"drawing the class: {count} of {total}", refresh=False)
            if bar.disable and time.monotonic() - said > MINUTE:
                said = time.monotonic()
                log.info(f"drew {count} of {total} pictures of the class")

        file = run.go_on(show, interrupted, drawn)
    log.info(f"stopped at step {run.step} of {config.steps}: {run.history.words()}; wrote {file}")
    if run.last is not None and (better := run.better()) is not None:
        log.info(f"{better.words(run.last)}: {file.with_name(BEST)}")


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; a second one stops at once."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler
    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
