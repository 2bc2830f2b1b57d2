"""A LoRA's training in the host: its VAE and text encoders, its folders, its cancel button."""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...sd35_core.encoders.described import T5
from ...sd35_core.encoders.hints import rgb
from ...sd35_core.errors import SettingError
from ...sd35_core.network.latent import LATENT_CHANNELS, PIXELS
from ...sd35_core.network.mmditx import MMDiTX
from ...sd35_core.pipeline import Pipeline
from ...sd35_core.training.alone import run_alone
from ...sd35_core.training.config import BEST, TrainingConfig
from ...sd35_core.training.dataset import (
    Examples,
    Size,
    captioned_pictures,
    fitted,
    picture_of,
    shapes_near,
)
from ...sd35_core.training.drawing import Drawing
from ...sd35_core.training.run import DivergedError, Run
from ...sd35_core.whole_file import free_name, write_new
from .calibration import encoded
from .files import fingerprint, first_folder, hashed
from .memory import enough_memory
from .report import progress
from .text import names_in

PUBLISHED_CLIP_L = 768
"""The columns of CLIP-L in the encodings of published models."""


class Picture(NamedTuple):
    """A picture to learn from, (3, H, W) uint8, its (width, height) and its caption."""

    pixels: Tensor
    size: Size
    caption: str


class Learned(NamedTuple):
    """What a training left: the LoRA's file, the run, and what is said of a better LoRA on the way,
    nothing where there was none."""

    path: Path
    run: Run
    better: str


def pictures_given(images: Sequence[Tensor], captions: Sequence[str], side: int) -> list[Picture]:
    """Of IMAGEs and texts: one text for each picture, or one for all. Raises SettingError."""
    single = [rgb(picture[None])[0] for batch in images for picture in batch]
    if len(captions) == 1:
        captions = list(captions) * len(single)
    if len(captions) != len(single):
        raise SettingError(
            f"There are {len(single)} images and {len(captions)} captions. Connect a caption for "
            "each image, in the same order, or one for all."
        )
    found = []
    for picture, caption in zip(single, captions):
        values = (255 * picture.float().clamp(0, 1)).round().byte().cpu().contiguous()
        height, width = values.shape[:2]
        image = picture_of(values.numpy().tobytes(), (width, height))
        found.append(Picture(*fitted(image, shapes_near(side)), caption))
    return found


def pictures_in_input(folder: str, side: int) -> list[Picture]:
    """Of a folder in the host's input folder, with captions in .txt files. Raises SettingError."""
    root = Path(folder_paths.get_input_directory()).resolve()
    try:
        path = (root / folder).resolve()
    except (OSError, RuntimeError, ValueError):
        path = root.parent
    if not path.is_relative_to(root) or not path.is_dir():
        raise SettingError(
            f"'{folder}' is no folder in ComfyUI's input folder. Put the pictures into "
            f"'{root.name}/NAME' and write NAME here."
        )
    return [Picture(*each) for each in captioned_pictures(path, shapes_near(side))]


def encoded_examples(pictures: Sequence[Picture], clip: Any, vae: Any) -> list[Examples]:
    """One group for each size; everything as the host's samplers see it."""
    if getattr(vae, "latent_channels", None) != LATENT_CHANNELS:
        raise SettingError("The VAE is not SD3.5's. Connect the one of SD3.5 Loader.")
    show = progress()
    latents: dict[Size, list[Tensor]] = defaultdict(list)
    captions: dict[Size, list[Encoding]] = defaultdict(list)
    silent = encoding_of(clip, "")
    for done, picture in enumerate(pictures):
        show(done, len(pictures))
        image = picture.pixels.permute(1, 2, 0)[None].float() / 255
        latents[picture.size].append(vae.encode(image)[0].cpu().half())
        captions[picture.size].append(encoding_of(clip, picture.caption))
    left = _clip_l_columns(clip)
    return [
        {"latents": torch.stack(latents[size]), **caption_examples(captions[size], silent, left)}
        for size in latents
    ]


class Encoding(NamedTuple):
    """What the CLIPs, (L, C), and T5, (M, C), say of a caption, and pooled (P,); fp16."""

    clip: Tensor
    t5: Tensor
    pooled: Tensor


def encoding_of(clip: Any, caption: str) -> Encoding:
    """As the host encodes it."""
    context, extra = encoded(clip, caption)[0]
    rows = context[0].cpu().half()
    parts = clip.tokenize(caption).get(T5, []) if T5 in names_in(clip) else []
    first = len(rows) - sum(map(len, parts))
    return Encoding(rows[:first], rows[first:], extra["pooled_output"][0].cpu().half())


def caption_examples(captions: Sequence[Encoding], silent: Encoding, left: int) -> Examples:
    """Captions as examples have them, filled up to the longest with what the host's encoders say
    where there are no words; `left`: CLIP-L's columns."""
    every = [*captions, silent]
    clips, t5 = (max(len(each[part]) for each in every) for part in (0, 1))
    context = torch.stack(
        [
            torch.cat(
                [_filled(each.clip, clips, silent.clip), _filled(each.t5, t5, silent.t5[-1:])]
            )
            for each in every
        ]
    )
    pooled = torch.stack([each.pooled for each in every])
    rows = torch.tensor([[len(each.clip), len(each.t5)] for each in every])
    return {
        **{"context": context[:-1].clone(), "context_empty": context[-1].clone()},
        **{"pooled": pooled[:-1].clone(), "pooled_empty": pooled[-1].clone()},
        **{"rows": rows[:-1].clone(), "rows_empty": rows[-1].clone()},
        "clip": torch.tensor([clips, left]),
    }


