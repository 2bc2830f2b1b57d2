"""Rules about ControlNets."""

from __future__ import annotations

from collections.abc import Iterator

from ...network.config import VARIANTS
from ...sampling.recipes import RECIPES
from ..finding import Finding, error, note, warning
from ..setup import PUBLISHED_WIDTHS, Control, Setup

FAMILIES = {
    **{VARIANTS[name].hidden: RECIPES[name].name for name in ("sd3.5_medium", "sd3.5_large")},
    256: "the model that comes with the pack",
}
"""Width -> the models of it."""
CROPPED = 0.1
"""Share of a hint's longer side that is lost before it is worth a word."""


def about_controls(setup: Setup) -> Iterator[Finding]:
    if len(setup.controls) == 0:
        return
    hidden = setup.model.hidden if setup.model else None
    for control in setup.controls:
        what = f"{control.control_type or 'SD3.5'} ControlNet"
        if control.foreign:
            yield error(
                "control kind",
                f"The ControlNet is {control.foreign}, which can't steer SD3.5. Choose one of "
                "Stability AI's for SD3.5.",
            )
            continue
        if control.hidden and hidden and control.hidden != hidden:
            made, used = (
                FAMILIES.get(width, f"width {width}") for width in (control.hidden, hidden)
            )
            yield error(
                "control base",
                f"The {what} was made for {made}, but the model is {used}. Choose the ControlNet "
                f"made for this model, or load {made}.",
            )
        if control.by_stock_loader and control.hidden and control.hidden not in PUBLISHED_WIDTHS:
            yield error(
                "control loader",
                f"ComfyUI's own ControlNet loader ends in a size mismatch with a ControlNet "
                f"{control.hidden} wide: it knows the published ones alone. Load it with SD3.5 "
                "ControlNet Loader.",
            )
        if control.vae is False:
            yield error(
                "control vae",
                f"The {what} reads its picture through a VAE, and none is connected. Connect the "
                "VAE output of SD3.5 Loader to the node that applies it.",
            )
        strength, start, end = control.strength, control.start, control.end
        if strength == 0 or (start is not None and start == end):
            why = "its strength is 0" if strength == 0 else f"its window is {start:g} to {end:g}"
            yield note(
                "control off", f"The {what} does nothing: {why}. Set it, or remove the node."
            )
        elif start is not None and end is not None and start > end:
            yield error(
                "control window",
                f"The {what} starts at {start:g} and ends at {end:g}: no step lies between. Make "
                "end the larger.",
            )
        elif (
            start is not None
            and end is not None
            and setup.sigmas is not None
            and not setup.controlled(control)
        ):
            yield warning(
                "control steps",
                f"The {what} acts on none of the {len(setup.sigmas) - 1} steps: its window is "
                f"{start:g} to {end:g}. Widen it.",
            )
        if strength is not None and strength > setup.fits.control_strength:
            yield warning(
                "control strength",
                f"The strength of the {what} is {strength:g}; above 1 pictures break. Stability AI "
                "recommends 0.6 to 1.",
            )
        if control.blank:
            yield warning(
                "control blank",
                f"The picture for the {what} is one colour all over, so there is nothing to "
                "follow. Look at it with Preview Image; for canny, lower canny_low and canny_high.",
            )
        yield from _hint_shape(setup, control, what)
        if setup.turbo:
            yield note(
                "control turbo",
                f"The {what} was made for Large; on Large Turbo it is untried. If the picture "
                "breaks, load Large.",
            )
        if not control.on_both and setup.sampling.cfg not in (None, 1):
            yield note(
                "control one side",
                f"The {what} is on one of the two prompts alone: guidance then doubles its pull, "
                "and a step takes two calls. Use SD3.5 ControlNet Apply, which takes both.",
            )


def _hint_shape(setup: Setup, control: Control, what: str) -> Iterator[Finding]:
    latent = setup.latent
    if latent is None:
        return
    if control.hints and latent.batch and control.hints not in (1, latent.batch):
        yield error(
            "control batch",
            f"The {what} has {control.hints} pictures for {latent.batch} latents. Give it one, or "
            "one for each latent.",
        )
    if control.hint_size and latent.width and latent.height:
        width, height = control.hint_size
        apart = (width / height) / (latent.width / latent.height)
        if not 1 - CROPPED < apart < 1 / (1 - CROPPED):
            yield warning(
                "control shape",
                f"The picture for the {what} is {width}x{height}, the latent "
                f"{latent.width}x{latent.height}: it will be cropped to that shape. Make them "
                "alike if its edges matter.",
            )
