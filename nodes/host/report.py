"""What a node tells: in the log, and under the node on the canvas."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
from server import PromptServer

log = logging.getLogger("sd35")
PREVIEW_SIDE = 1024
"""Pixels each way at most of a picture that is shown while a node works."""
EVENT = "sd35.report"
KEY = "sd35_report"
"""Under which the page (web/sd35.js) hears a report at once, and finds it among outputs."""


def progress() -> Callable[..., None]:
    """(done, total, a picture of Pillow's or None) -> the bar on the canvas, and the picture on the
    node; raises when the person has cancelled."""
    bar = comfy.utils.ProgressBar(1)

    def show(done: int, total: int, picture: Any = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, picture and ("JPEG", picture, PREVIEW_SIDE))

    return show


def tell(text: str, node_id: str | None) -> None:
    """Log `text` and show it on the page that queued the run; where there is none, log it alone."""
    log.info(text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and server.client_id is not None and node_id is not None:
        server.send_sync(EVENT, {"node": node_id, "text": text}, server.client_id)


def told(text: str, node_id: str | None) -> dict[str, Any]:
    """Tell `text`, and give the `ui` of a NodeOutput that keeps it: the host sends that again when
    the result was cached, if the node's class is an output or has HAS_INTERMEDIATE_OUTPUT."""
    tell(text, node_id)
    return {KEY: [text]}
