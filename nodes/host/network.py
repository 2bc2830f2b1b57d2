"""MMDiTX as ComfyUI's diffusion model: its memory management, patches and wrappers apply."""

from __future__ import annotations

import inspect
from functools import lru_cache, partial
from typing import Any, NamedTuple

import comfy.model_base
import comfy.supported_models
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...sd35_core.checkpoint.loading import with_table
from ...sd35_core.errors import SettingError
from ...sd35_core.network.config import MMDiTXConfig
from ...sd35_core.network.layers import Attend, JointBlock
from ...sd35_core.network.mmditx import MMDiTX, Twin
from ...sd35_core.network.modulation_cache import ModulationCache, most_values
from ...sd35_core.sampling.tiles import Tiling
from . import processor

TransformerOptions = dict[str, Any]

TWINS = "sd35_twins"
"""In transformer_options: {uuid of a cond with skipped layers: (its source, layers)}.

A source is a cond's uuid and the place of its list among the lists that run together: the host
gives copies of a cond in other lists the same uuid."""
MODULATIONS = "sd35_modulations"
"""In transformer_options: the batch's modulations, where they are known."""
TILES = "sd35_tiles"
"""In transformer_options: the tiles of a larger latent that are the batch's rows."""
SKIPPED = "sd35_skipped_layers"
"""In transformer_options: layers that every row skips."""


class TilesOfBatch(NamedTuple):
    """A batch holds `rows` rows of the first tile, then as many of the next one, for each prompt.

    whole_table: whether a tile's positions are its place in the whole picture.
    """

    tiling: Tiling
    numbers: tuple[int, ...]
    rows: int
    whole_table: bool


