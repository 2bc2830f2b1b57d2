"""Rules about prompts, text encoders and latents."""

from __future__ import annotations

from collections.abc import Iterator

from ...network.latent import LATENT_CHANNELS, PIXELS
from ..finding import Finding, error, note, warning
from ..setup import Setup

PIXELS_OF_A_PATCH = 2 * PIXELS
NEARLY = 0.02
"""Share of the megapixels by which a size may be off, as 1000x1000 is."""
CLIP_TOKENS = 77
"""What CLIP-L and CLIP-G were trained with."""
T5_TOKENS = 256
"""What SD3.5 was trained with; beyond it Medium's edges break (its model card)."""


def about_prompts(setup: Setup) -> Iterator[Finding]:
    model = setup.model
    for side, prompt in (("positive", setup.positive), ("negative", setup.negative)):
        if prompt is None:
            continue
        if not prompt.finite:
            yield error(
                "prompt numbers",
                f"The {side} prompt's encoding holds values that are not numbers, so the picture "
                "would be black. T5 in fp16 can do that; use a bf16 or fp8 file.",
            )
        if model and prompt.width and model.context_dim and prompt.width != model.context_dim:
            yield error(
                "prompt width",
                f"The {side} prompt's encoding is {prompt.width} wide, the model takes "
                f"{model.context_dim}: it was made by another model's CLIP. Encode it with the "
                "CLIP output of SD3.5 Loader.",
            )
        if prompt.pooled == 0:
            yield error(
                "pooled missing",
                f"The {side} prompt has no pooled text, which SD3.5 needs. Encode it with CLIP "
                "Text Encode from SD3.5 Loader's CLIP.",
            )
        elif model and prompt.pooled and model.pooled_dim and prompt.pooled != model.pooled_dim:
            yield error(
                "pooled width",
                f"The {side} prompt's pooled text is {prompt.pooled} wide, the model takes "
                f"{model.pooled_dim}. Encode it with the CLIP output of SD3.5 Loader.",
            )
        if prompt.tokens is not None and prompt.tokens > T5_TOKENS:
            yield warning(
                "long prompt",
                f"The {side} prompt has about {prompt.tokens} T5 tokens; SD3.5 was trained with "
                f"{T5_TOKENS}, beyond which edges break and the end is hardly read. Shorten it.",
            )
    positive = setup.positive
    if positive is not None and positive.pooled_is_zero:
        yield warning(
            "pooled empty",
            "The positive prompt's pooled text is all zeros (ConditioningZeroOut, or CLIP-L and "
            "CLIP-G left out), so the picture hardly follows it. Load CLIP-L and CLIP-G.",
        )
    if positive is not None and positive.text is not None and not positive.text.strip():
        yield warning("empty prompt", "The positive prompt is empty. Write what to draw.")


def about_encoders(setup: Setup) -> Iterator[Finding]:
    encoders = setup.encoders
    if encoders is None or not setup.is_sd3 or setup.nano:
        return
    if encoders.made_for != "sd3":
        yield error(
            "encoder type",
            f"The text encoders are combined for {encoders.made_for}, which gives a prompt that "
            "SD3.5 can't read. Set the loader's type to sd3.",
        )
    elif encoders.t5 and encoders.others is False:
        yield warning(
            "t5 alone",
            "T5 is the only text encoder, so the pooled text is empty and the picture hardly "
            "follows the prompt. Load CLIP-L and CLIP-G beside it.",
        )
    text = (setup.positive and setup.positive.text) or ""
    long = setup.positive is not None and (setup.positive.tokens or 0) > CLIP_TOKENS
    if encoders.made_for == "sd3" and encoders.t5 is False and (long or '"' in text):
        yield note(
            "t5 missing",
            f"There is no T5 among the text encoders, and the prompt "
            f"{'is long' if long else 'asks for letters'}: SD3.5 follows that less well without "
            "it. Load t5xxl (a file in fp8 will do), or shorten the prompt.",
        )


def about_latent(setup: Setup) -> Iterator[Finding]:
    latent = setup.latent
    if latent is None:
        return
    if latent.video and setup.is_sd3:
        yield error(
            "latent video",
            f"The latent comes from {latent.video}, which makes one for videos, with a dimension "
            "for time that SD3.5 does not take. Use EmptySD3LatentImage.",
        )
    if not latent.finite:
        yield error(
            "latent numbers",
            "The latent holds values that are not numbers, so the picture would be black. Look "
            "for the node that made it.",
        )
    if latent.channels not in (None, LATENT_CHANNELS) and not latent.empty:
        yield error(
            "latent channels",
            f"The latent has {latent.channels} channels, SD3.5's have {LATENT_CHANNELS}: it "
            "was encoded by another model's VAE. Encode the picture with SD3.5's.",
        )
    width, height = latent.width, latent.height
    if not width or not height:
        return
    rest = [side for side in (width, height) if side % PIXELS_OF_A_PATCH]
    if rest:
        near = [PIXELS_OF_A_PATCH * round(side / PIXELS_OF_A_PATCH) for side in (width, height)]
        yield warning(
            "size multiple",
            f"{width}x{height} is no multiple of {PIXELS_OF_A_PATCH}, so SD3.5 pads it and the "
            f"edge suffers. Use {near[0]}x{near[1]}.",
        )
    side = setup.model.positions * PIXELS_OF_A_PATCH if setup.model and setup.model.positions else 0
    if side and max(width, height) > side:
        yield error(
            "size table",
            f"{width}x{height} is larger than the model's position table, which ends at "
            f"{side}x{side}. Use a smaller latent, and enlarge the picture afterwards.",
        )
    elif setup.published:
        size, (least, most) = width * height / 2**20, setup.fits.megapixels
        if not least * (1 - NEARLY) <= size <= most * (1 + NEARLY):
            yield warning(
                "size",
                f"{width}x{height} is {size:.2f} megapixels; SD3.5 was made for {least:g} to "
                f"{most:g}, best near 1. {_SIZE_HELP[size > 1]}",
            )
    elif setup.nano:
        least, most = setup.fits.sides
        if not least <= min(width, height) <= max(width, height) <= most:
            yield warning(
                "size",
                f"{width}x{height}: the small model that comes with the pack draws {least:g}x"
                f"{least:g} well, up to {most:g} on a side, and little else. Use {least:g}x"
                f"{least:g}.",
            )


_SIZE_HELP = (
    "Use a larger latent, and shrink the picture afterwards.",
    "Use about 1024x1024, and enlarge the picture afterwards.",
)
