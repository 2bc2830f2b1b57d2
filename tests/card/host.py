"""ComfyUI, started with --cpu, put on the pretend card for one test."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .device import CARD

Attribute = Callable[[Any, str, Any], None]
"""pytest's monkeypatch.setattr."""
RAM = 16 << 30


class Mode(NamedTuple):
    """How a model lies on the card.

    free: bytes of the card beyond what the host keeps for inference; dynamic: ComfyUI's dynamic
    VRAM, with so many bytes of each model resident; gpu_only: started with --gpu-only; real: on
    CUDA, where the host measures what is free and dynamic VRAM is its own.
    """

    free: int = 24 << 30
    dynamic: int | None = None
    gpu_only: bool = False
    real: bool = False


MODES = {
    "whole": Mode(),
    "partly": Mode(free=9_000_000),
    "dynamic": Mode(dynamic=1 << 40),
    "dynamic, partly": Mode(free=9_000_000, dynamic=6_000_000),
    "gpu-only": Mode(gpu_only=True),
    "real": Mode(real=True),
    "real, dynamic": Mode(real=True, dynamic=0),
}


def put(attribute: Attribute, mode: Mode, dtype: torch.dtype | None = None) -> None:
    """Let the host find a card. dtype: float16 or bfloat16, the one that it infers in."""
    from comfy import model_management as management
    from comfy.cli_args import args
    from comfy.ldm.modules import attention
    from comfy.ldm.modules.diffusionmodules import mmdit

    device = torch.device("cuda", 0) if mode.real else CARD
    free = int(management.minimum_inference_memory()) + mode.free

    def memory(device: Any = None, both: bool = False) -> Any:
        count = free if device is None or device.type == CARD.type else RAM
        return (count, count) if both else count

    def total(device: Any = None, torch_total_too: bool = False) -> Any:
        return memory(device, torch_total_too)

    def available(device: Any = None, torch_free_too: bool = False) -> Any:
        return memory(device, torch_free_too)

    state = management.VRAMState.HIGH_VRAM if mode.gpu_only else management.VRAMState.NORMAL_VRAM
    attribute(management, "cpu_state", management.CPUState.GPU)
    attribute(management, "vram_state", state)
    attribute(args, "gpu_only", mode.gpu_only)
    attribute(args, "cpu", False)
    attribute(management, "get_torch_device", lambda: device)
    for name, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        chosen = dtype is kind
        attribute(management, f"should_use_{name}", lambda *_, chosen=chosen, **__: chosen)
    for module in (attention, mmdit):
        attribute(module, "optimized_attention", attention.attention_pytorch)
    if not mode.real:
        attribute(management, "get_free_memory", available)
        attribute(management, "get_total_memory", total)
        attribute(management, "is_nvidia", lambda: False)  # torch may be built for cards
        attribute(management, "is_amd", lambda: False)
        attribute(management, "soft_empty_cache", lambda *_: None)
    if mode.dynamic is not None:
        enable_dynamic(attribute)
        if not mode.real:
            pretend_dynamic(attribute, mode.dynamic)


class Range:
    """A model's range of addresses on the card, of which the first `fits` bytes can be backed."""

    fits = 0

    def __init__(self, size: int, device: int):
        self.end, self.pages = 0, {}

    def prioritize(self) -> None:
        """Nothing else wants the card's memory."""

    def alloc(self, count: int) -> tuple[Range, int, int]:
        start = -(-self.end // 512) * 512
        self.end = start + count
        return self, start, count

    def loaded_size(self) -> int:
        return sum(page.numel() for page in self.pages.values())

    def free_memory(self, count: int) -> int:
        freed = self.loaded_size()
        self.pages.clear()
        return freed


class Buffer:
    """Pinned memory of the host; there is none here."""

    size = 0

    def __init__(self, *_: Any):
        pass

    def truncate(self, *_: Any, **__: Any) -> None:
        pass


def _fault(allocation: tuple[Range, int, int]) -> int | None:
    owner, start, count = allocation
    if start + count > Range.fits:
        return None
    if start not in owner.pages:
        owner.pages[start] = torch.empty(count, dtype=torch.uint8, device=CARD)
    return id(owner.pages[start])


def enable_dynamic(attribute: Attribute) -> None:
    """As the host's main.py does on NVIDIA."""
    import comfy_aimdo.control
    import comfy_aimdo.model_mmap
    from comfy import memory_management, model_patcher
    from comfy import model_management as management

    assert comfy_aimdo.control.init(), "comfy-aimdo does not start here"
    if comfy_aimdo.model_mmap.lib is None:
        importlib.reload(comfy_aimdo.model_mmap)  # it binds the library that is loaded by now
    if torch.cuda.is_available():
        assert comfy_aimdo.control.init_devices([(0, 0)])
    attribute(memory_management, "aimdo_enabled", True)
    attribute(management, "DIRTY_MMAPS", set())
    attribute(model_patcher, "CoreModelPatcher", model_patcher.ModelPatcherDynamic)


def pretend_dynamic(attribute: Attribute, fits: int) -> None:
    """The host's own dynamic patcher, with plain tensors in the place of its address ranges."""
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar as ranges
    import comfy_aimdo.torch as bridge
    from comfy import memory_management, model_patcher
    from comfy.cli_args import args

    patcher, generator = model_patcher.ModelPatcher, torch.Generator
    listed = patcher._load_list
    attribute(Range, "fits", fits)
    attribute(ranges, "ModelVBAR", Range)
    attribute(ranges, "vbar_fault", _fault)
    attribute(ranges, "vbar_unpin", lambda _: None)
    attribute(ranges, "vbar_signature_compare", lambda a, b: a is not None and a == b)
    attribute(ranges, "vbars_analyze", lambda *_: 0)
    attribute(bridge, "aimdo_to_tensor", lambda held, _: held[0].pages[held[1]])
    attribute(comfy_aimdo.host_buffer, "HostBuffer", Buffer)
    attribute(memory_management, "read_tensor_file_slice_into", lambda *_, **__: False)
    attribute(args, "disable_pinned_memory", True)
    # what the pretend card lacks: `parameter.data = ` and generators of its own
    attribute(patcher, "_load_list", lambda self, for_dynamic=False, **_: listed(self, for_dynamic))
    attribute(torch, "Generator", lambda *_, **__: generator())
