"""What a sampler of a workflow starts from: latents, and pictures that it enlarges."""

from __future__ import annotations

from dataclasses import replace

from ..network.latent import LATENT_CHANNELS
from .graph import Budget, Graph, Link
from .known_nodes import EMPTY_LATENTS, SAMPLER_NODES, VIDEO_LATENTS
from .links import Links
from .own_nodes import UPSCALE, WHOLE_TABLE
from .setup import Latent, Upscaling


class Latents(Links):
    """Reads latents."""

    def __init__(self, graph: Graph, budget: Budget | None = None):
        super().__init__(graph, budget)
        self._latents: dict[Link, Latent | None] = {}

    def sampled(self, sampler: str) -> Latent | None:
        """The latent that a sampler gets; of an upscaler that of a tile."""
        if self.kind(sampler) != UPSCALE:
            return self.latent(self.link(sampler, "latent") or self.link(sampler, "latent_image"))
        tile = self.whole(sampler, "tile")
        return Latent(tile, tile, empty=False, masked=self.link(sampler, "mask") is not None)

    def upscaling(self, sampler: str) -> Upscaling | None:
        if self.kind(sampler) != UPSCALE:
            return None
        factor, longest = self.number(sampler, "factor"), self.whole(sampler, "longest_side")
        if not longest:
            before = self.decoded(self.link(sampler, "image"))
            longest = int(factor * before) if factor and before else None
        return Upscaling(
            factor,
            longest,
            self.whole(sampler, "tile"),
            self.whole(sampler, "overlap"),
            self.text(sampler, "positions") == WHOLE_TABLE,
        )

    def decoded(self, link: Link | None) -> int | None:
        """The longer side of the picture that a node decodes; None where that can't be told."""
        if link is None or not self.kind(link[0]).startswith("VAEDecode"):
            return None
        found = self.latent(self.link(link[0], "samples"))
        return max(found.width, found.height) if found and found.width and found.height else None

    def latent(self, link: Link | None) -> Latent | None:
        """Where the latent comes from; None where that can't be told."""
        names = ("samples", "latent", "latent_image")
        way: dict[Link, None] = {}
        while link is not None and link not in self._latents and link not in way:
            self.budget.spend()
            way[link] = None
            key = link[0]
            link = next((found for name in names if (found := self.link(key, name))), None)
        found = None if link is None else self._latents.get(link)
        for link in reversed(way):
            found = self._latents[link] = self._latent_from(link[0], found)
        return found

    def _latent_from(self, key: str, before: Latent | None) -> Latent | None:
        """What a node makes of the latent before it."""
        kind = self.kind(key)
        width, height = (self.whole(key, side) for side in ("width", "height"))
        if kind in EMPTY_LATENTS:
            batch = self.whole(key, "batch_size") or 1
            return Latent(width, height, batch, EMPTY_LATENTS[kind], empty=True)
        if kind in VIDEO_LATENTS:
            return Latent(width, height, empty=True, video=kind)
        if kind in ("VAEEncode", "VAEEncodeTiled"):
            return Latent(empty=False)
        if kind in ("VAEEncodeForInpaint", "InpaintModelConditioning"):
            return Latent(empty=False, masked=True)
        if before is None:
            return Latent(empty=False) if kind in SAMPLER_NODES else None
        if kind == "SetLatentNoiseMask":
            return replace(before, masked=True)
        if kind in SAMPLER_NODES:
            return replace(before, empty=False, channels=LATENT_CHANNELS)
        if kind == "LatentUpscale":
            return replace(before, width=width, height=height)
        return replace(before, width=None, height=None, batch=None, empty=None)
