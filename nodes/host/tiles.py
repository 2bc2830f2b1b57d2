"""Tiles in the host's sampling: at every step all tiles of a large latent are predicted, as many at
once as memory allows, and their predictions blended into one.

A CALC_COND_BATCH wrapper stands between the guidance and the network, so whatever acts there (cfg,
Skip Layer Guidance, step cache, samplers, masks) sees one large latent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...sd35_core.errors import is_out_of_memory
from ...sd35_core.network.latent import PIXELS
from ...sd35_core.sampling.tiles import Tiling
from .network import TILES, TilesOfBatch, TransformerOptions
from .report import log

Cond = dict[str, Any]
MOST_CELLS = 2**18
"""Of a latent, in one batch: 16 tiles of 1024 pixels. More is no faster, and a person who cancels
would wait for it."""


def with_tiles(model: Any, tiling: Tiling, at_once: AtOnce, whole_table: bool = False) -> Any:
    """A clone of MODEL that samples latents of the tiling's size, tile by tile in every step.

    whole_table: whether a tile's positions are its place in the whole picture.
    """
    tiled = model.clone()
    weights_on = cache(tiling.weights.to)  # carried to a device once, not in every step
    prompts = Prompts(tiling)

    def run(
        executor: Any,
        model: Any,
        conds: list[Any],
        x: Tensor,
        sigma: Tensor,
        options: TransformerOptions,
    ) -> list[Tensor]:
        rows = len(x)
        parts: list[list[Tensor]] = [[] for _ in conds]
        number = 0
        while number < len(tiling):
            count = 1 if any(map(has_place, conds)) else at_once.tiles(model, conds, x, tiling)
            numbers = tuple(range(number, min(number + count, len(tiling))))
            transformer = {
                **options.get("transformer_options", {}),
                TILES: TilesOfBatch(tiling, numbers, rows, whole_table),
            }
            comfy.model_management.throw_exception_if_processing_interrupted()
            made = None
            try:
                made = executor(
                    model,
                    [prompts.of_tile(cond, numbers[0], x.device) for cond in conds],
                    torch.cat([tiling.cut(x, n) for n in numbers]),
                    sigma.repeat(len(numbers)),
                    {**options, "transformer_options": transformer},
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(numbers) == 1:
                    raise
            if made is None:  # what the error held is free by now
                at_once.fewer(len(numbers))
                continue
            for part, out in zip(parts, made):
                part += out.split(rows)
            number = numbers[-1] + 1
        return [tiling.blended(part, weights_on(x.device)) for part in parts]

    if len(tiling) > 1 or whole_table:
        tiled.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, TILES, run)
    return tiled


class AtOnce:
    """How many tiles go into one batch: as many as the host has memory for, and fewer once it ran
    out."""

    def __init__(self, most: int):
        self.most = most
        self.said = ""
        """For the person at the canvas, where it ran out."""

    def tiles(self, model: Any, conds: list[Any], x: Tensor, tiling: Tiling) -> int:
        """As the host reckons for the prompts of a batch (comfy/samplers.py)."""
        rows = len(x) * sum(len(cond or ()) for cond in conds)
        free = model.current_patcher.get_free_memory(x.device)
        cells = tiling.size[0] * tiling.size[1]
        count = max(1, min(self.most, MOST_CELLS // (rows * cells)))
        while (
            count > 1
            and model.memory_required([count * rows, x.shape[1], *tiling.size]) * 1.5 > free
        ):
            count -= 1
        return count

    def fewer(self, than: int) -> None:
        self.most = max(1, than // 2)
        comfy.model_management.soft_empty_cache()
        self.said = f"Out of memory with {than} tiles at once; went on with {self.most}."
        log.warning(self.said)


def has_place(conds: list[Cond] | None) -> bool:
    """Whether prompts act on a part of the picture alone."""
    return any("area" in cond or "mask" in cond for cond in conds or ())


class Prompts:
    """The prompts of each tile, made once: whether a mask reaches a tile only its device knows, and
    asking that in every step would have a card wait."""

    def __init__(self, tiling: Tiling):
        self.tiling = tiling
        self.known: dict[tuple[int, int], tuple[Cond, Cond | None]] = {}

    def of_tile(self, conds: list[Cond] | None, number: int, device: Any) -> list[Cond] | None:
        """Those that act on a tile, each with a mask where it acts on a part of it; the first one,
        everywhere, where none does."""
        if not conds or not has_place(conds):
            return conds
        placed = (self.placed(each, number, device) for each in conds)
        found = [cond for cond in placed if cond is not None]
        return found or [{k: v for k, v in conds[0].items() if k not in ("area", "mask")}]

    def placed(self, cond: Cond, number: int, device: Any) -> Cond | None:
        """A prompt with its place in a tile; None where it does not reach it."""
        key = id(cond), number
        if key not in self.known:  # with the prompt itself, so that its id stays its own
            self.known[key] = cond, placed(cond, self.tiling, number, device)
        return self.known[key][1]


def placed(cond: Cond, tiling: Tiling, number: int, device: Any) -> Cond | None:
    """A prompt with its area and mask as one mask of a tile, on the device that samples; None where
    it does not reach it."""
    acts = torch.ones(1, *tiling.whole)
    if "area" in cond:
        *size, top, left = cond["area"][-4:]
        acts.zero_()[:, top : top + size[0], left : left + size[1]] = 1
    acts = acts.to(device)
    if "mask" in cond:
        acts = acts * cond["mask"].to(acts)
    mask = tiling.cut(acts, number)
    if not mask.any():
        return None
    return {**{k: v for k, v in cond.items() if k not in ("area", "mask")}, "mask": mask}


def enlarged(image: Tensor, height: int, width: int) -> Tensor:
    """A picture (B, H, W, 3) at another size, by Lanczos."""
    if image.shape[1:3] == (height, width):
        return image
    scaled = comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "lanczos", "disabled")
    return scaled.movedim(1, -1).clamp(0, 1)


Progress = Callable[[int, int], None]
"""(tiles done, tiles in all)."""


def encoded_in_tiles(vae: Any, pixels: Tensor, tiling: Tiling, show: Progress) -> Tensor:
    """VAE latents of a picture (B, H, W, 3), made tile by tile and blended: (B, 16, H/8, W/8)."""
    tiles = []
    for number, part in enumerate(parts_of_picture(pixels, tiling)):
        tiles.append(vae.encode(part))
        show(number + 1, len(tiling))
    return tiling.blended(tiles)


def decoded_in_tiles(vae: Any, latent: Tensor, tiling: Tiling, show: Progress) -> Tensor:
    """The picture (B, H, W, 3) of a latent, made tile by tile and blended."""
    tiles = []
    for number in range(len(tiling)):
        tiles.append(vae.decode(tiling.cut(latent, number).contiguous()).movedim(-1, 1))
        show(number + 1, len(tiling))
    return in_pixels(tiling).blended(tiles).movedim(1, -1)


def parts_of_picture(pixels: Tensor, tiling: Tiling) -> list[Tensor]:
    """What each tile of a latent shows of its picture (B, H, W, C)."""
    within = in_pixels(tiling)
    return [within.cut(pixels.movedim(-1, 1), n).movedim(1, -1) for n in range(len(tiling))]


def in_pixels(tiling: Tiling) -> Tiling:
    """The same tiles, counted in pixels."""

    def times(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(PIXELS * value for value in values)

    whole, size = times(tiling.whole), times(tiling.size)
    return Tiling(
        (whole[0], whole[1]), (size[0], size[1]), times(tiling.rows), times(tiling.columns)
    )
