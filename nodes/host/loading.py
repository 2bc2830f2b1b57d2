"""Files -> the host's MODEL and VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...sd35_core.checkpoint.layouts import diffusion_model, under
from ...sd35_core.checkpoint.loading import checked_config, open_tensors, shapes_of, with_axes
from ...sd35_core.checkpoint.tensor_file import StateDict, TensorFile, Tensors, pieces_of
from ...sd35_core.errors import CheckpointError, SD35Error, SettingError, is_out_of_memory
from ...sd35_core.limits import check_filled
from ...sd35_core.network.config import AXES, VARIANTS
from ...sd35_core.network.latent import LATENT_CHANNELS
from . import packed, resting
from .network import SD35ModelConfig

WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


LARGEST_CHECKED = 1 << 20
"""Values of a weight that are looked through for NaN before the host's reader needs it."""


class Interruptible(Tensors):
    """A file whose reading ends when the person cancels; a large one takes a minute."""

    def __init__(self, file: Tensors):
        self.path, self.metadata, self.file = file.path, file.metadata, file

    def __getitem__(self, key: str) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.file[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.file.shape(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)


class OnDemand(Interruptible):
    """A file whose tensors the host's own reader reads as they are used; nothing writes there."""

    def __init__(self, file: Tensors):
        super().__init__(file)
        self.tensors: StateDict = {}
        for piece in pieces_of(file.path):
            self.tensors |= comfy.utils.load_torch_file(str(piece), safe_load=True)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


@contextmanager
def by_the_host(names: str) -> Iterator[None]:
    """Has what the host's own code raises on a damaged file say which file that is.

    Our own errors, lack of memory and the person's cancelling stay what they are.
    """
    try:
        yield
    except (SD35Error, comfy.model_management.InterruptProcessingException):
        raise
    except Exception as error:  # the host raises whatever a damaged entry leads it to
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"ComfyUI can't load {names}: {type(error).__name__}: {error}. The file is damaged or "
            "in a format that this ComfyUI does not know. Download the original again, or update "
            "ComfyUI."
        ) from error


def read(path: Path, dynamic: bool = True) -> Tensors:
    """A file, its tensors read when they are used. Raises CheckpointError for a damaged one.

    With the host's dynamic weights its own reader keeps the file open and reads on demand; nothing
    may write into such tensors, so what is not `dynamic` has its own.
    """
    file = open_tensors(path)
    on_demand = dynamic and comfy.memory_management.aimdo_enabled and isinstance(file, TensorFile)
    return OnDemand(file) if on_demand else Interruptible(file)


def load_model(
    path: str, weight_dtype: str, modulation_cache: str = "auto", disable_dynamic: bool = False
) -> Any:
    """The MODEL of a file; the host reloads models through here, without dynamic weights."""
    file = read(Path(path), dynamic=not disable_dynamic)
    return model_from(file, weight_dtype, modulation_cache, disable_dynamic)


def model_from(
    file: Tensors,
    weight_dtype: str,
    modulation_cache: str = "auto",
    disable_dynamic: bool = False,
) -> Any:
    """The MODEL in a file, its dtype and devices chosen by the host. Raises CheckpointError."""
    name = f"'{file.path.name}'"
    found = diffusion_model(file, name)
    with by_the_host(name):
        found, _ = comfy.utils.convert_old_quants(found, "", metadata=dict(file.metadata))
    shape = checked_config(found, name, LARGEST_CHECKED if isinstance(file, OnDemand) else None)
    found = with_axes(found)
    config = SD35ModelConfig(replace(shape, axes=AXES in found))
    config.quant_config = comfy.utils.detect_layer_quantization(found, "")

    management = comfy.model_management
    options = WEIGHT_DTYPES[weight_dtype]
    device, offload_device = management.get_torch_device(), management.unet_offload_device()
    supported = list(config.supported_inference_dtypes)
    quantized = config.quant_config is not None
    dtype = options.get("dtype") or _weight_dtype(found, supported, quantized)
    compute = management.unet_manual_cast(None if quantized else dtype, device, supported)
    config.set_inference_dtype(dtype, compute)
    config.optimizations["fp8"] = options.get("fp8_optimizations", False)
    if quantized:
        config.custom_operations = packed.operations(dtype, compute)

    model = config.get_model(found)
    dynamic = comfy.model_patcher.CoreModelPatcher is comfy.model_patcher.ModelPatcherDynamic
    if dynamic and not (disable_dynamic or management.is_device_cpu(device)):
        patcher_class = packed.DynamicPackedPatcher if quantized else resting.DynamicPatcher
    else:
        patcher_class = packed.PackedPatcher if quantized else resting.RestingPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload_device)
    resting.cache_modulations(patcher, modulation_cache)
    if not quantized:  # dynamic weights are cast by the host where they are used, but small ones
        later = patcher.is_dynamic()
        found = {k: t if later and t.ndim > 1 else t.to(dtype) for k, t in found.items()}
    with by_the_host(name):
        model.load_model_weights(found, "", assign=not quantized)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    patcher.cached_patcher_init = (load_model, (str(file.path), weight_dtype, modulation_cache))
    return patcher


