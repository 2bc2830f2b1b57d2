"""Nodes that lead to a sampler, by their class: what they are and which widget says it."""

from __future__ import annotations

IDLE = {
    "FreeU": "FreeU",
    "FreeU_V2": "FreeU V2",
    "HyperTile": "HyperTile",
    "TomePatchModel": "Tome Patch Model",
    "PatchModelAddDownscale": "Kohya Deep Shrink (PatchModelAddDownscale)",
    "HypernetworkLoader": "Hypernetwork Loader",
    "DeepCacheModel": "DeepCache",
}
"""Nodes whose hooks only U-Nets have."""
IDLE_ON_STOCK = {
    "EasyCache": "EasyCache",
    "PerturbedAttention": "Perturbed-Attention Guidance",
    "PerturbedAttentionGuidance": "Perturbed-Attention Guidance",
    "NAGuidance": "Normalized Attention Guidance",
}
"""Nodes that act on a model from SD3.5 Loader, not on one from ComfyUI's own loaders."""
CACHES = {
    "SD35StepCache": "SD3.5 Step Cache",
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
}
SHIFTS = {"ModelSamplingSD3", "ModelSamplingAuraFlow"}
OWN_NODES = {
    "SkipLayerGuidance": "Skip Layer Guidance (SD3.5)",
    "SD35StepCache": "SD3.5 Step Cache",
    "SD35SkipLayerSweep": "SD3.5 Skip Layer Sweep",
}
LOADERS = {
    "SD35Loader": ("model", ("checkpoints", "diffusion_models")),
    "CheckpointLoaderSimple": ("ckpt_name", ("checkpoints",)),
    "UNETLoader": ("unet_name", ("diffusion_models",)),
    "UnetLoaderGGUF": ("unet_name", ("diffusion_models",)),
}
"""Class -> the widget that names the model, and where the file is."""
SAMPLERS = {"SD35Sampler", "SD35SkipLayerSweep", "KSampler", "KSamplerAdvanced", "SamplerCustom",
            "SamplerCustomAdvanced"}  # fmt: skip
CHECK_OUTPUTS = ("model", "positive", "negative", "latent")
"""Inputs of SD35Check that come out again, in this order."""
EMPTY_LATENTS = {"EmptySD3LatentImage": 16, "EmptyLatentImage": 4}
NO_FILE = {"none", "from model file"}
