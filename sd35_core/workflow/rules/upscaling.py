"""Rules about enlarging a picture in tiles."""

from __future__ import annotations

from collections.abc import Iterator

from ..finding import Finding, error, note, warning
from ..own_nodes import OWN_TABLE, WHOLE_TABLE
from ..setup import Setup
from .inputs import PIXELS_OF_A_PATCH

LEAST_OVERLAP = 1 / 16
"""Share of a tile; below it neighbours see too little of each other to agree."""
FREE_DENOISE = 0.5
"""From here on a picture without a ControlNet becomes another one."""


def about_upscaling(setup: Setup) -> Iterator[Finding]:
    found = setup.upscaling
    if found is None:
        return
    tile, overlap, denoise = found.tile, found.overlap, setup.sampling.denoise
    if tile and overlap is not None and overlap > tile - 16:
        yield error(
            "upscale overlap",
            f"The overlap is {overlap} pixels of a tile of {tile}, so the tiles never get on. Make "
            f"it about {tile // 8}.",
        )
    elif tile and overlap is not None and overlap < LEAST_OVERLAP * tile:
        yield warning(
            "upscale overlap",
            f"Tiles of {tile} pixels overlap by {overlap} alone, so their borders may show. Make "
            f"the overlap about {tile // 8}.",
        )
    patches = setup.model.positions if setup.model else None
    side = (patches or 0) * PIXELS_OF_A_PATCH
    if side and found.whole_table and found.longest and found.longest > side:
        yield error(
            "upscale table",
            f"The picture becomes {found.longest} pixels long, and with positions '{WHOLE_TABLE}' "
            f"the model's table ends at {side}. Set positions to '{OWN_TABLE}', or make the "
            "factor smaller.",
        )
    acting = [c for c in setup.controls if c.foreign is None and c.strength != 0]
    kinds = [control.control_type for control in acting if control.of_the_sampler]
    if any(c.by_stock_loader and not c.of_the_sampler for c in acting):
        yield error(
            "upscale loader",
            "A ControlNet on the prompts comes from ComfyUI's own loader, which would steer every "
            "tile by the whole picture. Load it with SD3.5 ControlNet Loader.",
        )
    if denoise is not None and denoise > FREE_DENOISE and not acting:
        yield warning(
            "upscale denoise",
            f"denoise is {denoise:g} without a ControlNet: the picture becomes another one, with "
            "the prompt's things in every tile. Lower it to 0.2 to 0.4, or connect SD3.5's blur "
            "ControlNet.",
        )
    if "depth" in kinds:
        yield error(
            "upscale control",
            "A depth ControlNet needs a depth map, which SD3.5 Upscale does not make. Connect the "
            "blur ControlNet.",
        )
    elif "canny" in kinds:
        yield note(
            "upscale control",
            "The canny ControlNet keeps lines and lets colours drift. For enlarging Stability AI "
            "made the blur ControlNet.",
        )
