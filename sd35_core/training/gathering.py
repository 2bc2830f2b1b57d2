"""The examples of a run: read from a folder or files, held against the model, and parted."""

from __future__ import annotations

from pathlib import Path

from ..encoders.autoencoder import Autoencoder
from ..encoders.text_encoder import Tokenize
from ..errors import SettingError
from .config import TrainingConfig
from .dataset import Examples, captions_in, parted, read_examples_file, read_folder
from .prompts import check_encoded


def gather_examples(
    config: TrainingConfig,
    vae: Autoencoder | None,
    tokenize: Tokenize | None,
    tokenize_t5: Tokenize | None,
) -> tuple[list[Examples], list[str]]:
    """One group per size, and the captions where they are at hand."""
    if config.examples:
        return [read_examples_file(path) for path in config.examples], []
    assert vae is not None and tokenize is not None, "read_config sees to it"
    folder = Path(config.images)
    groups = read_folder(
        folder, list(config.sizes), vae, tokenize, config.controlnet, tokenize_t5
    )  # fmt: skip
    return groups, captions_in(folder)


def check_examples(groups: list[Examples], config: TrainingConfig, pooled_dim: int) -> None:
    """Raise SettingError unless a model of that configuration can learn from them."""
    for group in groups:
        if "context" in group:
            check_encoded(group, config.context_dim, pooled_dim)
        elif config.lora_rank and not config.text_encoders:
            raise SettingError(
                "The examples have tokens and no encoded captions: a LoRA on them needs the key "
                "'text_encoders'."
            )
        elif config.t5xxl and "tokens_t5" not in group:
            raise SettingError("The examples have no tokens for T5 to read (tokens_t5).")
    if config.controlnet and any("hints" not in group for group in groups):
        raise SettingError("The examples have no hints to train a ControlNet with.")
    cells = config.patch * config.pos_embed_max_size
    largest = max(max(group["latents"].shape[2:]) for group in groups)
    if largest > cells:
        raise SettingError(
            f"A picture is {config.cell * largest} pixels wide or high, but "
            f"pos_embed_max_size {config.pos_embed_max_size} allows {config.cell * cells}."
        )


def held_out(
    groups: list[Examples], config: TrainingConfig
) -> tuple[list[Examples], list[Examples]]:
    """Those to learn from, and those to judge by: none where nothing is held out."""
    if not config.held_out:
        return groups, []
    parts = [parted(group, config.held_out, config.seed) for group in groups]
    return [learned for learned, _ in parts], [judged for _, judged in parts]
