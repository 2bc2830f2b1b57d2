"""Pictures that a run draws itself: of the class before it, which it shall not forget (prior
preservation, Ruiz et al. 2022, arXiv:2208.12242), and samples on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.tensor_file import read_file, write_file
from ..encoders.autoencoder import Autoencoder
from ..encoders.text_encoder import Tokenize
from ..errors import CheckpointError, SettingError
from ..network.latent import from_model
from ..network.mmditx import MMDiTX
from ..pipeline import Pipeline, Settings
from ..sampling.recipes import RECIPES, recipe_of
from .config import CLASS, CLASS_MARK, TrainingConfig
from .dataset import PER_PICTURE, Examples, Size, tokens_of
from .trained import Trained, without_lora

ROWS, SIDE, BAND = 16, 4096, 16
"""Of the strip of samples: rows, pixels each way at most, and those above a row for its step."""


class Drawing(NamedTuple):
    """How a run draws: the text encoders and the VAE around a network; the class's caption, as
    examples of one picture have it; and the folder that keeps pictures of the class."""

    pipeline: Callable[[MMDiTX], Pipeline]
    caption: Examples
    folder: Path


def settings_of(config: TrainingConfig, variant: str, size: Size) -> Settings:
    """As the model in `start` was made to draw, where that is known."""
    recipe = RECIPES.get(recipe_of(variant, Path(config.start).name) or "")
    if recipe is None:
        return Settings(size=size)
    return Settings(
        recipe.steps, recipe.cfg, recipe.shift, recipe.sampler, recipe.schedule, size=size
    )


def own_drawing(
    config: TrainingConfig,
    model: Trained,
    vae: Autoencoder,
    tokenize: Tokenize,
    tokenize_t5: Tokenize | None,
) -> Drawing:
    """With text encoders and a VAE that are a run's own."""

    def around(network: MMDiTX) -> Pipeline:
        device = network.x_embedder.proj.weight.device
        return Pipeline(
            network, model.encoders, vae.to(device), tokenize, tokens=config.prompt_tokens,
            tokenize_t5=tokenize_t5,
        )  # fmt: skip

    caption = tokens_of([config.class_prompt], tokenize, tokenize_t5)
    return Drawing(around, caption, Path(config.output))


def sample_row(drawing: Drawing, model: Trained, config: TrainingConfig, size: Size) -> Any:
    """The captions of `samples`, drawn beside each other, each time from the same noise: a picture
    of Pillow's; size: (width, height) of one."""
    from PIL import Image

    captions = list(config.samples)
    pipeline = drawing.pipeline(model.diffusion_model)
    settings = settings_of(config, model.diffusion_model.config.variant, size)
    drawn = pipeline.draw(captions, list(range(len(captions))), settings)
    return Image.fromarray(torch.cat(drawn, dim=1).numpy())


def strip_of(folder: Path, step: int) -> Any:
    """The rows STEP.png of a folder up to a step, one below the other with their steps: a picture
    of Pillow's with ROWS rows and SIDE pixels each way at most. Of older ones fewer are shown."""
    from PIL import Image, ImageDraw

    steps = sorted(int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit())
    rows = []
    for each in thinned([each for each in steps if each <= step], ROWS):
        with suppress(OSError), Image.open(folder / f"{each:06}.png") as row:
            rows.append((each, row.convert("RGB")))
    width = max(row.width for _, row in rows)
    share = min(1.0, SIDE / width, (SIDE / len(rows) - BAND) / max(row.height for _, row in rows))
    sizes = [[max(1, int(share * side)) for side in row.size] for _, row in rows]
    whole = max(wide for wide, _ in sizes), sum(BAND + high for _, high in sizes)
    strip, top = Image.new("RGB", whole, "white"), 0
    for (each, row), (wide, high) in zip(rows, sizes):
        ImageDraw.Draw(strip).text((2, top + 2), f"step {each}", fill="black")
        strip.paste(row.resize((wide, high), Image.Resampling.LANCZOS), (0, top + BAND))
        top += BAND + high
    return strip


def thinned(steps: list[int], most: int) -> list[int]:
    """At most so many: the newer half as it is, of the older ones some, far apart, the first among
    them."""
    if len(steps) <= most:
        return steps
    newer = most // 2
    older, few = steps[:-newer], most - newer
    return [older[i * (len(older) - 1) // (few - 1)] for i in range(few)] + steps[-newer:]


def class_examples(
    drawing: Drawing,
    model: Trained,
    config: TrainingConfig,
    groups: Sequence[Examples],
    drawn: Callable[[int, int], None],
    interrupted: Callable[[], bool],
) -> Examples | None:
    """Pictures of the class by the base alone, in the shape that most of `groups` have; None where
    it is interrupted before all are drawn.

    Each is kept once it is drawn and not drawn again. `drawn` hears at every step how many of how
    many there are. Raises SettingError where the model draws no numbers.
    """
    shape = max(groups, key=lambda group: len(group["latents"]))["latents"].shape[1:]
    size = config.cell * shape[2], config.cell * shape[1]
    settings = settings_of(config, model.diffusion_model.config.variant, size)
    count = config.class_pictures
    about = f"{config.class_prompt} | {config.start} | {settings}"
    found = _kept(drawing.folder / CLASS, about, shape)
    pipeline = drawing.pipeline(model.diffusion_model)
    prompts = None
    while len(found) < count and not interrupted():
        prompts = prompts or pipeline.encode([config.class_prompt, settings.negative])
        noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(len(found)))
        said = partial(drawn, len(found), count)
        with without_lora(model):
            latent = pipeline.latents(noise, *prompts, settings, on_step=said)
        if not torch.isfinite(latent).all():
            raise SettingError(
                f"The model draws no numbers for the class '{config.class_prompt}' (picture "
                f"{len(found) + 1} of {count}), so there is nothing to preserve. Draw that prompt "
                "with the model alone; its file or the text encoders are damaged."
            )
        found = torch.cat([found, from_model(latent).half().cpu()])
        write_file(drawing.folder / CLASS, {"latents": found}, {CLASS_MARK: about})
        drawn(len(found), count)
    if len(found) < count:
        return None
    rows = {
        key: tensor.expand(count, *tensor.shape[1:]) if key in PER_PICTURE else tensor
        for key, tensor in drawing.caption.items()
    }
    return {"latents": found[:count], **rows}


def _kept(path: Path, about: str, shape: Sequence[int]) -> Tensor:
    """What an earlier run drew of the same; none where that is something else or damaged."""
    if path.exists():
        with suppress(CheckpointError):
            tensors, said = read_file(path)
            latents = tensors.get("latents", torch.empty(0))
            fits = latents.dtype == torch.float16 and latents.shape[1:] == tuple(shape)
            if fits and said.get(CLASS_MARK) == about:
                return latents
    return torch.empty(0, *shape, dtype=torch.float16)
