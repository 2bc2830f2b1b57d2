"""Rules about steps, cfg, shift, schedule and Skip Layer Guidance."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import SettingError
from ...sampling.guidance import SkipLayers, parse_layers
from ...sampling.recipes import MEDIUM_LAYERS, RECIPES, TURBO, layers_text
from ...sampling.schedules import acting_steps
from ..finding import Finding, error, note, warning
from ..setup import Setup, Skip

MOST_SKIPPED = 0.4
"""Share of the steps on which Skip Layer Guidance may act before it is worth a word."""


def about_sampling(setup: Setup) -> Iterator[Finding]:
    steps, cfg, shift = setup.sampling.steps, setup.sampling.cfg, setup.sampling.shift
    fits = setup.fits
    if setup.turbo:
        recipe = RECIPES[TURBO]
        if cfg is not None and cfg > fits.cfg[1]:
            yield warning(
                "turbo cfg",
                f"cfg is {cfg:g}, but Large Turbo was distilled to go without guidance: colours "
                f"burn, and every step takes twice the time. Set cfg to {recipe.cfg:g}.",
            )
        if steps is not None and steps > fits.steps[1]:
            yield warning(
                "turbo steps",
                f"steps is {steps}, but Large Turbo was made for {recipe.steps}: more take time "
                f"and don't improve the picture. Set steps to {recipe.steps}.",
            )
        if setup.skips:
            yield warning(
                "turbo slg",
                "Skip Layer Guidance was made for SD3.5 Medium; on Large Turbo, which goes "
                "without guidance, it spoils the picture. Remove the node.",
            )
    elif setup.published and setup.model is not None and setup.model.variant is not None:
        recipe = RECIPES[setup.model.variant]
        if steps is not None and steps < fits.steps[0]:
            yield warning(
                "few steps",
                f"steps is {steps}; {recipe.name} needs 20 or more ({recipe.steps} in its recipe), "
                f"and only Large Turbo makes pictures in 4. Set steps to {recipe.steps}.",
            )
        if cfg and cfg < fits.cfg[0]:
            yield warning(
                "low cfg",
                f"cfg is {cfg:g}, so the prompt hardly counts; only Large Turbo goes without "
                f"guidance. Set cfg to {recipe.cfg:g}.",
            )
    if cfg == 0:
        yield warning(
            "zero cfg",
            "cfg is 0, which leaves the negative prompt alone in the picture. Other programs call "
            "it 0 when there is no guidance; here that is 1. Set cfg to 1 for Large Turbo, and to "
            "3.5 to 5 for the others.",
        )
    if cfg is not None and cfg > fits.cfg[1] and not setup.turbo:
        yield warning(
            "high cfg",
            f"cfg is {cfg:g}: contrast and colours burn. SD3.5 was made for 3.5 to 5; lower it.",
        )
    sampler = setup.sampling.sampler
    if (
        cfg is not None
        and cfg > fits.cfg_pp
        and isinstance(sampler, str)
        and sampler.endswith("_cfg_pp")
    ):
        yield warning(
            "cfg of cfg++",
            f"The sampler {sampler} counts cfg on another scale: at {cfg:g} the picture burns. Set "
            f"cfg to 0.8 to 2, or take {sampler.removesuffix('_cfg_pp')}.",
        )
    if setup.published and shift is not None and not fits.shift[0] <= shift <= fits.shift[1]:
        yield warning(
            "shift",
            f"shift is {shift:g}, but SD3.5 was made for 3 (up to 6 for larger pictures). "
            "Set shift to 3.",
        )
    if setup.nano and shift is not None and shift > fits.shift[1]:
        yield warning(
            "shift",
            f"shift is {shift:g}, but the small model that comes with the pack was trained for 1. "
            "Set shift to 1.",
        )
    if setup.sampling.schedule in ("karras", "exponential", "polyexponential"):
        yield warning(
            "schedule",
            f"The schedule is {setup.sampling.schedule}, made for models with another range of "
            "noise: on SD3.5 it wastes most steps near the end. Use normal, simple, sgm_uniform "
            "or beta.",
        )
    negative = setup.negative.text if setup.negative else None
    if cfg == 1 and negative and negative.strip():
        yield note(
            "unused negative",
            "cfg is 1, so the negative prompt does nothing. Empty it, or raise cfg.",
        )
    if cfg not in (None, 1) and setup.same_prompts:
        yield warning(
            "same prompts",
            "The negative prompt is the positive one, so guidance cancels itself and cfg does "
            "nothing. Connect a negative prompt of its own; an empty one will do.",
        )


def about_denoise(setup: Setup) -> Iterator[Finding]:
    denoise, latent = setup.sampling.denoise, setup.latent
    if denoise is None or latent is None or latent.empty is None:
        return
    if denoise < 1 and latent.empty:
        yield warning(
            "denoise of nothing",
            f"denoise is {denoise:g}, but the latent is empty: that gives a grey blur. Set "
            "denoise to 1, or connect a picture through VAE Encode.",
        )
    if denoise == 1 and not (latent.empty or latent.masked or setup.upscaling):
        yield note(
            "denoise of all",
            "denoise is 1, so nothing of the picture in the latent is kept, only its size. Lower "
            "denoise (0.4 to 0.8) to keep some.",
        )


def about_skipped_layers(setup: Setup) -> Iterator[Finding]:
    depth = setup.model.depth if setup.model else None
    for skip in setup.skips:
        if skip.scale == 0 or not skip.layers.strip():
            yield note(
                "slg off",
                f"Skip Layer Guidance does nothing: its scale is {skip.scale:g} and its layers are "
                f"'{skip.layers}'. Set both, or remove the node.",
            )
            continue
        try:
            layers = parse_layers(skip.layers, depth)
        except SettingError as refused:
            yield error("slg layers", str(refused))
            continue
        if skip.start >= skip.end:
            yield error(
                "slg window",
                f"Skip Layer Guidance starts at {skip.start:g} and ends at {skip.end:g}: no step "
                "lies between. Make end the larger.",
            )
            continue
        yield from _skip_steps(setup, skip, layers)
        if (
            setup.model
            and setup.model.variant == "sd3.5_large"
            and layers <= MEDIUM_LAYERS.layers
            and not setup.turbo
        ):
            yield warning(
                "slg large",
                f"Layers {layers_text(layers)} are SD3.5 Medium's; on Large they "
                "do nothing good, and users report ruined pictures. Remove the node, or look for "
                "layers with SD3.5 Skip Layer Sweep.",
            )
        cfg = setup.sampling.cfg
        if cfg is not None and cfg > setup.fits.cfg_with_skips:
            yield warning(
                "slg cfg",
                f"cfg is {cfg:g} and Skip Layer Guidance adds to it; Medium was made for cfg 4 "
                "with it. Lower cfg.",
            )


def _skip_steps(setup: Setup, skip: Skip, layers: frozenset[int]) -> Iterator[Finding]:
    """On how many steps it fires."""
    steps = setup.sampling.steps
    if steps is None:
        return
    if skip.stock:
        if setup.sigmas is None:
            return
        window = (skip.start, skip.end, skip.frozen_shift)
        acting = len(acting_steps(setup.sigmas, *window, closed=True))
        if acting == 0 or acting > MOST_SKIPPED * steps:
            yield warning(
                "slg steps",
                f"ComfyUI's own skip-layer node goes by noise level: with {steps} steps of "
                f"{setup.sampling.schedule} it acts on {acting}. Use Skip Layer Guidance (SD3.5), "
                "which counts steps.",
            )
        return
    own = SkipLayers(layers, skip.scale, skip.start, skip.end)
    if not own.acting(steps):
        yield warning(
            "slg steps",
            f"Skip Layer Guidance acts on none of the {steps} steps: between {skip.start:g} and "
            f"{skip.end:g} of them lies no whole one. Raise end or steps.",
        )
