"""Packed weights under the host's memory manager: its own layers, and this pack's beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.utils
import comfyui_version
import torch
from comfy.model_patcher import MemoryCounter
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ...sd35_core.errors import SettingError
from ...sd35_core.packing.formats import (
    BESIDE,
    FORMATS,
    check_packed,
    format_named,
    packed_under,
    unpack,
)
from ...sd35_core.packing.kitchen import LAYOUTS
from .resting import DynamicPatcher, RestingPatcher


@cache
def own_layout(form: str) -> Any:
    """The layout class of a format that the host has no layers for; it knows it from here on.

    These are this pack's own, and int8 in a ComfyUI that is older than its own.
    """
    from comfy_kitchen.tensor import QuantizedLayout, register_layout_class
    from comfy_kitchen.tensor.base import BaseLayoutParams

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        codebook: Tensor | None = None

        def _tensor_fields(self) -> list[str]:
            return ["scale"] if self.codebook is None else ["scale", "codebook"]

    class Layout(QuantizedLayout):
        @classmethod
        def quantize(cls, tensor: Tensor, **_: Any) -> Any:
            raise SettingError(
                "Quantized weights can't take a change here: rounding it again would lose it. "
                "Apply the LoRA or the merge to the original model."
            )

        @classmethod
        def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
            found = cls.state_dict_tensors(qdata, params)
            entries = {f"weight{name}": tensor for name, tensor in found.items()}
            return unpack(entries, form, params.orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, ...]:
            return tuple(cls.state_dict_tensors(qtensor._qdata, qtensor.params).values())

        @classmethod
        def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
            found = {"": qdata, "_scale": params.scale}
            return found if params.codebook is None else {**found, "_codebook": params.codebook}

    Layout.Params = Params
    register_layout_class(layout_name(form), Layout)
    return Layout


def layout_name(form: str) -> str:
    """The name under which the host's tensors find their layout."""
    return f"SD35Layout_{form}"


def check_host() -> None:
    """Raises SettingError when this ComfyUI can't run packed weights at all."""
    if not issubclass(QuantizedTensor, Tensor):
        raise SettingError(
            f"Quantized weights need the package comfy-kitchen, and ComfyUI "
            f"{comfyui_version.__version__} found none that works at its start. Install what "
            "ComfyUI's requirements.txt names, or choose the model in 16 bits."
        )


def check_known(form: str) -> None:
    """Raises SettingError for one of the host's own formats that this host does not read."""
    if form in LAYOUTS and form.removesuffix(" with convrot") not in QUANT_ALGOS:
        raise SettingError(
            f"ComfyUI {comfyui_version.__version__} does not read the format {form}; it reads "
            f"{', '.join(sorted(QUANT_ALGOS))}. Update ComfyUI, or choose another format."
        )


def operations(dtype: Any, compute_dtype: Any) -> Any:
    """The host's layers for packed weights, which know every format of this pack as well.

    Raises SettingError when the host has none.
    """
    check_host()
    described = SimpleNamespace(quant_config={"mixed_ops": True})
    host = comfy.ops.pick_operations(dtype, compute_dtype, model_config=described)

    class Linear(host.Linear):
        own_config: Tensor | None = None

        def _load_from_state_dict(
            self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
            missing: list[str], *rest: Any,
        ) -> None:  # fmt: skip
            packed = packed_under(state_dict, prefix)
            form = format_named(packed, prefix[:-1])[0] if packed else ""
            of_the_host = not form or form.removesuffix(" with convrot") in QUANT_ALGOS
            shape = (self.out_features, self.in_features)
            if not of_the_host:
                check_known(form)
            if form in FORMATS or not of_the_host:
                check_packed(packed, shape, prefix[:-1])
            if of_the_host:
                super()._load_from_state_dict(
                    state_dict, prefix, local_metadata, strict, missing, *rest
                )
                return
            for name in packed:
                del state_dict[prefix + name]
            device, compute = self.factory_kwargs["device"], self.factory_kwargs["dtype"]
            tensors = {name: tensor.to(device) for name, tensor in packed.items()}
            params = own_layout(form).Params(
                scale=tensors["weight_scale"],
                orig_dtype=compute or torch.get_default_dtype(),
                orig_shape=shape,
                codebook=tensors.get("weight_codebook"),
            )
            weight = QuantizedTensor(tensors["weight"], layout_name(form), params)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.quant_format = form
            self.own_config = packed["comfy_quant"]
            nn.Module._load_from_state_dict(
                self, state_dict, prefix, local_metadata, strict, missing, *rest
            )
            missing.remove(prefix + "weight")

        def _forward(self, input: Any, weight: Any, bias: Any) -> Tensor:
            """In full precision, unless the host has packed the input as well (fp8 on CUDA). The
            host would round the inputs of int8 weights."""
            if not isinstance(input, QuantizedTensor) and isinstance(weight, QuantizedTensor):
                weight = weight.dequantize()
            return super()._forward(input, weight, bias)

        def state_dict(self, *args: Any, prefix: str = "", **named: Any) -> Any:
            found = super().state_dict(*args, prefix=prefix, **named)
            if prefix + "comfy_quant" in found and self.own_config is not None:
                found[prefix + "comfy_quant"] = self.own_config
            return found

    return type("PackedOperations", (host,), {"Linear": Linear})


def described(network: nn.Module) -> str:
    """How a network's layers are packed, for the person; empty when none is."""
    found = (getattr(module, "quant_format", None) for module in network.modules())
    formats = {form for form in found if form}
    return f", packed as {' and '.join(sorted(formats))}" if formats else ""


class HookPatch(comfy.model_patcher.LowVramPatch):
    """A LoRA that a hook adds to one prompt alone."""


