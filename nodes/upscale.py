"""SD35Upscale: a picture redrawn larger, in tiles that are drawn together."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..sd35_core.encoders import hints
from ..sd35_core.errors import SettingError
from ..sd35_core.network.latent import PIXELS
from ..sd35_core.sampling.schedules import make_sigmas
from ..sd35_core.sampling.tiles import tiling
from ..sd35_core.workflow.own_nodes import NAMES, OWN_TABLE, WHOLE_TABLE
from .host import sampling
from .host.controlnet import check_controls, check_table, from_loader, steered
from .host.report import progress, told
from .host.tiles import AtOnce, decoded_in_tiles, encoded_in_tiles, enlarged, with_tiles
from .sampler import SD35Sampler

LARGEST = 16384
"""Pixels of the larger picture's longer side, at most."""


class SD35Upscale(io.ComfyNode):
    """Enlarges a picture and draws its details anew."""

    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def define_schema(cls) -> io.Schema:
        known = {each.id: each for each in SD35Sampler.define_schema().inputs}
        return io.Schema(
            node_id="SD35Upscale",
            display_name=NAMES["SD35Upscale"],
            category="SD3.5",
            description="Makes a picture larger and draws its details anew, in tiles that are "
            "drawn together, so that there are no seams. SD3.5's blur ControlNet keeps it "
            "faithful.",
            inputs=[
                known["model"],
                known["positive"],
                known["negative"],
                io.Vae.Input("vae", tooltip="SD3.5's VAE."),
                io.Image.Input("image", tooltip="What to enlarge."),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="SD3.5's blur ControlNet, from SD3.5 ControlNet Loader.",
                ),
                known["seed"],
                io.Float.Input(
                    "factor",
                    default=2.0,
                    min=1.0,
                    max=8.0,
                    step=0.05,
                    tooltip="How many times as wide and as high.",
                ),
                io.Int.Input(
                    "longest_side",
                    default=0,
                    min=0,
                    max=LARGEST,
                    step=8,
                    advanced=True,
                    tooltip="Pixels of the larger picture's longer side, in place of factor. 0: "
                    "factor counts.",
                ),
                io.Int.Input(
                    "tile",
                    default=1024,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Width and height of what the model draws at once, in pixels. SD3.5: "
                    "1024. sd35_nano: 128.",
                ),
                io.Int.Input(
                    "overlap",
                    default=128,
                    min=0,
                    max=1024,
                    step=16,
                    tooltip="Pixels that neighbouring tiles share, at least; an eighth of the tile "
                    "or more.",
                ),
                io.Float.Input(
                    "denoise",
                    default=0.4,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much is drawn anew. Without ControlNet 0.2 to 0.4; with it up to "
                    "1, which invents the most.",
                ),
                io.Int.Input(
                    "steps",
                    default=30,
                    min=1,
                    max=1000,
                    tooltip="Steps of the sampler, all within what denoise leaves.",
                ),
                known["cfg"],
                known["shift"],
                known["sampler"],
                known["schedule"],
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Of the ControlNet: how faithful to stay.",
                ),
                io.Float.Input(
                    "end",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the way at which the ControlNet ends; the rest are details.",
                ),
                io.Float.Input(
                    "blur",
                    default=8.0,
                    min=0.0,
                    max=200.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Blur alone: how soft the ControlNet sees the enlarged picture, in "
                    "pixels of a tile of 1024.",
                ),
                io.Combo.Input(
                    "positions",
                    options=[OWN_TABLE, WHOLE_TABLE],
                    advanced=True,
                    tooltip="own: each tile is a picture by itself. of the whole: it knows its "
                    "place, up to 3072 pixels with Large and 6144 with Medium.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White is drawn anew; black is enlarged and left as it is.",
                ),
                io.Sampler.Input(
                    "custom_sampler",
                    optional=True,
                    tooltip="Any node's SAMPLER, in place of the widget's.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Any node's SIGMAS, in place of steps, shift's curve, schedule and "
                    "denoise.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The larger picture.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        image: Any,
        seed: int,
        factor: float,
        tile: int,
        overlap: int,
        denoise: float,
        steps: int,
        cfg: float,
        shift: float,
        sampler: str,
        schedule: str,
        strength: float,
        end: float,
        blur: float,
        positions: str,
        longest_side: int = 0,
        control_net: Any = None,
        mask: Any = None,
        custom_sampler: Any = None,
        sigmas: Any = None,
    ) -> io.NodeOutput:
        image = hints.rgb(image)
        height, width = larger(image.shape[1], image.shape[2], factor, longest_side)
        plain = enlarged(image, height, width)
        whole = padded(plain.movedim(-1, 1)).movedim(1, -1)
        cells = (whole.shape[1] // PIXELS, whole.shape[2] // PIXELS)
        tiles = tiling(cells, tile // PIXELS, overlap // PIXELS)
        at_once = AtOnce(len(tiles))
        if sigmas is None:
            sigmas = make_sigmas(steps, shift, schedule, denoise)
        if control_net is not None and strength > 0 and end > 0:
            hint = hint_of_enlarged(whole, from_loader(control_net).config.control_type, blur, tile)
            prompts, window = (positive, negative), (0.0, end)
            positive, negative = steered(prompts, control_net, vae, hint, strength, window)
        if len(tiles) > 1:
            check_controls(positive, negative)
        if positions == WHOLE_TABLE:
            check_table(model)
        latent = {"samples": encoded_in_tiles(vae, whole, tiles, progress())}
        if mask is not None:
            mask = enlarged_mask(mask, height, width)
            latent["noise_mask"] = padded(mask[:, None])
        shifted = sampling.with_shift(model, shift)
        tiled = with_tiles(shifted, tiles, at_once, positions == WHOLE_TABLE)
        chosen = sampler if custom_sampler is None else custom_sampler
        drawn = sampling.sample(tiled, positive, negative, latent, seed, cfg, chosen, sigmas)
        picture = decoded_in_tiles(vae, drawn["samples"], tiles, progress())[:, :height, :width]
        if mask is not None:
            picture = plain + mask[..., None] * (picture - plain)
        said = (
            f"{width}x{height} from {image.shape[2]}x{image.shape[1]} in {len(tiles)} "
            f"{'tile' if len(tiles) == 1 else 'tiles'} of {tiles.size[1] * PIXELS}x"
            f"{tiles.size[0] * PIXELS}, {len(sigmas) - 1} steps. {at_once.said}".strip()
        )
        return io.NodeOutput(picture, ui=told(said, cls.hidden.unique_id))


def larger(height: int, width: int, factor: float, longest_side: int) -> tuple[int, int]:
    """The size of the larger picture. Raises SettingError for one that is smaller, or too large."""
    if longest_side:
        factor = longest_side / max(height, width)
    found = round(height * factor), round(width * factor)
    if factor < 1:
        raise SettingError(
            f"longest_side is {longest_side}, and the picture is {width}x{height} already. Make it "
            f"at least {max(height, width)}, or 0 to have factor count."
        )
    if max(found) > LARGEST:
        raise SettingError(
            f"The picture would become {found[1]}x{found[0]}; {LARGEST} pixels a side are the "
            "most. Make factor smaller."
        )
    return found


def enlarged_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A MASK (B, h, w), or (h, w), at the picture's size: (B, H, W) in 0..1."""
    rows = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    scaled = torch.nn.functional.interpolate(rows, (height, width), mode="bilinear")
    return scaled[:, 0].clamp(0, 1)


def padded(x: Tensor) -> Tensor:
    """(B, C, H, W) with its last rows and columns repeated up to whole patches."""
    down, across = (-side % (2 * PIXELS) for side in x.shape[2:])
    return torch.nn.functional.pad(x, (0, across, 0, down), mode="replicate")


def hint_of_enlarged(large: Tensor, control_type: str | None, blur: float, tile: int) -> Tensor:
    """What the ControlNet gets of the enlarged picture, made of the whole, so that tiles have no
    edge in it. Depth can't be made of a picture."""
    if control_type == "blur":
        return hints.blurred(large, blur * tile / max(large.shape[1:3]))
    if control_type == "canny":
        return hints.edges(large, *hints.CANNY_THRESHOLDS)
    raise SettingError(
        f"The ControlNet is for {control_type or 'an unknown kind of hint'}, which can't be made "
        "of a picture here. Use SD3.5's blur ControlNet, or none."
    )
