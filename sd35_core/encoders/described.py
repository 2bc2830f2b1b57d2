"""The text encoders of a small model's file, as the file describes them: CLIP-L and CLIP-G, and T5
where it has one."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checkpoint.layouts import under
from ..checkpoint.loading import check_tensors, fill, shapes_of
from ..checkpoint.tensor_file import Tensors
from ..errors import CheckpointError
from ..limits import DESCRIPTION, TEXT_HEADS, TEXT_LAYERS, TEXT_WIDTH, bounded, counted
from .t5 import T5Config, T5Encoder
from .text_encoder import KINDS, ClipConfig, ClipTextModel

EncoderConfig = ClipConfig | T5Config
Encoder = ClipTextModel | T5Encoder

T5 = "t5xxl"
"""What T5 is called in SD3.5's files, whatever its size."""
SIZES = {
    **dict.fromkeys(KINDS, ("hidden_size", "num_attention_heads", "num_hidden_layers")),
    T5: ("d_model", "num_heads", "num_layers"),
}
"""Encoder -> what its width, heads and layers are called."""
LIMITS = (TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS)
SAVED = "text_encoders.sd35_config"
"""The tensor of a file that holds its description as bytes: hosts that save a model keep tensors,
and no metadata."""
PROJECTION = "text_projection.weight"
"""Of CLIP-G's summary; other files of CLIP-L do without."""


def saved_description(configs: Mapping[str, EncoderConfig]) -> Tensor:
    """The bytes of `SAVED`, uint8 (N,)."""
    sizes = {name: dict(zip(SIZES[name], config.size)) for name, config in configs.items()}
    return torch.tensor(list(json.dumps({"text_encoders": sizes}).encode()), dtype=torch.uint8)


def encoder_configs(
    metadata: Mapping[str, str], source: str, saved: Tensor | None = None
) -> dict[str, EncoderConfig]:
    """How a small model's text encoders are built, from its file's metadata or its `SAVED`.

    Raises CheckpointError when that says nothing of them, or sizes beyond `limits`.
    """
    try:
        text = metadata.get("sd35_config", "{}")
        if "sd35_config" not in metadata and saved is not None and saved.dtype == torch.uint8:
            bounded(DESCRIPTION, saved.numel(), f"'{source}'")
            text = bytes(saved.flatten().tolist()).decode()
        described = json.loads(text).get("text_encoders", {})
        sizes = {name: tuple(described[name][size] for size in SIZES[name]) for name in described}
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        sizes = {}
    if not sizes.keys() >= KINDS.keys():
        asked = ", ".join(SIZES["clip_l"])
        raise CheckpointError(
            f"'{source}' does not say in its metadata 'sd35_config' how its text encoders are "
            f"built: it describes {', '.join(sizes) or 'none'}, needed are {' and '.join(KINDS)}, "
            f"each with {asked}. Use the file as it came."
        )
    configs: dict[str, EncoderConfig] = {}
    for name in (name for name in SIZES if name in sizes):
        said = f"'{source}', 'sd35_config' of {name}"
        width, heads, layers = (bounded(limit, n, said) for limit, n in zip(LIMITS, sizes[name]))
        if width % heads:
            raise CheckpointError(
                f"{said}: {heads} heads can't share a width of {width} evenly. Use the file as it "
                "came."
            )
        configs[name] = KINDS.get(name, T5Config)(width, heads, layers)
    return configs


def built(config: EncoderConfig) -> Encoder:
    """An encoder of that configuration."""
    return T5Encoder(config) if isinstance(config, T5Config) else ClipTextModel(config)


def check_encoder(tensors: Mapping[str, Tensor], config: EncoderConfig, source: str) -> None:
    """Raise CheckpointError unless the tensors, under Hugging Face's keys, are an encoder's of this
    configuration. What a configuration alone asks for is never built."""
    blocks = "encoder.block" if isinstance(config, T5Config) else "text_model.encoder.layers"
    layers, described = counted(tensors, blocks, TEXT_LAYERS, source), config.size[2]
    if layers != described:
        raise CheckpointError(
            f"{source} has {layers} layers, the metadata 'sd35_config' describes {described}. Use "
            "the file as it came."
        )
    with torch.device("meta"):
        expected = dict(shapes_of(built(config).state_dict()))
    if isinstance(config, ClipConfig) and not config.projected and PROJECTION not in tensors:
        del expected[PROJECTION]
    check_tensors(tensors, expected, "text encoder as 'sd35_config' describes it", source)


def load_encoders(file: Tensors) -> dict[str, Encoder]:
    """The text encoders of a small model's file, in fp32, not for training.

    Raises CheckpointError for a file without them.
    """
    encoders: dict[str, Encoder] = {}
    name = file.path.name
    for kind, config in encoder_configs(file.metadata, name, file.get(SAVED)).items():
        tensors = under(file, f"text_encoders.{kind}.transformer.")
        check_encoder(tensors, config, f"The text encoder {kind} in '{name}'")
        encoder: nn.Module = built(config).requires_grad_(False).eval()
        fill(encoder, tensors, name, f"the text encoder {kind}")
        encoders[kind] = encoder
    return encoders
