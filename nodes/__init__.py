"""The pack's nodes: a table of contents."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .controlnet import SD35ControlHint, SD35ControlNetApply, SD35ControlNetLoader
from .guidance import SkipLayerGuidance
from .loader import SD35Loader
from .quantize import SD35Quantize
from .sampler import SD35Sampler, SD35Sigmas
from .step_cache import SD35StepCache


class SD35Extension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SD35Loader,
            SkipLayerGuidance,
            SD35Sampler,
            SD35Sigmas,
            SD35ControlNetLoader,
            SD35ControlNetApply,
            SD35ControlHint,
            SD35StepCache,
            SD35Quantize,
        ]
