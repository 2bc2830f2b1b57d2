"""Text encoders and VAEs of loaders beside a model's, as SD3.5 Loader takes them."""

from __future__ import annotations

from ..checkpoint.tensor_file import SAFETENSORS
from ..network.latent import LATENT_CHANNELS
from .headers import encoder_in, vae_channels
from .known_nodes import TEXT_LOADERS
from .own_nodes import ENCODERS, NONE
from .reader import Reader


def encoders_beside(reader: Reader, key: str) -> dict[str, str] | None:
    """SD3's text encoders of a loader, by SD3.5 Loader's widgets; None where it may load something
    else, or load it otherwise."""
    kind = reader.kind(key)
    if kind != "TripleCLIPLoader" and reader.text(key, "type") != "sd3":
        return None
    if reader.text(key, "device") not in (None, "default"):
        return None
    found = dict.fromkeys(ENCODERS, NONE)
    for widget in TEXT_LOADERS[kind]:
        name = reader.text(key, widget) or ""
        encoder = encoder_named(reader, name)
        if encoder is None or found[encoder] != NONE:
            return None
        found[encoder] = name
    return found


def encoder_named(reader: Reader, name: str) -> str | None:
    """Which text encoder a file is, by what is in it; by its name where it is not at hand."""
    if not name.lower().endswith(SAFETENSORS):
        return None
    path = reader.file(("text_encoders",), name)
    if path is not None:
        return encoder_in(path)
    marks = {"t5": "t5xxl", "clip_g": "clip_g", "clip_l": "clip_l"}
    return next((encoder for mark, encoder in marks.items() if mark in name.lower()), None)


def vae_beside(reader: Reader, key: str) -> dict[str, str] | None:
    """The file of a VAE that fits SD3.5, by SD3.5 Loader's widget; None for another."""
    name = reader.text(key, "vae_name") or ""
    path = reader.file(("vae",), name)
    fits = vae_channels(path) == LATENT_CHANNELS if path else "sd3" in name.lower()
    return {"vae": name} if fits and name.lower().endswith(SAFETENSORS) else None
