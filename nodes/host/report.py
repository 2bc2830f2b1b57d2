"""What a node tells: one line in the log and under the node on the canvas."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from server import PromptServer

log = logging.getLogger("sd35")


def progress() -> Callable[[int, int], None]:
    """(done, total) -> the bar on the canvas; raises when the person has cancelled."""
    bar = comfy.utils.ProgressBar(1)

    def show(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return show


def tell(text: str, node_id: str | None) -> None:
    """Log `text` and show it on the node; without a server, or outside a prompt, log it alone."""
    log.info(text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
