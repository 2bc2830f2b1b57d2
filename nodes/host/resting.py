"""The modulation cache under the host's memory manager: adaLN weights rest off the card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic, wipe_lowvram_weight
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ...sd35_core.network.config import AXES
from ...sd35_core.network.modulation_cache import ModulationCache

AUTO, ON, OFF = "auto", "on", "off"
MODES = (AUTO, ON, OFF)
KEY = "sd35_modulation_cache"
RESTING = ".adaLN_modulation."


def cache_modulations(patcher: Any, mode: str) -> None:
    """Have every run of a MODEL compute its modulations at its first step.

    "auto": only when the model does not fit on the device. A run in which hooks change weights
    computes them at each step, as ever.
    """
    patcher.model.modulation_mode = mode
    patcher.model.resting = False
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _begin)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, _end)


def _begin(patcher: Any) -> None:
    model = patcher.model
    wanted = model.modulation_mode == ON or model.resting
    if patcher.is_dynamic() and model.modulation_mode == AUTO:
        free = comfy.model_management.get_free_memory(patcher.load_device)
        wanted = patcher.model_size() > free + patcher.loaded_size()
    hold = partial(held, patcher.load_device)
    model.modulation_cache = ModulationCache(hold) if wanted and not patcher.hook_patches else None


def _end(patcher: Any) -> None:
    patcher.model.modulation_cache = None


@contextmanager
def held(device: Any, block: nn.Module) -> Iterator[None]:
    """Keep a block's resting weights on the device, where they would be carried for each call.

    What the host's dynamic weights have on the device, or change on their way, is left to them.
    """
    resting = []
    for name, module in block.named_modules(prefix="."):
        changed = getattr(module, "weight_lowvram_function", None)
        by_the_host = changed or getattr(module, "_v_signature", None) is not None
        if RESTING in f"{name}." and hasattr(module, "comfy_cast_weights") and not by_the_host:
            resting.append((module, module.weight, module.bias))
    for module, *parameters in resting:
        moved = [p if p is None else nn.Parameter(p.to(device), False) for p in parameters]
        module.weight, module.bias = moved
    try:
        yield
    finally:
        for module, weight, bias in resting:
            module.weight, module.bias = weight, bias


class RestingPatcher(ModelPatcher):
    """A ModelPatcher that leaves adaLN weights on the offload device while they are cached.

    The host's layers bring such a weight over for the one call that uses it.
    """

    def model_size(self) -> int:
        """Bytes that are loaded when everything is that should be."""
        whole = comfy.model_management.module_size(self.model)
        if not self._rests(full_load=True):
            return whole
        return whole - sum(comfy.model_management.module_size(m) for _, m in self._modulations())

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        for module in self.model.modules():
            if AXES in module._buffers:  # small, and read at each step
                module.register_buffer(AXES, module.get_buffer(AXES).to(device_to))
        if not self._rests(full_load):
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
            return
        self.model.resting = True
        with self.use_ejected():
            self.unpatch_hooks()
            for name, module in self._modulations():
                self._rest(name, module, device_to)
        memory = 1e32 if full_load else lowvram_model_memory
        super().load(device_to, memory, force_patch_weights, False)

    def _rests(self, full_load: bool) -> bool:
        mode = self.model.modulation_mode
        return mode == ON or self.model.resting or (mode == AUTO and not full_load)

    def _rest(self, name: str, module: Any, device_to: Any) -> None:
        """Leave a module on the offload device, to be brought over at each use.

        A LoRA is rounded into its weights once, as the host does with a layer that it loads: so a
        weight that rests has the bits of one that does not.
        """
        wipe_lowvram_weight(module)
        keys = [f"{name}.{part}" for part in ("weight", "bias")]
        if not getattr(module, "comfy_patched_weights", False):
            for key in keys:
                self.unpin_weight(key)
                self.patch_weight_to_device(key, device_to)
            module.comfy_patched_weights = True
        module.to(self.offload_device)
        for key, functions in zip(keys, (module.weight_function, module.bias_function)):
            functions.extend(self.weight_wrapper_patches.get(key, ()))
            self.pin_weight_to_device(key)
        module.prev_comfy_cast_weights = module.comfy_cast_weights
        module.comfy_cast_weights = True

    def _load_list(self, *arguments: Any, **named: Any) -> list[Any]:
        """What is to be loaded: entries that end in name, module and parameters."""
        found = super()._load_list(*arguments, **named)
        if not self.model.resting:
            return found
        return [entry for entry in found if RESTING not in entry[-3]]

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights and self.model.resting:
            for _, module in self._modulations():
                wipe_lowvram_weight(module)
            self.model.resting = False
        super().unpatch_model(device_to, unpatch_weights)

    def _modulations(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.model.named_modules():
            if RESTING in name and hasattr(module, "comfy_cast_weights"):
                yield name, module


class DynamicPatcher(ModelPatcherDynamic):
    """A ModelPatcher under the host's dynamic VRAM, where adaLN weights are the last to stay."""

    still: type[ModelPatcher] = RestingPatcher
    """What a copy without dynamic weights is: the host makes one for hooks and for compiling."""

    def _load_list(self, *arguments: Any, **named: Any) -> list[Any]:
        """Entries (large, order, ..., name, module, parameters), sorted by the host afterwards."""
        found = super()._load_list(*arguments, **named)
        if self.model.modulation_mode == OFF:
            return found
        return [(2, 0, *entry[2:]) if RESTING in entry[-3] else entry for entry in found]

    def clone(self, *arguments: Any, **named: Any) -> Any:
        copy = super().clone(*arguments, **named)
        if not copy.is_dynamic():
            copy.__class__ = self.still
        return copy