class HostMMDiTX(MMDiTX):
    """MMDiTX called the way the host calls a diffusion model.

    Besides the stock SD3 model's `patches_replace["dit"]` it honours DIFFUSION_MODEL wrappers
    (EasyCache), `attn1_patch` and `attn1_output_patch` (NAG) and `patches_replace["attn1"]`
    (perturbed attention; "middle" means the middle block).
    """

    def __init__(self, config: MMDiTXConfig, operations: Any, dtype: Any, device: Any, **_: Any):
        super().__init__(config, processor.faster(operations), dtype, device)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: dict[str, list[Tensor | None]] | None = None,
        transformer_options: TransformerOptions | None = None,
        **_: Any,
    ) -> Tensor:
        """Velocity (B, 16, H, W); timesteps: (B,) in 0..1000."""
        options = transformer_options if transformer_options is not None else {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, options)

    def _velocity(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None,
        y: Tensor | None,
        control: dict[str, list[Tensor | None]] | None,
        options: TransformerOptions,
    ) -> Tensor:
        context, y = self._checked(x, context, y)
        return super().forward(
            x,
            timesteps,
            context,
            y,
            run_block=partial(self._run_block, options),
            residuals=(control or {}).get("output", ()),
            twins=twins_of(len(x), options),
            positions=self.tile_positions(x, options.get(TILES)),
            modulations=options.get(MODULATIONS),
        )

    def tile_positions(self, x: Tensor, tiles: TilesOfBatch | None) -> Tensor | None:
        """Positions of the rows of x, (B, N, hidden), where they are the tiles' places in the
        whole picture; None where each tile is a picture by itself."""
        if tiles is None or not tiles.whole_table:
            return None
        patch = self.config.patch_size
        sides = [side // patch for side in tiles.tiling.whole]
        table = self.positions(sides[0], sides[1]).unflatten(1, sides).movedim(-1, 1)
        size = [side // patch for side in tiles.tiling.size]
        found = []
        for number in tiles.numbers:
            top, left = (place // patch for place in tiles.tiling.corners[number])
            part = table[:, :, top : top + size[0], left : left + size[1]]
            found.append(part.flatten(2).transpose(1, 2).expand(tiles.rows, -1, -1))
        return torch.cat(found).repeat(len(x) // (tiles.rows * len(found)), 1, 1)

    def _checked(
        self, x: Tensor, context: Tensor | None, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The conditioning, once its widths and the latent's channels are the model's."""
        channels = self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise SettingError(
                f"The latent has shape {list(x.shape)}, expected {channels} channels, height and "
                f"width: it was made for another model"
                + (", for videos" if x.ndim == 5 else "")
                + ". Make an empty one with EmptySD3LatentImage, or encode the picture with "
                "SD3.5's VAE."
            )
        wanted = (self.config.context_dim, self.config.pooled_dim)
        seen = tuple(None if t is None else t.shape[-1] for t in (context, y))
        if context is None or y is None or seen != wanted:
            raise SettingError(
                f"The prompt's encoding is {seen[0]} wide with a pooled part of {seen[1]}; this "
                f"model ({self.config.variant}) takes {wanted[0]} and {wanted[1]}. Encode the "
                "prompt with the CLIP output of the loader that gave the model."
            )
        return context, y

    def _run_block(
        self,
        options: TransformerOptions,
        index: int,
        block: JointBlock,
        context: Tensor,
        x: Tensor,
        c: Tensor,
        attend: Attend,
        modulation: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        here = {
            **options,
            "block_index": index,
            "block_type": "double",
            "total_blocks": self.config.depth,
            "block": ("double_block", index),
        }
        replacement = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
        if replacement is None:
            return block(context, x, c, partial(self._attend, here), modulation)

        def original(arguments: TransformerOptions) -> TransformerOptions:
            attend_inner = partial(self._attend, arguments.get("transformer_options", here))
            vec = arguments["vec"]
            known = modulation if vec is c else None
            text, image = block(arguments["txt"], arguments["img"], vec, attend_inner, known)
            return {"txt": text, "img": image}

        state = {"txt": context, "img": x, "vec": c, "transformer_options": here}
        out = replacement(state, {"original_block": original})
        return out["txt"], out["img"]

    def _attend(
        self, options: TransformerOptions, q: Tensor, k: Tensor, v: Tensor, context_tokens: int
    ) -> Tensor:
        """The host's attention, with what other nodes hang on it; text comes first in q, k, v."""
        heads = self.config.heads
        image = slice(context_tokens, q.shape[2])
        extra = {**options, "n_heads": heads, "dim_head": q.shape[-1]}
        extra["img_slice"] = [image.start, image.stop]
        patches = options.get("patches", {}) if context_tokens else {}
        before = patches.get("attn1_patch", ())
        left_out = {home(patch) for patch in before if not is_for_transformers(patch)}
        for patch in before:
            if not is_for_transformers(patch):
                continue
            out = patch(q, k, v, pe=None, attn_mask=None, extra_options=extra)
            q, k, v = out.get("q", q), out.get("k", k), out.get("v", v)
        attended = processor.chosen_attention()(
            q, k, v, heads, skip_reshape=True, transformer_options=options
        )
        perturb = self._attention_replacement(options)
        if perturb is not None:
            own = (t[:, :, image].transpose(1, 2).flatten(2) for t in (q, k, v))
            attended = torch.cat([attended[:, : image.start], perturb(*own, extra)], dim=1)
        for patch in patches.get("attn1_output_patch", ()):
            if home(patch) not in left_out:
                attended = patch(attended, extra)
        return attended

    def _attention_replacement(self, options: TransformerOptions) -> Any:
        """What replaces the image's attention to itself in this block, if anything does."""
        replacements = options.get("patches_replace", {}).get("attn1", {})
        index = options["block_index"]
        found = replacements.get(("double_block", index))
        if found is None and index == self.config.depth // 2:
            found = replacements.get(("middle", 0))
        return found


@lru_cache(maxsize=64)
def is_for_transformers(patch: Any) -> bool:
    """Whether an `attn1_patch` takes what the host gives it in a transformer: q, k and v as heads,
    with `pe`. One for U-Nets (HyperTile, ToMe, hypernetworks) takes tokens; it is left out, as the
    host's own SD3 does."""
    try:
        parameters = inspect.signature(patch).parameters.values()
    except (TypeError, ValueError):  # a callable that says nothing of itself
        return False
    return any(p.name == "pe" or p.kind is p.VAR_KEYWORD for p in parameters)


def home(patch: Any) -> tuple[str, str] | int:
    """Where a patch was made: ToMe's two, before and after the attention, are of one function."""
    made_in = getattr(patch, "__qualname__", "").rpartition(".")[0]
    return (patch.__module__, made_in) if made_in else id(patch)


def twins_of(rows: int, options: TransformerOptions) -> list[Twin]:
    """The batch's rows with skipped layers; rows of one cond stand together, in `uuids`' order."""
    skipped = options.get(SKIPPED)
    if skipped:
        return [Twin(row, skipped) for row in range(rows)]
    plan = options.get(TWINS)
    if not plan:
        return []
    chunks = list(zip(options["uuids"], options["cond_or_uncond"]))
    size = rows // len(chunks)
    twins = []
    for place, (uuid, _) in enumerate(chunks):
        source, layers = plan.get(uuid, (None, None))
        if layers is None:
            continue
        origin = chunks.index(source) if chunks.count(source) == 1 else None
        for row in range(size):
            start = None if origin is None else origin * size + row
            twins.append(Twin(place * size + row, layers, start))
    return twins


def network_in(model: Any) -> Any:
    """The network of the host's model class, without the shell that torch.compile puts round it."""
    network = model.diffusion_model
    return getattr(network, "_orig_mod", network)


class SD35Model(comfy.model_base.SD3):
    """The host's own SD3 model class around our network, so LoRA, merging and saving know it."""

    def __init__(self, model_config: Any, device: Any = None):
        comfy.model_base.BaseModel.__init__(
            self,
            model_config,
            comfy.model_base.ModelType.FLOW,
            device=device,
            unet_model=HostMMDiTX,
        )
        self.modulation_cache: ModulationCache | None = None

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: TransformerOptions | None = None,
        **named: Any,
    ) -> Tensor:
        """With the modulations from the run's cache, if there is one and nothing is trained."""
        options, y = transformer_options or {}, named.get("y")
        network = network_in(self)
        cache, width = self.modulation_cache, network.config.pooled_dim
        if torch.is_grad_enabled():
            cache = None
        if cache is not None and y is not None and y.shape[-1] == width:
            named["y"] = y = y.to(x.device, self.get_dtype_inference())
            steps = options.get("sample_sigmas", t)[:-1]
            times, ahead = (self.model_sampling.timestep(s).float() for s in (t, steps))
            known = cache.look_up(network, times, y, ahead)
            options = {**options, MODULATIONS: known}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **named)

    def memory_required(self, *arguments: Any, **named: Any) -> float:
        """Bytes that a call takes beside the weights; with the cache, its modulations as well."""
        needed = super().memory_required(*arguments, **named)
        if self.modulation_cache is None and not getattr(self, "resting", False):
            return needed
        network = network_in(self)
        return needed + most_values(network) * self.get_dtype_inference().itemsize

    def encode_adm(self, **kwargs: Any) -> Tensor | None:
        return kwargs.get("pooled_output")


class SD35ModelConfig(comfy.supported_models.SD3):
    """What the host wants to know about a model; used by our loader alone, never registered."""

    def __init__(self, config: MMDiTXConfig):
        super().__init__(
            {
                "config": config,
                "in_channels": config.in_channels,
                "depth": config.heads,
                "num_blocks": config.depth,
                "pos_embed_scaling_factor": None,
            }
        )

    def process_unet_state_dict_for_saving(self, state_dict: Any) -> Any:
        """With the position table that other programs expect; 2-bit files are for this pack."""
        if not any(key.endswith(".weight_codebook") for key in state_dict):
            state_dict = with_table(state_dict)
        return super().process_unet_state_dict_for_saving(state_dict)

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> SD35Model:
        return SD35Model(self, device=device)