@dataclass(frozen=True)
class _HostPipeline(Pipeline):
    """Draws what the host's text encoders have said already of captions."""

    told: Mapping[str, Encoding] = field(default_factory=dict)

    def encode(self, captions: list[str], without: str = "") -> tuple[Tensor, Tensor]:
        found = caption_examples([self.told[each] for each in captions], self.told[""], 0)
        context, pooled = (found[name].float().to(self.device) for name in ("context", "pooled"))
        return context, pooled


class _HostVae:
    """The host's VAE as a Pipeline has one; it leaves the device after each use, for the run."""

    cell, channels = PIXELS, LATENT_CHANNELS

    def __init__(self, vae: Any):
        self.vae = vae

    def decode(self, latents: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(latents.device.type, enabled=False):
            pictures = self.vae.decode(latents.float())
        comfy.model_management.unload_all_models()
        return pictures.permute(0, 3, 1, 2).clone()


def drawing_with(clip: Any, vae: Any, config: TrainingConfig) -> Drawing:
    """How a run draws its class and its samples; pictures of the class are kept until the host is
    started again, for every training that asks for the same."""
    prompt = config.class_prompt
    told = {text: encoding_of(clip, text) for text in ("", prompt, *config.samples)}
    decoder: Any = _HostVae(vae)
    caption = caption_examples([told[prompt]], told[""], _clip_l_columns(clip))
    name = f"sd35_class_{hashed(f'{fingerprint(config.start)} {prompt}')}"

    def around(network: MMDiTX) -> Pipeline:
        return _HostPipeline(network, {}, decoder, lambda caption: [], told=told)

    return Drawing(around, caption, Path(folder_paths.get_temp_directory()) / name)


def _filled(rows: Tensor, count: int, filler: Tensor) -> Tensor:
    missing = count - len(rows)
    if not missing:
        return rows
    times = -(-missing // len(filler))
    return torch.cat([rows, filler.repeat(times, 1)[:missing]])


def _clip_l_columns(clip: Any) -> int:
    widths = getattr(clip.cond_stage_model, "widths", {})
    return widths.get("clip_l", PUBLISHED_CLIP_L)


def train_lora(
    config: TrainingConfig,
    name: str,
    pictures: Sequence[Picture],
    groups: list[Examples],
    drawing: Drawing | None = None,
) -> Learned:
    """Train, or go on where a cancelled run of the same settings stopped; the LoRA's file in the
    host's folder, which is written when the run is cancelled too."""
    captions = [picture.caption for picture in pictures]
    marks = hashlib.sha256()
    for group in groups:
        for key, tensor in sorted(group.items()):
            marks.update(f"{key}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    said = replace(config, metadata={}, samples=())  # under any name, whoever watches
    mark = hashed(f"{said} {marks.hexdigest()}")
    folder = Path(folder_paths.get_temp_directory()) / f"sd35_train_{mark}"
    show = progress()
    interrupted = comfy.model_management.processing_interrupted
    comfy.model_management.unload_all_models()
    advice = "Turn checkpointing on, or lower batch or side."
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        enough_memory("training a LoRA", advice),
    ):
        own = [{key: tensor.clone() for key, tensor in group.items()} for group in groups]
        path = first_folder("loras") / f"{name}.safetensors"
        with run_alone(replace(config, output=str(folder)), own, captions, drawing) as run:
            sent = None

            def shown(loss: float) -> None:
                nonlocal sent
                if not interrupted():
                    fresh = run.strip if run.strip is not sent else None
                    sent = run.strip
                    show(run.step, config.steps, fresh)

            try:
                end_if_cancelled()
                run.go_on(shown, interrupted, show)
            except DivergedError as error:
                path = free_name(path)
                run.write_model(path)
                better = _keep_better(run, path)
                shutil.rmtree(folder, ignore_errors=True)  # or the same queue ran away again
                raise SettingError(
                    f"{error} It is in '{path.name}', in ComfyUI's loras. {better}".rstrip()
                ) from error
            if run.step == 0:
                end_if_cancelled()
            path = free_name(path)
            run.write_model(path)
            better = ""
            if run.step == config.steps:
                better = _keep_better(run, path)
                shutil.rmtree(folder, ignore_errors=True)
    return Learned(path, run, better)


def _keep_better(run: Run, path: Path) -> str:
    """Put the best LoRA on the way beside the last, where that is worse; a sentence on it."""
    better = run.better()
    if better is None or run.last is None:
        return ""
    with (Path(run.config.output) / BEST).open("rb") as file:
        pieces = iter(partial(file.read, 1 << 24), b"")
        kept = write_new(path.with_name(f"{path.stem}_best{path.suffix}"), pieces)
    return f"The LoRA of {better.words(run.last)}; it is in '{kept.name}', beside the last one."


def end_if_cancelled() -> None:
    """Raises what the host expects of a node whose run the person has cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def with_lora(model: Any, path: Path) -> Any:
    """The MODEL with a LoRA's file at strength 1, as the host's loader puts it on."""
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]
