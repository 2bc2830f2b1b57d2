"""Inputs and outputs of those of this pack's nodes that are put in the places of ComfyUI's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .own_nodes import ENCODERS, LOADER, SAMPLER, SKIP

CONTROL_LOADER, CONTROL_APPLY = "SD35ControlNetLoader", "SD35ControlNetApply"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "COMBO"}


@dataclass(frozen=True)
class Shape:
    """inputs: (id, type, default), sockets and widgets in their order; a socket and a widget
    without one have None. outputs: (name, type)."""

    inputs: tuple[tuple[str, str, Any], ...]
    outputs: tuple[tuple[str, str], ...]


SHAPES = {
    LOADER: Shape(
        (
            *((name, "COMBO", None) for name in ("model", *ENCODERS, "vae")),
            ("weight_dtype", "COMBO", "default"),
            ("modulation_cache", "COMBO", "auto"),
        ),
        (("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")),
    ),
    SAMPLER: Shape(
        (
            ("model", "MODEL", None),
            *((name, "CONDITIONING", None) for name in ("positive", "negative")),
            ("latent", "LATENT", None),
            ("seed", "INT", 0),
            ("steps", "INT", 40),
            ("cfg", "FLOAT", 4.5),
            ("shift", "FLOAT", 3.0),
            ("sampler", "COMBO", "dpmpp_2m"),
            ("schedule", "COMBO", "normal"),
            ("denoise", "FLOAT", 1.0),
        ),
        (("LATENT", "LATENT"),),
    ),
    SKIP: Shape(
        (
            ("model", "MODEL", None),
            ("layers", "STRING", "7, 8, 9"),
            ("scale", "FLOAT", 2.5),
            ("start", "FLOAT", 0.01),
            ("end", "FLOAT", 0.2),
            ("controlnet", "COMBO", "keep"),
        ),
        (("MODEL", "MODEL"),),
    ),
    CONTROL_LOADER: Shape(
        (
            ("control_net", "COMBO", None),
            ("depth_maps", "COMBO", "near is bright"),
            ("reference", "COMBO", "Stability AI"),
        ),
        (("CONTROL_NET", "CONTROL_NET"),),
    ),
    CONTROL_APPLY: Shape(
        (
            *((name, "CONDITIONING", None) for name in ("positive", "negative")),
            ("control_net", "CONTROL_NET", None),
            ("vae", "VAE", None),
            ("image", "IMAGE", None),
            ("strength", "FLOAT", 1.0),
            ("start", "FLOAT", 0.0),
            ("end", "FLOAT", 1.0),
        ),
        (("positive", "CONDITIONING"), ("negative", "CONDITIONING")),
    ),
}
"""Class -> its shape, as tests/data/nodes.json has it of a running ComfyUI."""
