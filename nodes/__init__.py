"""The pack's nodes: a table of contents."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .check import SD35Check
from .controlnet import SD35ControlHint, SD35ControlNetApply, SD35ControlNetLoader
from .guidance import SkipLayerGuidance
from .host import canvas, namesake
from .loader import SD35Loader, SD35ModelLoader
from .quantize import SD35Quantize
from .sampler import SD35Sampler, SD35Sigmas
from .step_cache import SD35StepCache
from .sweep import SD35SkipLayerSweep
from .training import SD35TrainLoRA
from .upscale import SD35Upscale


class SD35Extension(ComfyExtension):
    """All nodes of the pack, and what the canvas asks for."""

    async def on_load(self) -> None:
        canvas.serve()
        namesake.serve_namesake(SD35Loader)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        own = [
            SD35Loader,
            SD35ModelLoader,
            SkipLayerGuidance,
            SD35Sampler,
            SD35Sigmas,
            SD35ControlNetLoader,
            SD35ControlNetApply,
            SD35ControlHint,
            SD35StepCache,
            SD35SkipLayerSweep,
            SD35Upscale,
            SD35Quantize,
            SD35TrainLoRA,
            SD35Check,
        ]
        return namesake.listed_first(own, SD35Loader)
