"""SD3.5's ControlNets as the host's CONTROL_NET objects, which every node of the host can use."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ...sd35_core.checkpoint.controlnet import controlnet, controlnet_config
from ...sd35_core.checkpoint.loading import weights_for
from ...sd35_core.checkpoint.tensor_file import Tensors
from ...sd35_core.encoders.hints import NEAR, Near, rgb, vae_input
from ...sd35_core.errors import SettingError
from ...sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from ...sd35_core.network.latent import PIXELS
from ...sd35_core.network.layers import grid_positions
from ...sd35_core.network.mmditx import padded_latent
from ...sd35_core.packing.formats import is_packed
from ...sd35_core.sampling.tiles import Tiling
from . import packed, processor
from .control_base import Base, base_of, check_fit
from .loading import by_the_host
from .network import TILES, HostMMDiTX, TilesOfBatch, network_in
from .tiles import parts_of_picture

STABILITY, COMFYUI = "Stability AI", "ComfyUI"


@dataclass(frozen=True)
class Options:
    """Where people and programs differ.

    As ComfyUI: positions of an 8b ControlNet from a table of its own, the timestep in the
    ControlNet's dtype, canny as 0 to 255, and a window that includes both its ends.
    """

    near: Near = NEAR[0]
    reference: str = STABILITY

    @property
    def as_comfyui(self) -> bool:
        return self.reference == COMFYUI


class SD35ControlNet(comfy.controlnet.ControlNet):
    """A ControlNetEmbedder between the host's nodes and the model that is being sampled.

    It reads through that model's own modules, so LoRA, offloading and quantization of the base
    hold for it too. It does not keep the model alive: a run that is cancelled has no `cleanup`.
    """

    def __init__(
        self, model: ControlNetEmbedder | None, options: Options, path: Path, **managed: Any
    ):
        super().__init__(
            model, compression_ratio=1, latent_format=comfy.latent_formats.SD3(), **managed
        )
        self.options, self.path = options, path
        self.tile_hints: tuple[Tiling, list[Tensor]] | None = None
        self.sampled: Callable[[], Any] = lambda: None
        """The model that is being sampled, from `pre_run` on."""

    def cleanup(self) -> None:
        super().cleanup()
        self.tile_hints = None

    def copy(self) -> SD35ControlNet:
        other = SD35ControlNet(
            None,
            self.options,
            self.path,
            load_device=self.load_device,
            manual_cast_dtype=self.manual_cast_dtype,
        )
        other.control_model = self.control_model
        other.control_model_wrapped = self.control_model_wrapped
        self.copy_to(other)
        return other

    @property
    def config(self) -> ControlNetConfig:
        return self.control_model.config

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        self.sampled = weakref.ref(model)
        check_fit(self.config, self.base())

    def base(self) -> Base:
        """What it reads of the model that is being sampled."""
        model = self.sampled()
        assert model is not None, "the host calls pre_run first"
        base = base_of(network_in(model), model.get_dtype_inference())
        if self.options.as_comfyui:
            return replace(base, embed=partial(self.embed_as_comfyui, base.x_embedder))
        return base

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, transformer_options: Any
    ) -> Any:
        """Residuals per block of the base, added to those of the ControlNets before."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(
                x_noisy, t, cond, batched_number, transformer_options
            )
        if self.strength == 0 or not self.acts_at(float(t[0])):
            return previous
        tiles = transformer_options.get(TILES)
        base = self.base()
        dtype = self.manual_cast_dtype or self.control_model.dtype
        x = self.model_sampling_current.calculate_input(t, x_noisy).to(dtype)
        timestep = self.model_sampling_current.timestep(t)
        if tiles is not None and tiles.whole_table and not self.options.as_comfyui:
            positions = network_in(self.sampled()).tile_positions(x, tiles)
            base = replace(base, embed=partial(base.embed, positions=positions))
        residuals = self.control_model(
            base,
            x,
            timestep.to(dtype) if self.options.as_comfyui else timestep.float(),
            cond["y"].to(x),
            self.hint_for(x, batched_number, tiles),
            lambda q, k, v, _: processor.chosen_attention()(
                q, k, v, q.shape[1], skip_reshape=True, transformer_options=transformer_options
            ),
        )
        spread = [residuals[layer] for layer in self.config.spread(base.depth)]
        return self.control_merge({"output": spread}, previous, output_dtype=None)

    def acts_at(self, sigma: float) -> bool:
        """Whether the window holds a sigma; its end is no part of it, except as ComfyUI."""
        first, last = self.timestep_range
        return last < sigma <= first or (self.options.as_comfyui and sigma == last)

    def embed_as_comfyui(self, x_embedder: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Patches of x (B, 16, H, W) with ComfyUI's positions: the shorter side of a picture
        reaches from 0 to 15 at every size."""
        patch = self.config.patch_size
        tokens = x_embedder(padded_latent(x, patch))
        sides = [-(-side // patch) for side in x.shape[2:]]
        axes = []
        for side in sides:
            reach = 7.5 * side / min(sides)
            axes.append(torch.linspace(7.5 - reach, 7.5 + reach, side))
        return tokens + grid_positions(axes[0], axes[1], self.config.hidden).to(tokens)

    def hint_for(self, x: Tensor, chunks: int, tiles: TilesOfBatch | None = None) -> Tensor:
        """The hint as latents for the rows of x; encoded once for each size, or tile."""
        pictures = len(x) // chunks
        if tiles is not None:
            pictures //= len(tiles.numbers)
            parts = [self.hint_of_tile(tiles.tiling, number).to(x) for number in tiles.numbers]
            hint = torch.cat([self.for_pictures(part, pictures) for part in parts])
            return hint.repeat(chunks, 1, 1, 1)
        if self.cond_hint is None or self.cond_hint.shape[2:] != x.shape[2:]:
            (hint,) = self.encoded(self.hint_at(x.shape[2], x.shape[3]))
            self.cond_hint = hint.to(x)
        return self.for_pictures(self.cond_hint, pictures).repeat(chunks, 1, 1, 1)

    def hint_of_tile(self, tiling: Tiling, number: int) -> Tensor:
        """The latents of a tile's part of the hint; all tiles' are made together, once."""
        if self.tile_hints is None or self.tile_hints[0] != tiling:
            parts = parts_of_picture(self.hint_at(*tiling.whole), tiling)
            self.tile_hints = tiling, self.encoded(*parts)
        return self.tile_hints[1][number]

    def for_pictures(self, hint: Tensor, pictures: int) -> Tensor:
        """A hint (N, ...) for so many pictures, where N is 1 or as many."""
        if len(hint) not in (1, pictures):
            raise SettingError(
                f"The ControlNet got {len(hint)} pictures for {pictures} latents. Give it one, or "
                "one for each latent."
            )
        return hint.expand(pictures, -1, -1, -1)

    def seen_by_vae(self, hint: Tensor) -> Tensor:
        """What the VAE sees of a hint (B, H, W, 3) in 0..1."""
        if self.options.as_comfyui and self.config.control_type == "canny":
            return 255 * hint
        return vae_input(hint, self.config.kind, self.config.control_type, self.options.near)

    def hint_at(self, rows: int, columns: int) -> Tensor:
        """What the VAE is to see of the hint for a latent of so many cells, (B, H, W, 3)."""
        size = (columns * PIXELS, rows * PIXELS)
        method = "nearest-exact" if self.config.control_type == "canny" else "bicubic"
        scaled = comfy.utils.common_upscale(self.cond_hint_original, *size, method, "center")
        return self.seen_by_vae(rgb(scaled.movedim(1, -1)).clamp(0, 1))

    def encoded(self, *parts: Tensor) -> list[Tensor]:
        """Latents (B, 16, H / 8, W / 8), on the model's scale, of what the VAE is to see."""
        if self.vae is None:
            raise SettingError(
                "An SD3.5 ControlNet reads its picture through the VAE, and none is connected. "
                "Connect the VAE output of SD35Loader to the node that applies the ControlNet."
            )
        loaded = comfy.model_management.loaded_models(only_currently_used=True)
        found = []
        for seen in parts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            latents = self.vae.encode((seen + 1) / 2)
            wanted = self.config.in_channels, *(side // PIXELS for side in seen.shape[1:3])
            if latents.shape[1:] != wanted:
                raise SettingError(
                    f"The connected VAE makes latents of shape {list(latents.shape[1:])} from the "
                    f"ControlNet's picture, expected {list(wanted)}. Connect SD3.5's VAE."
                )
            found.append(self.latent_format.process_in(latents))
        # the host may list a model of which only the weights are left
        comfy.model_management.load_models_gpu([model for model in loaded if model is not None])
        return found


OF_THE_HOST = (
    comfy.controlnet.ControlNet,
    comfy.controlnet.ControlLora,
    comfy.controlnet.T2IAdapter,
)
"""ComfyUI's own classes; those of other packs are left to themselves."""


def check_kind(control_net: Any) -> None:
    """Raise SettingError for a ControlNet of ComfyUI's own loader for another model than SD3.5.
    Flux's latents are of a class below SD3's there, and are not SD3's."""
    form = getattr(control_net, "latent_format", None)
    if type(control_net) in OF_THE_HOST and type(form) is not comfy.latent_formats.SD3:
        made_for = f"one made for {type(form).__name__}" if form else "one of an older model"
        raise SettingError(
            f"control_net is a {type(control_net).__name__}, {made_for}, and this node steers "
            "SD3.5. Load a ControlNet for SD3.5 with SD35ControlNetLoader."
        )


def steered(
    prompts: tuple[Any, ...],
    control_net: Any,
    vae: Any,
    hint: Tensor,
    strength: float,
    window: tuple[float, float],
) -> list[Any]:
    """CONDITIONINGs with a ControlNet and its hint (B, H, W, 3) in 0..1, from one share of the
    way from noise to picture to another.

    Behind the same ControlNet all of them get one object: so they run in one batch.
    """
    attached: dict[Any, Any] = {}

    def control(before: Any) -> Any:
        if before not in attached:
            copy = control_net.copy()
            copy.set_cond_hint(hint.movedim(-1, 1), strength, window, vae=vae)
            copy.set_previous_controlnet(before)
            attached[before] = copy
        return attached[before]

    own = {"control_apply_to_uncond": False}
    return [
        [[text, {**extra, "control": control(extra.get("control")), **own}] for text, extra in rows]
        for rows in prompts
    ]


def check_controls(*prompts: Any) -> None:
    """Raise SettingError where a prompt carries a ControlNet that can't be drawn in tiles: the
    host's own shrinks its whole picture to every one of them."""
    for rows in prompts:
        for _, extra in rows:
            control = extra.get("control")
            while control is not None:
                if not isinstance(control, SD35ControlNet):
                    raise SettingError(
                        f"A prompt carries a {type(control).__name__} of another loader, which "
                        "would steer every tile by the whole picture. Load it with SD3.5 "
                        "ControlNet Loader, or connect it to control_net here."
                    )
                control = control.previous_controlnet


def check_table(model: Any) -> None:
    """Raise SettingError for a model whose tiles can't know their place in the whole picture."""
    network = network_in(model.model)
    if not isinstance(network, HostMMDiTX):
        raise SettingError(
            f"positions 'of the whole' need a model from SD3.5 Loader; this one is a "
            f"{type(network).__name__}. Load it there, or set positions to 'own'."
        )


def from_loader(control_net: Any) -> SD35ControlNet:
    """A CONTROL_NET of this pack. Raises SettingError for another."""
    if not isinstance(control_net, SD35ControlNet):
        raise SettingError(
            f"This node needs a ControlNet from SD35ControlNetLoader; it got a "
            f"{type(control_net).__name__}."
        )
    return control_net


def controlnet_from(file: Tensors, options: Options) -> SD35ControlNet:
    """The CONTROL_NET in a file, its dtype and devices chosen by the host.

    Raises CheckpointError when there is none for SD3.5.
    """
    name = f"'{file.path.name}'"
    tensors = controlnet(file, name)
    config = controlnet_config(tensors, name)
    management = comfy.model_management
    device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtype = management.unet_dtype(model_params=comfy.utils.calculate_parameters(tensors))
    compute = management.unet_manual_cast(dtype, device)
    if is_packed(tensors):
        operations = packed.operations(dtype, compute or dtype)
    else:
        operations = comfy.ops.pick_operations(dtype, compute, disable_fast_fp8=True)
    operations = processor.faster(operations)
    model = ControlNetEmbedder(config, operations, dtype=dtype, device=offload_device)
    model.dtype = dtype
    known = ControlNetEmbedder(config, device="meta").state_dict()
    with by_the_host(name):
        model.load_state_dict(weights_for(known, tensors, dtype))
    return SD35ControlNet(
        model.requires_grad_(False).eval(),
        options,
        file.path,
        load_device=device,
        manual_cast_dtype=compute,
    )
