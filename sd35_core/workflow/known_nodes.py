"""Nodes of the host and of other packs that lead to a sampler: which widget says what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..network.latent import LATENT_CHANNELS
from .own_nodes import (
    CHECK,
    ENCODERS,
    FROM_MODEL,
    LOADER,
    NONE,
    SAMPLER,
    SKIP,
    STEP_CACHE,
    SWEEP,
    UPSCALE,
)

THEIR_WIDGETS = (
    "model_name", "weight_dtype", "clip_name1", "clip_name2_opt", "clip_name3_opt", "vae_name",
)  # fmt: skip
"""The widgets of RES4LYF's SD35Loader, in their order."""


def is_theirs(inputs: Mapping[str, Any]) -> bool:
    """Whether a node SD35Loader is RES4LYF's, by its inputs."""
    return "model_name" in inputs and "model" not in inputs


def as_ours(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of RES4LYF's SD35Loader as ours; text encoders are told by their files' names."""
    found = dict.fromkeys(ENCODERS, NONE)
    for widget in ("clip_name1", "clip_name2_opt", "clip_name3_opt"):
        name = inputs.get(widget)
        if name == ".use_ckpt_clip":
            found = dict.fromkeys(ENCODERS, FROM_MODEL)
        elif isinstance(name, str) and name != ".none":
            plain = name.lower()
            kind = "t5xxl" if "t5" in plain else "clip_g" if "clip_g" in plain else "clip_l"
            found[kind] = name
    vae = inputs.get("vae_name")
    return {
        "model": inputs.get("model_name"),
        **found,
        "vae": FROM_MODEL if vae == ".use_ckpt_vae" else vae,
        "weight_dtype": inputs.get("weight_dtype", "default"),
    }


IDLE = {
    "HyperTile": "HyperTile",
    "TomePatchModel": "Tome Patch Model",
    "PatchModelAddDownscale": "Kohya Deep Shrink (PatchModelAddDownscale)",
    "HypernetworkLoader": "Hypernetwork Loader",
    "DeepCacheModel": "DeepCache",
    "UNetSelfAttentionMultiply": "UNet Self Attention Multiply",
    "UNetCrossAttentionMultiply": "UNet Cross Attention Multiply",
    "UNetTemporalAttentionMultiply": "UNet Temporal Attention Multiply",
}
"""Nodes whose hooks only U-Nets have."""
FAILING = {
    "FreeU": "FreeU",
    "FreeU_V2": "FreeU V2",
    "SelfAttentionGuidance": "Self-Attention Guidance",
}
"""Nodes that end a run with SD3 in an error."""
IDLE_ON_PROMPTS = {"FluxGuidance": "FluxGuidance"}
"""Nodes between a prompt and a sampler whose setting SD3 does not read."""
IDLE_ON_STOCK = {
    "EasyCache": "EasyCache",
    "PerturbedAttention": "Perturbed-Attention Guidance",
    "PerturbedAttentionGuidance": "Perturbed-Attention Guidance",
    "NAGuidance": "Normalized Attention Guidance",
}
"""Nodes that act on a model from SD3.5 Loader, not on one from ComfyUI's own loaders."""
CACHES = {
    STEP_CACHE: "SD3.5 Step Cache",
    "EasyCache": "EasyCache",
    "LazyCache": "LazyCache",
    "ApplyFBCacheOnModel": "First Block Cache",
}
OTHER_PREDICTIONS = {
    "ModelSamplingDiscrete",
    "ModelSamplingContinuousEDM",
    "ModelSamplingContinuousV",
    "ModelSamplingStableCascade",
    "ModelSamplingFlux",
    "ModelSamplingAuraFlow",
}
"""AuraFlow's shifts as SD3's does, but gives the network times in 0..1, not in 0..1000."""
SHIFTS = {"ModelSamplingSD3"}
CHECKPOINT_LOADER, GGUF_LOADER = "CheckpointLoaderSimple", "UnetLoaderGGUF"
LOADERS = {
    LOADER: ("model", ("checkpoints", "diffusion_models")),
    CHECKPOINT_LOADER: ("ckpt_name", ("checkpoints",)),
    "UNETLoader": ("unet_name", ("diffusion_models",)),
    GGUF_LOADER: ("unet_name", ("diffusion_models",)),
}
"""Class -> the widget that names the model, and where the file is."""
SAMPLER_NODES = {
    *(SAMPLER, SWEEP, UPSCALE),
    *("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"),
    *("ClownsharKSampler", "ClownsharKSampler_Beta"),
}
"""Of the pack, of ComfyUI and of RES4LYF."""
SKIPS_OF_THE_HOST = {"SkipLayerGuidanceDiT", "SkipLayerGuidanceSD3", "SkipLayerGuidanceDiTSimple"}
KEEPING_THE_MODEL = {
    *SHIFTS,
    *SKIPS_OF_THE_HOST,
    *("LoraLoader", "LoraLoaderModelOnly", "TorchCompileModel", "RescaleCFG", "Reroute"),
    *(SKIP, STEP_CACHE, CHECK),
}
"""Nodes that hand on a model as their first output, and act alike on ComfyUI's own and on ours."""
USING_THE_MODEL = {
    *(SAMPLER, SWEEP, UPSCALE, "KSampler", "KSamplerAdvanced", "SamplerCustom"),
    *("BasicGuider", "CFGGuider", "DualCFGGuider", "BasicScheduler"),
}
"""Nodes that draw alike with a model of ComfyUI's own loaders and with ours."""
EMPTY_LATENTS = {"EmptySD3LatentImage": LATENT_CHANNELS, "EmptyLatentImage": 4}
VIDEO_LATENTS = {"EmptyHunyuanLatentVideo", "EmptyLTXVLatentVideo", "EmptyMochiLatentVideo",
                 "EmptyCosmosLatentVideo", "EmptyHunyuanVideo15Latent"}  # fmt: skip
"""With a dimension for time, which SD3 does not take."""
TEXT_LOADERS = {
    LOADER: ENCODERS,
    "CLIPLoader": ("clip_name",),
    "DualCLIPLoader": ("clip_name1", "clip_name2"),
    "TripleCLIPLoader": ("clip_name1", "clip_name2", "clip_name3"),
}
"""Class -> the widgets that name text encoders."""
STOCK_CONTROLNET_LOADERS = {"ControlNetLoader", "DiffControlNetLoader"}
NO_FILE = {FROM_MODEL, NONE}
WIDGETS: dict[str, tuple[str, ...]] = {
    "KSampler": ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        "add_noise", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "start_at_step",
        "end_at_step", "return_with_leftover_noise",
    ),
    "SamplerCustom": ("add_noise", "noise_seed", "cfg"),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KSamplerSelect": ("sampler_name",),
    "RandomNoise": ("noise_seed",),
    "CFGGuider": ("cfg",),
    "DualCFGGuider": ("cfg_conds", "cfg_cond2_negative", "style"),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "UnetLoaderGGUF": ("unet_name",),
    "VAELoader": ("vae_name",),
    "CLIPLoader": ("clip_name", "type", "device"),
    "DualCLIPLoader": ("clip_name1", "clip_name2", "type", "device"),
    "TripleCLIPLoader": ("clip_name1", "clip_name2", "clip_name3"),
    "ControlNetLoader": ("control_net_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSD3": ("clip_l", "clip_g", "t5xxl", "empty_padding"),
    "ConditioningSetTimestepRange": ("start", "end"),
    "ControlNetApply": ("strength",),
    "ControlNetApplyAdvanced": ("strength", "start_percent", "end_percent"),
    "ControlNetApplySD3": ("strength", "start_percent", "end_percent"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "ModelSamplingSD3": ("shift",),
    "ModelSamplingAuraFlow": ("shift",),
    "SkipLayerGuidanceSD3": ("layers", "scale", "start_percent", "end_percent"),
    "SkipLayerGuidanceDiTSimple": (
        "double_layers", "single_layers", "start_percent", "end_percent",
    ),
    "FluxGuidance": ("guidance",),
    "ClownsharKSampler_Beta": (
        "eta", "sampler_name", "scheduler", "steps", "steps_to_run", "denoise", "cfg", "seed",
        "sampler_mode", "bongmath",
    ),
    "SkipLayerGuidanceDiT": (
        "double_layers", "single_layers", "scale", "start_percent", "end_percent",
        "rescaling_scale",
    ),
}  # fmt: skip
"""The order of ComfyUI's widgets, for files that don't name them; without what stands beside a
seed."""