def _weight_dtype(tensors: StateDict, supported: list[torch.dtype], quantized: bool) -> Any:
    """The host's choice; but 16-bit weights that it would widen to fp32 stay as they are when the
    wide ones would fill a third of the free memory. They are then cast where they are used.
    """
    management = comfy.model_management
    count = comfy.utils.calculate_parameters(tensors)
    stored = comfy.utils.weight_dtype(tensors)
    dtype = management.unet_dtype(
        model_params=count,
        supported_dtypes=supported,
        weight_dtype=None if quantized else stored,
    )
    free = management.get_free_memory(management.unet_offload_device())
    widened = dtype == torch.float32 and stored in (torch.float16, torch.bfloat16)
    return stored if widened and 4 * count > free / 3 else dtype


def vae_from(file: Tensors) -> Any:
    """The VAE in a file. Raises CheckpointError when it isn't one for SD3.5."""
    found = under(file, "first_stage_model.") or dict(file)
    check_filled(shapes_of(found), f"'{file.path.name}'")
    with by_the_host(f"'{file.path.name}'"):
        vae = comfy.sd.VAE(sd=found, metadata=file.metadata)
    if vae.first_stage_model is None or vae.latent_channels != LATENT_CHANNELS:
        seen = "none" if vae.first_stage_model is None else f"{vae.latent_channels} channels"
        raise CheckpointError(
            f"'{file.path.name}' has no VAE for SD3.5 (seen: {seen}; expected: {LATENT_CHANNELS} "
            "latent channels). Choose the SD3.5 VAE in the vae widget, or 'none' if the latent is "
            "decoded elsewhere."
        )
    return vae


def no_vae() -> Any:
    """A VAE that says, once it is used, that there is none."""
    return comfy.sd.VAE(sd={})


def summary(file: Tensors, model: Any, encoders: list[str]) -> str:
    """What was loaded, for the person: variant, size, dtype, text encoders."""
    network = model.model.diffusion_model
    name = network.config.variant
    if network.config not in VARIANTS.values():
        name = file.metadata.get("modelspec.title", name)
    count = sum(weight.numel() for weight in network.parameters())
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    dtype = str(model.model_dtype()).removeprefix("torch.")
    dtype += packed.described(network)
    return f"{name}: {size} parameters, {dtype}. Text encoders: {', '.join(encoders) or 'none'}."


def file_of(model: Any, does: str = "quantizes") -> Path:
    """The file of a MODEL; `does` says what for. Raises SettingError for one that is changed or has
    no file."""
    if model is None:
        raise SettingError("Connect a model or a ControlNet to quantize.")
    factory = getattr(model, "cached_patcher_init", None)
    if not factory or not Path(str(factory[1][0])).is_file():
        raise SettingError(
            f"This node {does} the file behind a model, and this model has none. Load it with "
            "SD35Loader."
        )
    if str(factory[1][0]).lower().endswith(".gguf"):
        raise SettingError("A GGUF file is quantized already. Start from the original file.")
    if model.patches:
        raise SettingError(
            f"The model carries a LoRA or a merge ({len(model.patches)} layers changed), which "
            "its file does not have. Save it with ModelSave and load that, or connect the loader "
            "directly."
        )
    return Path(factory[1][0])
