"""SD3.5 for ComfyUI: the host calls `comfy_entrypoint`; nothing is imported before that."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The pack's extension, for the host's node loader."""
    from .nodes import SD35Extension

    return SD35Extension()
