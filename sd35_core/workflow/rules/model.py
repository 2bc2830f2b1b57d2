"""Rules about the model, its VAE, its LoRAs and the nodes that change it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...network.latent import LATENT_CHANNELS
from ..finding import Finding, error, note, warning
from ..lora_files import NAMED
from ..own_nodes import ALIAS, LOADER, NAMES
from ..setup import SD3, LoraFile, Model, Setup


def about_model(setup: Setup) -> Iterator[Finding]:
    model = setup.model
    if model is None:
        return
    if model.kind != SD3:
        yield error(
            "model",
            f"The model is a {model.kind}, not Stable Diffusion 3 or 3.5. Load an SD3.5 file with "
            "SD3.5 Loader.",
        )
    elif not model.own and setup.own_nodes:
        other = "RES4LYF's node of the id SD35Loader" if model.of_res4lyf else "another node"
        loader = NAMES[ALIAS if model.of_res4lyf else LOADER]
        yield error(
            "model loader",
            f"{' and '.join(setup.own_nodes)} need a model from SD3.5 Loader, and this one comes "
            f"from {other}. Load it with {loader}.",
        )
    if not model.flow and setup.sampling.own:
        yield note(
            "model sampling",
            "A node before the sampler makes the model predict as one of another kind "
            "(ModelSamplingDiscrete or the like). It does nothing here: DPM++ 2M Shift Sampler "
            "puts SD3.5's own in its place. Remove it.",
        )
    elif not model.flow:
        yield error(
            "model sampling",
            "A node before the sampler makes the model predict as one of another kind "
            "(ModelSamplingDiscrete or the like), which gives noise. Remove it; SD3.5 needs "
            "ModelSamplingSD3 at most.",
        )
    if setup.sampling.own and setup.shift_nodes:
        yield note(
            "shift twice",
            f"{setup.shift_nodes[0]} does nothing here: the shift of DPM++ 2M Shift Sampler "
            f"({_number(setup.sampling.shift)}) counts. Set it there and remove the node.",
        )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def about_vae(setup: Setup) -> Iterator[Finding]:
    if setup.vae_channels == 0:
        yield error(
            "vae missing",
            "There is no VAE to decode with: it was set to 'none', or the file holds none. Choose "
            "the SD3.5 VAE in SD3.5 Loader.",
        )
    elif setup.vae_channels not in (None, LATENT_CHANNELS):
        yield error(
            "vae channels",
            f"The VAE has {setup.vae_channels} latent channels, SD3.5's has {LATENT_CHANNELS}: it "
            "is another model's. Choose the SD3.5 VAE in SD3.5 Loader.",
        )
    elif setup.is_sd3 and _FLUX_VAE.fullmatch(setup.vae_name or ""):
        yield warning(
            "vae name",
            f"'{setup.vae_name}' is FLUX's VAE by its name: it has as many channels as SD3.5's and "
            "another scale, so colours come out wrong. Choose the SD3.5 VAE.",
        )


_FLUX_VAE = re.compile(r"(.*[\\/])?(ae|flux[^\\/]*)\.(safetensors|sft)", re.IGNORECASE)


def about_loras(setup: Setup) -> Iterator[Finding]:
    for lora in setup.loras:
        if lora.strength == 0:
            yield note(
                "lora off", f"The LoRA '{lora.name}' has strength 0 and does nothing. Remove it."
            )
            continue
        file, model = lora.file, setup.model
        if not setup.is_sd3 or model is None:
            pass
        elif file.hidden and model.hidden not in (None, file.hidden):
            yield error(
                "lora variant",
                f"The LoRA '{lora.name}' was made for {file.made_for} (width {file.hidden}), and "
                f"the model is {_model_name(model)} (width {model.hidden}): ComfyUI leaves its "
                "layers out with an error in the log. Choose a LoRA for this model, or the model "
                "that it was made for.",
            )
        elif file.layers and file.matched == 0:
            other = f"for {file.made_for}" if file.made_for else "for another one (SDXL, Flux?)"
            yield warning(
                "lora nothing",
                f"The LoRA '{lora.name}' does nothing: ComfyUI finds none of its {file.layers} "
                f"layers in this model. It was made {other}, or its names begin in a way that "
                f"ComfyUI does not know{_example(file)}; choose one for SD3.5.",
            )
        elif file.layers and file.matched is not None and file.matched < file.layers:
            yield warning(
                "lora part",
                f"Of the LoRA '{lora.name}' only {file.matched} of {file.layers} layers are in "
                f"this model{_example(file)}. It was made for another variant (Large for Medium?).",
            )
        if file.magnitudes:
            yield warning(
                "lora dora",
                f"The LoRA '{lora.name}' is a DoRA as diffusers saves it: ComfyUI leaves out its "
                f"{file.magnitudes} magnitudes, so it draws otherwise than where it was trained. "
                "Save it in kohya's layout (dora_scale).",
            )
        if file.scale != 1.0 and lora.strength is not None:
            yield warning(
                "lora alpha",
                f"The LoRA '{lora.name}' was trained with {file.scale:g} times its weights (alpha "
                "over rank), which stands in its metadata alone, and ComfyUI does not read that. "
                f"Set its strength to {file.scale * lora.strength:g} where {lora.strength:g} is "
                "meant.",
            )
    if setup.model and setup.model.packed and any(lora.strength != 0 for lora in setup.loras):
        yield note(
            "lora quantized",
            "The model is quantized: the LoRA is added to the unpacked weights at every use, "
            "exactly, and costs some time. Nothing is to be done.",
        )


def _model_name(model: Model) -> str:
    return NAMED.get(model.variant or "", "another SD3 model")


def _example(file: LoraFile) -> str:
    """The commonest reason why layers are left out, with one of them."""
    if not file.misfits:
        return ""
    why, _, name = file.misfits[0]
    return f" ('{name}' is {why})" if why.startswith(("a ", "no ", "of ")) else f" ('{name}')"


def about_other_nodes(setup: Setup) -> Iterator[Finding]:
    for name in setup.idle:
        yield warning(
            "idle",
            f"{name} does nothing on SD3.5: it hooks into parts that this model does not have. "
            "Remove it.",
        )
    for name in setup.failing:
        yield error(
            "failing",
            f"{name} is made for U-Nets and ends in an error with SD3.5. Remove it.",
        )
    if len(setup.caches) > 1:
        yield warning(
            "caches",
            f"{' and '.join(setup.caches)} both leave out steps, each counting on what the other "
            "leaves out. Keep one.",
        )
