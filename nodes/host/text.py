"""Text encoders: CLIP-L, CLIP-G and T5-XXL, each optional -> the host's CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
import torch.nn.functional as F
from comfy.text_encoders.sd3_clip import SD3ClipModel, SD3Tokenizer, t5_xxl_detect
from torch import Tensor

from ...sd35_core.checkpoint.layouts import under
from ...sd35_core.checkpoint.loading import shapes_of
from ...sd35_core.checkpoint.tensor_file import StateDict, Tensors
from ...sd35_core.encoders.described import (
    SAVED,
    T5,
    check_encoder,
    encoder_configs,
    saved_description,
)
from ...sd35_core.errors import CheckpointError, SettingError
from ...sd35_core.limits import check_filled
from ...sd35_core.network.config import CONTEXT_WIDTH
from ...sd35_core.workflow.headers import ENCODER_MARKS
from .loading import by_the_host, read

TINY = 512
"""Below this width an encoder belongs to a small model trained for itself."""


def encoders_in(file: Tensors) -> dict[str, StateDict]:
    """The text encoders of a single-file checkpoint, each under its own keys."""
    prefixes = {name: f"text_encoders.{name}.transformer." for name in ENCODER_MARKS}
    return {
        name: under(file, prefix)
        for name, prefix in prefixes.items()
        if prefix + ENCODER_MARKS[name][0] in file
    }


def read_encoder(name: str, path: Path, dynamic: bool = True) -> StateDict:
    """One text encoder's file. Raises CheckpointError when it holds another model."""
    file = read(path, dynamic)
    with by_the_host(f"'{path.name}'"):
        tensors, _ = comfy.utils.convert_old_quants(dict(file), "", metadata=file.metadata)
    if "transformer.resblocks.0.ln_1.weight" in tensors:
        return tensors
    mark, width = ENCODER_MARKS[name]
    seen = tensors[mark].numel() if mark in tensors else None
    if seen is None or (seen != width and seen >= TINY):
        raise CheckpointError(
            f"'{path.name}' is not the text encoder {name}: "
            + (f"it has no '{mark}'" if seen is None else f"it is {seen} wide, expected {width}")
            + f". Choose a {name} file, or 'none' to do without."
        )
    return tensors


def load_clip(model_path: str, paths: dict[str, str | None], disable_dynamic: bool = False) -> Any:
    """The patcher of a CLIP, for the host, which reloads it through here."""
    file = read(Path(model_path), dynamic=not disable_dynamic)
    return clip_from(file, paths, disable_dynamic).patcher


def clip_from(file: Tensors, paths: dict[str, str | None], disable_dynamic: bool = False) -> Any:
    """The CLIP of the encoders in `paths`: a file each, or None for the one in the model's file.

    Raises SettingError when there is no encoder at all.
    """
    inside = encoders_in(file)
    encoders = {}
    for name, path in paths.items():
        if path is not None:
            encoders[name] = read_encoder(name, Path(path), not disable_dynamic)
        elif name in inside:
            encoders[name] = inside[name]
    if not encoders:
        raise SettingError(
            f"No text encoder: '{file.path.name}' holds none, and none was chosen. Choose clip_l, "
            "clip_g or t5xxl files, or set all three to 'none' if prompts are encoded elsewhere."
        )
    for name, tensors in encoders.items():
        source = Path(paths[name] or file.path).name
        check_filled(shapes_of(tensors), f"The text encoder {name} in '{source}'")
    marks = [(tensors, ENCODER_MARKS[name][0]) for name, tensors in encoders.items()]
    tiny = any(tensors[mark].numel() < TINY for tensors, mark in marks if mark in tensors)
    names = sorted({Path(path).name if path else file.path.name for path in paths.values()})
    with by_the_host(" or ".join(f"'{name}'" for name in names)):
        clip = (_tiny if tiny else _published)(encoders, file, disable_dynamic)
    clip.patcher.cached_patcher_init = (load_clip, (str(file.path), paths))
    return clip


