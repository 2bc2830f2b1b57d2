"""Pictures -> the hints that SD3.5's ControlNets expect: blur, canny edges, depth.

A hint is a picture again, (B, H, W, 3) in 0..1. What the VAE then sees of it is `vae_input`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import SettingError
from ..network.controlnet import Kind

Near = Literal["near is bright", "near is dark"]
NEAR: tuple[Near, Near] = ("near is bright", "near is dark")
REFERENCE_SIDE = 1024
"""The blur's radius is given in pixels of a picture with this longer side."""
BLUR_RADIUS = 24.0
CANNY_THRESHOLDS = (0.1, 0.2)
"""Usual settings."""


def rgb(picture: Tensor) -> Tensor:
    """(B, H, W, 1, 3 or 4) -> (B, H, W, 3): grey is repeated, alpha laid on black."""
    channels = picture.shape[-1]
    if picture.ndim != 4 or channels not in (1, 3, 4):
        raise SettingError(
            f"The picture has shape {list(picture.shape)}; expected (batch, height, width, "
            "channels) with 1, 3 or 4 channels."
        )
    if channels == 1:
        return picture.repeat(1, 1, 1, 3)
    return picture[..., :3] * picture[..., 3:] if channels == 4 else picture


def blurred(picture: Tensor, radius: float) -> Tensor:
    """Gaussian blur; radius: standard deviation in pixels at 1024."""
    from torchvision.transforms.functional import gaussian_blur

    height, width = picture.shape[1:3]
    sigma = radius * max(height, width) / REFERENCE_SIDE
    reach = min(int(3 * sigma + 0.5), min(height, width) // 2 - 1)
    if reach < 1:
        return rgb(picture)
    found = rgb(picture).movedim(-1, 1)
    for size in ([2 * reach + 1, 1], [1, 2 * reach + 1]):
        found = gaussian_blur(found, size, [sigma, sigma])
    return found.movedim(1, -1)


def edges(picture: Tensor, low: float, high: float) -> Tensor:
    """Canny's edges, white on black; low and high: thresholds in 0..1, as in ComfyUI's Canny."""
    if low >= high:
        raise SettingError(
            f"The low threshold is {low} and the high one {high}. Make the high one the larger."
        )
    try:
        from kornia.filters import canny
    except ImportError as error:
        raise SettingError(
            "Canny edges need the package kornia, which ComfyUI lists among its requirements. "
            "Install it there (pip install kornia), or make the edges with another node."
        ) from error
    _, found = canny(rgb(picture).movedim(-1, 1), low_threshold=low, high_threshold=high)
    return found.movedim(1, -1).repeat(1, 1, 1, 3)


def depth(picture: Tensor, normalise: bool, invert: bool) -> Tensor:
    """A depth map in grey. Normalised, each map reaches from black to white; a flat one stays."""
    grey = rgb(picture).mean(dim=-1, keepdim=True)
    if normalise:
        low, high = grey.amin(dim=(1, 2, 3), keepdim=True), grey.amax(dim=(1, 2, 3), keepdim=True)
        grey = torch.where(high > low, (grey - low) / (high - low).clamp(min=1e-6), grey)
    return (1 - grey if invert else grey).repeat(1, 1, 1, 3)


def made_hint(picture: Tensor, control_type: str) -> Tensor:
    """The hint of a picture with usual settings; for depth the picture is the map."""
    if control_type == "blur":
        return blurred(picture, BLUR_RADIUS)
    if control_type == "canny":
        return edges(picture, *CANNY_THRESHOLDS)
    return depth(picture, normalise=True, invert=False)


def vae_input(hint: Tensor, kind: Kind, control_type: str | None, near: Near = NEAR[0]) -> Tensor:
    """What the VAE sees of a hint (B, H, W, 3) in 0..1; `near` says how depth maps come.

    SD3.5's depth ControlNets were trained with near dark. Large's canny ControlNet was trained
    on 127.5 a + 0.5, everything else on 2 a - 1 (Stability AI's reference).
    """
    if control_type == "canny" and kind == "8b":
        return 127.5 * hint + 0.5
    if control_type == "depth" and near == "near is bright":
        hint = 1 - hint
    return 2 * hint - 1