class UsePatch(comfy.model_patcher.LowVramPatch):
    """A LoRA that is added to an unpacked weight; where the weight is, its matrices are too."""

    held = 0

    def move_to(self, device: Any) -> int:
        """Keep the matrices on a device; the bytes that they take there."""
        if not self.held and not comfy.model_management.is_device_cpu(device):
            moved = Moved(device)
            self.patches = {self.key: moved.patch(self.patches[self.key])}
            self.held = moved.size
        return self.held


class Moved:
    """Tensors of patches on a device, each carried there once while `may_keep` lets it stay."""

    def __init__(self, device: Any, may_keep: Callable[[Tensor], bool] = lambda tensor: True):
        self.device, self.may_keep = device, may_keep
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def size(self) -> int:
        """Bytes on the device."""
        return sum(there.nbytes for _, there in self.pairs.values())

    def patch(self, value: Any) -> Any:
        """A patch, or a part of one, with its tensors on the device."""
        if isinstance(value, Tensor):
            if id(value) not in self.pairs:
                if not self.may_keep(value):
                    return value
                self.pairs[id(value)] = value, value.to(self.device)
            return self.pairs[id(value)][1]
        if isinstance(value, WeightAdapterBase):
            return type(value)(value.loaded_keys, self.patch(value.weights))
        if isinstance(value, (tuple, list)):
            return type(value)(self.patch(each) for each in value)
        return value


class PackedWeights(comfy.model_patcher.ModelPatcher):
    """Adds LoRAs to the unpacked weight at each use; they are never rounded into packed ones."""

    def patch_weight_to_device(self, key: str, *rest: Any, **named: Any) -> Any:
        weight = comfy.utils.get_attr(self.model, key)
        if key in self.patches and isinstance(weight, QuantizedTensor):
            return weight
        return super().patch_weight_to_device(key, *rest, **named)

    def state_dict_for_saving(self, *args: Any, **named: Any) -> Any:
        if any(key in self.patches for key, _ in self._packed()):
            raise SettingError(
                "A quantized model can't be saved with a LoRA or a merge in it: rounding would "
                "lose most of it. Save the original model with the LoRA, then quantize that."
            )
        return super().state_dict_for_saving(*args, **named)

    def model_state_dict(self, *args: Any, **named: Any) -> Any:
        """Weights and biases: what can be patched; not the scales of packed weights."""
        found = super().model_state_dict(*args, **named)
        beside = (*(f".{name}" for name in BESIDE), ".comfy_quant")
        return {key: value for key, value in found.items() if not key.endswith(beside)}

    def load(self, device_to: Any = None, *args: Any, **named: Any) -> None:
        super().load(device_to, *args, **named)
        self._patch_at_use(device_to)

    def _packed(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.model.named_modules():
            if isinstance(getattr(module, "weight", None), QuantizedTensor):
                yield f"{name}.weight", module

    def _patch_at_use(self, device: Any) -> None:
        """Hang the LoRAs on their layers, in the place of what the host hung there."""
        for key, module in self._packed():
            self._take_off(module)
            if key not in self.patches:
                continue
            module.weight_lowvram_function = None  # the host's dynamic weights round it in
            patch = UsePatch(key, self.patches)
            if self.is_dynamic() or module.weight.device == device:
                self.model.model_loaded_weight_memory += patch.move_to(device)
            module.weight_function = [patch, *module.weight_function]

    def _take_off(self, module: Any) -> None:
        held = sum(f.held for f in module.weight_function if isinstance(f, UsePatch))
        self.model.model_loaded_weight_memory -= held
        kinds = (UsePatch, comfy.model_patcher.LowVramPatch)
        module.weight_function = [f for f in module.weight_function if type(f) not in kinds]


class PackedPatcher(PackedWeights, RestingPatcher):
    """Packed weights, loaded before they are used.

    The matrices of hooks stay on the device for one run, if there is room as the host reckons it
    for the weights that it patches for hooks.
    """

    of_hooks: Moved | None = None

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: Any, key: str, *rest: Any, **named: Any
    ) -> None:
        if not isinstance(comfy.utils.get_attr(self.model, key), QuantizedTensor):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *rest, **named)

    def patch_hooks(self, hooks: Any) -> None:
        super().patch_hooks(hooks)
        combined = self.get_combined_hook_patches(hooks)
        if combined and self.of_hooks is None:
            free = comfy.model_management.get_free_memory(self.load_device)
            spare = comfy.model_management.minimum_inference_memory() * 2
            self.of_hooks = Moved(self.load_device, MemoryCounter(free, spare).use)
        for key, module in self._packed():
            functions = _without_hooks(module)
            if key in combined:
                patches = combined[key]
                if self.of_hooks is not None and module.weight.device == self.load_device:
                    patches = self.of_hooks.patch(patches)
                functions.append(HookPatch(key, {key: patches}))
            module.weight_function = functions

    def clear_cached_hook_weights(self) -> None:
        super().clear_cached_hook_weights()
        self.of_hooks = None

    def unpatch_hooks(self, *args: Any, **named: Any) -> None:
        super().unpatch_hooks(*args, **named)
        for _, module in self._packed():
            module.weight_function = _without_hooks(module)

    def partially_unload(self, *args: Any, **named: Any) -> Any:
        freed = super().partially_unload(*args, **named)
        self._patch_at_use(self.load_device)
        return freed

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            for _, module in self._packed():
                self._take_off(module)
        super().unpatch_model(device_to, unpatch_weights)


class DynamicPackedPatcher(PackedWeights, DynamicPatcher):
    """Packed weights under the host's dynamic VRAM."""

    still = PackedPatcher


def _without_hooks(module: Any) -> list[Any]:
    return [f for f in module.weight_function if type(f) is not HookPatch]
