"""What a sampler's files take in memory: model, text encoders, VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.sizes import Weights
from .graph import Budget, Graph
from .headers import vae_channels, vae_in, weights_under
from .known_nodes import CHECKPOINT_LOADER, GGUF_LOADER, LOADERS, NO_FILE, TEXT_LOADERS
from .latents import Latents
from .own_nodes import ENCODERS, FROM_MODEL, LOADER, NONE, T5, UPSCALE
from .setup import Encoders, Model, Vae

FindFile = Callable[[str, str], "Path | None"]
"""(folder, name) -> the file that a widget names."""


class Holdings(Latents):
    """Reads the files around the network; `find_file` finds those that widgets name."""

    def __init__(self, graph: Graph, find_file: FindFile, budget: Budget | None = None):
        super().__init__(graph, budget)
        self.find_file = cache(find_file)

    def file(self, folders: tuple[str, ...], name: Any) -> Path | None:
        if not isinstance(name, str) or name in NO_FILE:
            return None
        return next((path for folder in folders if (path := self.find_file(folder, name))), None)

    def as_loaded(self, loader: str, model: Model) -> Weights | None:
        """A model's weights as its loader keeps them; None where its file is not at hand."""
        weights = model.weights
        if weights is None:
            return None
        if self.kind(loader) == GGUF_LOADER:
            return weights.unpacked_at_use()
        if (self.text(loader, "weight_dtype") or "").startswith("fp8"):
            weights = weights.cast_to_8_bits()
        published = model.own and model.variant and model.positions
        return weights.with_axes(model.positions or 1) if published else weights

    def weighed(self, encoders: Encoders, loader: str) -> Encoders:
        """Text encoders with their bytes, where all files are at hand."""
        found: dict[str, Weights] = {}
        of_model = self.kind(loader) == CHECKPOINT_LOADER
        for widget in ENCODERS if of_model else TEXT_LOADERS[self.kind(loader)]:
            name = FROM_MODEL if of_model else self.value(loader, widget)
            if name == NONE:
                continue
            if name == FROM_MODEL:
                path = self.model_file(loader)
                weights = path and weights_under(path, f"text_encoders.{widget}.")
                if path and not weights:
                    continue  # it has none of that kind
            else:
                path = self.file(("text_encoders",), name)
                weights = path and weights_under(path)
            if not weights:
                return encoders
            found[T5 if "t5" in f"{widget} {name}".lower() else widget] = weights
        return replace(
            encoders,
            weights=sum(weights.whole for weights in found.values()),
            t5_weights=found.get(T5, Weights()).whole,
            largest=max((weights.largest for weights in found.values()), default=0),
        )

    def model_file(self, loader: str) -> Path | None:
        """The file that a loader of models names."""
        widget, folders = LOADERS.get(self.kind(loader), ("", ()))
        return self.file(folders, self.value(loader, widget)) if widget else None

    def vae_held(self, sampler: str) -> Vae | None:
        """The VAE that decodes what a sampler gives; None where it is not at hand."""
        decoder = self.decoder(sampler)
        link = self.link(decoder, "vae") if decoder else None
        if decoder is None or link is None:
            return None
        name = self.value(link[0], "vae", "vae_name")
        of_model = name == FROM_MODEL or self.kind(link[0]) == CHECKPOINT_LOADER
        path = self.model_file(link[0]) if of_model else self.file(("vae",), name)
        found = path and vae_in(path, "first_stage_model." if of_model else "")
        tiled = self.kind(decoder) in (UPSCALE, "VAEDecodeTiled")
        return replace(found, tiled=tiled) if found else None

    def vae(self, sampler: str) -> int | None:
        """The channels of the VAE that decodes what a sampler gives."""
        decoder = self.decoder(sampler)
        return None if decoder is None else self.vae_of(decoder)

    def vae_name(self, sampler: str) -> str | None:
        """The file of the VAE that decodes what a sampler gives."""
        decoder = self.decoder(sampler)
        link = self.link(decoder, "vae") if decoder else None
        name = self.value(link[0], "vae", "vae_name") if link else None
        return name if isinstance(name, str) and name not in NO_FILE else None

    def decoder(self, sampler: str) -> str | None:
        """The node that decodes what a sampler gives, the sampler itself where it has a VAE."""
        return sampler if "vae" in self.graph[sampler]["inputs"] else self._decoders.get(sampler)

    @cached_property
    def _decoders(self) -> dict[str, str]:
        """Sampler -> the first node that decodes what it gives."""
        found: dict[str, str] = {}
        for key, node in self.graph.items():
            if node["class_type"].startswith("VAEDecode"):
                samples = self.link(key, "samples")
                if samples:
                    found.setdefault(samples[0], key)
        return found

    def vae_of(self, key: str) -> int | None:
        """0 for none at all, None where it can't be told."""
        link = self.link(key, "vae")
        if link is None:
            return 0
        if self.kind(link[0]) == LOADER and self.value(link[0], "vae") == NONE:
            return 0
        name = self.value(link[0], "vae", "vae_name")
        path = self.file(("vae",), name)
        return vae_channels(path) if path else None
