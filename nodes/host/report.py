"""What a node tells: one line in the log and under the node on the canvas."""

from __future__ import annotations

import logging

from server import PromptServer

log = logging.getLogger("sd35")


def tell(text: str, node_id: str | None) -> None:
    """Log `text` and show it on the node; without a server, or outside a prompt, log it alone."""
    log.info(text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
