"""This pack's own nodes: ids, names and orders that the nodes and the reading of workflows share.

None of them changes once it was published: workflows hold them.
"""

from __future__ import annotations

LOADER, ALIAS = "SD35Loader", "SD35ModelLoader"
"""Our loader's id, which RES4LYF's has as well, and the one under which ours is there too."""
CHECK, SAMPLER, SWEEP = "SD35Check", "SD35Sampler", "SD35SkipLayerSweep"
UPSCALE = "SD35Upscale"
OWN_TABLE, WHOLE_TABLE = "own", "of the whole"
"""Where the upscaler's tiles take their positions from."""
SKIP, STEP_CACHE = "SkipLayerGuidance", "SD35StepCache"
NAMES = {
    LOADER: "SD3.5 Loader",
    ALIAS: "SD3.5 Loader (beside RES4LYF)",
    SKIP: "Skip Layer Guidance (SD3.5)",
    SAMPLER: "DPM++ 2M Shift Sampler (SD3.5)",
    "SD35Sigmas": "SD3.5 Sigmas",
    "SD35ControlNetLoader": "SD3.5 ControlNet Loader",
    "SD35ControlNetApply": "SD3.5 ControlNet Apply",
    "SD35ControlHint": "SD3.5 Control Hint",
    STEP_CACHE: "SD3.5 Step Cache (approximate)",
    SWEEP: "SD3.5 Skip Layer Sweep",
    UPSCALE: "SD3.5 Upscale",
    "SD35Quantize": "SD3.5 Quantize",
    "SD35TrainLoRA": "SD3.5 Train LoRA",
    CHECK: "SD3.5 Check",
}
"""Id -> what stands on the node."""
FROM_MODEL, NONE = "from model file", "none"
"""What SD3.5 Loader's lists of text encoders and VAEs have beside files."""
T5 = "t5xxl"
ENCODERS: tuple[str, ...] = ("clip_l", "clip_g", T5)
"""SD3.5 Loader's text encoders, as a checkpoint's keys call them too."""
NEED_OUR_MODEL = (SKIP, STEP_CACHE, SWEEP)
"""Nodes that work with a model from SD3.5 Loader alone."""
CHECK_OUTPUTS = ("model", "positive", "negative", "latent")
"""Inputs of SD35Check that come out again, in this order."""