def _published(encoders: dict[str, StateDict], file: Tensors, disable_dynamic: bool) -> Any:
    return comfy.sd.load_text_encoder_state_dicts(
        list(encoders.values()),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=comfy.sd.CLIPType.SD3,
        disable_dynamic=disable_dynamic,
    )


class _Target(NamedTuple):
    clip: Any
    tokenizer: Any
    params: dict[str, Any]


class TinySD3Clip(SD3ClipModel):
    """The host's SD3 text path with encoders of other widths than the published ones."""

    def __init__(
        self,
        widths: dict[str, int],
        described: Tensor,
        t5_quantization_metadata: Any = None,
        model_options: Any = None,
        **kwargs: Any,
    ):
        options = dict(model_options or {})
        if t5_quantization_metadata is not None:
            options["t5xxl_quantization_metadata"] = t5_quantization_metadata
        super().__init__(model_options=options, **kwargs)
        self.widths = widths
        self.register_buffer(SAVED.rpartition(".")[2], described)

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[Any, ...]:
        """Context (1, L, 4096), pooled (1, widths together), and nothing more."""
        hidden, pooled = [], []
        for name, encoder in (("clip_l", self.clip_l), ("clip_g", self.clip_g)):
            if encoder is None:
                device = comfy.model_management.intermediate_device()
                hidden.append(torch.zeros(1, 77, self.widths[name], device=device))
                pooled.append(torch.zeros(1, self.widths[name], device=device))
            else:
                parts = token_weight_pairs[name[-1]]
                if T5 in self.widths:  # the model was trained so: what follows is T5's to read
                    parts = parts[:1]
                tokens, summary = encoder.encode_token_weights(parts)
                hidden.append(tokens)
                pooled.append(summary)
        length = max(part.shape[1] for part in hidden)
        context = torch.cat([F.pad(p, (0, 0, 0, length - p.shape[1])) for p in hidden], dim=-1)
        context = F.pad(context, (0, CONTEXT_WIDTH - context.shape[-1]))
        if self.t5xxl is not None:
            read = self.t5xxl.encode_token_weights(token_weight_pairs[T5])[0]
            context = torch.cat([context, F.pad(read, (0, CONTEXT_WIDTH - read.shape[-1]))], dim=-2)
        return context, torch.cat(pooled, dim=-1), {}

    def load_sd(self, sd: StateDict) -> Any:
        return self.load_state_dict(sd, strict=False)


def _tiny(encoders: dict[str, StateDict], file: Tensors, disable_dynamic: bool) -> Any:
    saved = file.get(SAVED)
    configs = encoder_configs(file.metadata, file.path.name, saved)
    for name, config in configs.items():
        if name in encoders:
            source = f"The text encoder {name} for '{file.path.name}'"
            check_encoder(encoders[name], config, source)
    described = {name: config.described() for name, config in configs.items()}
    params = {
        "clip_l": "clip_l" in encoders,
        "clip_g": "clip_g" in encoders,
        "t5": T5 in encoders,
        "widths": {name: config.size[0] for name, config in configs.items()},
        "described": saved_description(configs),
        **(t5_xxl_detect(encoders[T5]) if T5 in encoders else {}),
    }
    state = {
        f"{name}.transformer.{key}": tensor
        for name, tensors in encoders.items()
        for key, tensor in tensors.items()
    }
    return comfy.sd.CLIP(
        _Target(TinySD3Clip, SD3Tokenizer, params),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(tensor.numel() for tensor in state.values()),
        state_dict=state,
        model_options={f"{name}_model_config": config for name, config in described.items()},
        disable_dynamic=disable_dynamic,
    )


def names_in(clip: Any) -> list[str]:
    """The encoders of a CLIP."""
    model = clip.cond_stage_model if clip is not None else None
    return [name for name in ENCODER_MARKS if getattr(model, name, None) is not None]
