"""What a training is to do: its keys, read from TOML and checked."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..limits import PATCH
from ..network.config import CONTEXT_WIDTH, MMDiTXConfig
from ..network.controlnet import CONTROL_TYPES
from ..network.latent import LATENT_CHANNELS, PIXELS
from .dataset import Size
from .lora import SPELLINGS, LoraPlan, checked_spelling

OBJECTIVES = ("velocity",)
TIMESTEPS = ("logit-normal", "uniform", "shifted")
TO_BE_TRAINED = "what is to be trained"
SAMPLES, STRIP = "samples", "samples.png"
"""In a run's folder: a folder with pictures on the way, and a strip of them."""
BEST, CURVE = "best.safetensors", "loss.png"
"""In a run's folder: the best LoRA so far, and the losses."""
CLASS, CLASS_MARK = "class.safetensors", "sd35_class"
"""In a run's folder: pictures of the class, and what they are of."""


@dataclass(frozen=True)
class TrainingConfig:
    """What a TOML file may say; paths are relative to it."""

    output: str
    """The folder to write to."""
    images: str = ""
    """A folder of pictures, each with its caption in a .txt file of the same name."""
    examples: tuple[str, ...] = ()
    """Instead of `images`: safetensors files of latents and token ids, one size each."""
    sizes: tuple[Size, ...] = ((128, 128),)
    """The sizes, (width, height) in pixels, to which `images` are brought."""
    vae: str = ""
    """A file with a VAE in TAESD's layout, alone or in a checkpoint; `images` need it, or
    `pixels`."""
    pixels: int = 0
    """Instead of `vae`: draw the pixels themselves, 1 for grey ones, 3 for coloured ones."""
    patch: int = 2
    """The side of what becomes a token, in cells of the VAE or in pixels."""
    tokenizer: str = ""
    """A folder with CLIP's vocab.json and merges.txt; `images` and `samples` need it."""
    tokenizer_t5: str = ""
    """A folder with T5's tokenizer.json (ComfyUI's comfy/text_encoders/t5_tokenizer), for T5."""
    text_encoders: str = ""
    """A checkpoint whose text encoders are used as they are; without it they are trained along."""
    start: str = ""
    """A checkpoint whose diffusion model is trained further."""
    depth: int = 4
    dual_blocks: int = 2
    pos_embed_max_size: int = 32
    context_dim: int = CONTEXT_WIDTH
    clip_l: tuple[int, int, int] = (48, 3, 3)
    clip_g: tuple[int, int, int] = (64, 4, 3)
    """Width, heads and layers of the text encoders that are trained along."""
    t5xxl: tuple[int, ...] = ()
    """The same of a third one, T5, which reads whole captions; none if empty."""
    controlnet: str = ""
    """blur, canny or depth: train a ControlNet for the model in `start`, which stays as it is.
    Its hints are made from the pictures; depth maps lie beside them as NAME.depth.png."""
    controlnet_layers: int = 1
    lora_rank: int = 0
    """Train a LoRA of this rank for the model in `start`, which stays as it is; 0: none."""
    lora_alpha: float = 0.0
    """Its strength is alpha / rank, 1 if this is 0."""
    lora_targets: tuple[str, ...] = ("attention",)
    """attention, mlp, modulation: the layers that it changes."""
    lora_blocks: str = ""
    """The blocks that it changes, such as "12-23"; all if empty. For Large also composition (12-24)
    or detail (30-37), as Stability AI's guide has it."""
    lora_stabilised: bool = False
    """alpha / sqrt(rank) instead (rsLoRA): as strong at every rank."""
    lora_keys: str = SPELLINGS[0]
    """Whose names its file has: diffusers, kohya or comfyui. ComfyUI reads all three."""
    trigger: str = ""
    """Words of the captions that call what a LoRA learned; managers show them."""
    class_prompt: str = ""
    """What the subject is one of, such as "a dog": the model itself draws pictures of it before,
    and a LoRA learns from one of them beside each of the subject's, so that not every dog becomes
    that one. Needs `tokenizer`, `text_encoders`, and `vae` or `pixels`."""
    class_pictures: int = 50
    class_weight: float = 1.0
    """How much they count, against 1 of the subject's."""
    checkpoint: bool = False
    """Keep no block's inner values for the way back: a third slower, in a fraction of the
    memory."""
    steps: int = 6000
    batch: int = 64
    accumulate: int = 1
    optimiser: str = "adamw"
    """Or muon (Jordan et al. 2024), for the matrices in blocks: fewer steps do."""
    rate: float = 1e-3
    warm_up: int = 200
    cosine: bool = True
    ema: float = 0.999
    caption_dropout: float = 0.1
    encoder_dropout: float = 0.08
    """The share of captions, and of each CLIP's outputs, that a step goes without, and of steps
    that go without T5."""
    dropout_of: dict[str, float] = field(default_factory=dict)
    """The same of single encoders, such as {clip_l = 0.1, t5xxl = 0.5}."""
    objective: str = "velocity"
    """What is learned: rectified flow's velocity, noise minus picture."""
    timesteps: str = TIMESTEPS[0]
    """How noisy the pictures of a step are: logit-normal, uniform, or shifted, uniform through
    the shift that SD3.5 samples with."""
    shift: float = 1.0
    """Above 1, more of the timesteps are near the noise."""
    random_crops: float = 0.0
    """The share of examples that see a random crop of the position table, not its centre: what
    is learned at one size then holds at others (Stability AI trained SD3.5 Medium so)."""
    prompt_tokens: int = 77
    """Pad prompts to so many of CLIP's tokens, which is faster than to all 77; longer ones stay as
    they are."""
    t5_tokens: int = 77
    """The same of T5's."""
    clip_norm: float = 1.0
    weight_decay: float = 0.01
    bf16: bool = True
    compile: bool = False
    device: str = "auto"
    memory: float = 0.0
    """Gigabytes that training a LoRA may take on the device; 0: what is free there."""
    seed: int = 0
    held_out: float = 0.0
    """The share of pictures that are not learned from: by them the best LoRA is found."""
    save_every: int = 500
    samples: tuple[str, ...] = ()
    """Captions to draw with every checkpoint; needs `vae` or `pixels`, and `tokenizer`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Written into the finished checkpoint."""

    @property
    def cell(self) -> int:
        """Pixels of a latent cell, each way."""
        return 1 if self.pixels else PIXELS

    @property
    def lora(self) -> LoraPlan:
        """Raises SettingError for one that can't be."""
        alpha = self.lora_alpha or float(self.lora_rank)
        return LoraPlan(
            self.lora_rank, alpha, self.lora_targets, self.lora_blocks, self.lora_stabilised
        )

    @property
    def network(self) -> MMDiTXConfig:
        return MMDiTXConfig(
            depth=self.depth,
            hidden=64 * self.depth,
            context_dim=self.context_dim,
            pooled_dim=self.clip_l[0] + self.clip_g[0],
            pos_embed_max_size=self.pos_embed_max_size,
            qk_norm=True,
            dual_blocks=tuple(range(self.dual_blocks)),
            in_channels=self.pixels or LATENT_CHANNELS,
            patch_size=self.patch,
        )


WORDS = {
    str: "a text", bool: "true or false", int: "a whole number", float: "a number",
    tuple: "a list", dict: "a table",
}  # fmt: skip
PATHS = ("output", "images", "vae", "tokenizer", "tokenizer_t5", "text_encoders", "start")
TEXTS = ("examples", "samples", "lora_targets")
TABLES = ("metadata", "dropout_of")
OPTIMISERS = ("adamw", "muon")
KNOWN = {"optimiser": OPTIMISERS, "objective": OBJECTIVES, "timesteps": TIMESTEPS}
"""Keys that take one of a few words."""
_NO_FP16 = (
    "training in fp16 is refused: its normal numbers end at 6e-5, below which gradients of a mean "
    "over a picture lie, and nothing here scales losses up. bf16 reaches as far as fp32: leave "
    "bf16 = true, or set bf16 = false for fp32."
)
REFUSED = {"fp16": _NO_FP16, "mixed_precision": _NO_FP16, "dtype": _NO_FP16}
"""Keys of other trainers -> what to do here."""


def read_config(path: Path, defaults: Mapping[str, Any] = {}) -> TrainingConfig:
    """A TOML file; `defaults` of keys that it leaves out. Raises SettingError for an unknown key, a
    value of another type, a lack."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise SettingError(f"'{path}' can't be read as TOML: {error}") from error
    known = {f.name: f for f in fields(TrainingConfig)}
    for name, value in values.items():
        if name in REFUSED:
            raise SettingError(f"'{path.name}' has the key '{name}': {REFUSED[name]}")
        if name not in known:
            raise SettingError(
                f"'{path.name}' has an unknown key '{name}'. Known are: {', '.join(known)}."
            )
        if name == "examples" and isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        kind = {"output": str, "metadata": dict, "dropout_of": dict}.get(
            name, type(known[name].default)
        )
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
            raise SettingError(f"'{path.name}': {name} is {value!r}, but should be {WORDS[kind]}.")
        if name in TEXTS and not all(isinstance(entry, str) for entry in value):
            raise SettingError(
                f"'{path.name}': {name} is {value!r}, but should be a list of texts."
            )
        values[name] = value

    def absolute(name: str) -> str:
        try:
            return str((path.parent / Path(name).expanduser()).resolve())
        except (OSError, RuntimeError, ValueError) as error:
            raise SettingError(f"'{path.name}': {name!r} is no path here: {error}") from error

    for name in PATHS:
        if values.get(name):
            values[name] = absolute(values[name])
    values["examples"] = tuple(map(absolute, values.get("examples", ())))
    if "output" not in values:
        raise SettingError(f"'{path.name}' lacks the key 'output', the folder to write to.")
    config = TrainingConfig(**{**defaults, **values})
    if bool(config.images) == bool(config.examples):
        raise SettingError(f"'{path.name}' needs either 'images' or 'examples'.")
    if config.pixels not in (0, 1, 3) or (config.pixels and (config.vae or config.controlnet)):
        raise SettingError(
            f"'{path.name}': pixels is {config.pixels}; it can be 1 (grey) or 3 (colours), without "
            "a VAE and without a ControlNet."
        )
    if not 1 <= config.patch <= PATCH.most:
        raise SettingError(
            f"'{path.name}': patch is {config.patch}; {PATCH.what} can be 1 to {PATCH.most}."
        )
    for name, words in KNOWN.items():
        if (word := getattr(config, name)) not in words:
            known = ", ".join(words)
            raise SettingError(f"'{path.name}': {name} is '{word}'; known are {known}.")
    for name in ("clip_l", "clip_g", "t5xxl"):
        check_encoder_size(name, getattr(config, name), path.name)
    token = config.cell * config.patch
    for size in config.sizes:
        numbers = isinstance(size, tuple) and all(isinstance(side, int) for side in size)
        if not numbers or len(size) != 2 or any(side % token or side <= 0 for side in size):
            raise SettingError(
                f"'{path.name}': sizes has {size}; a size is a width and a height in pixels, "
                f"multiples of {token}, such as {[8 * token, 6 * token]}."
            )
    if config.controlnet:
        check_controlnet(config, path.name)
    if config.lora_rank:
        check_lora(config, path.name)
    if config.class_prompt:
        check_class(config, path.name)
    if config.images or config.samples or config.class_prompt:
        given = {"vae": config.vae or config.pixels, "tokenizer": config.tokenizer}
        if config.t5xxl:
            given["tokenizer_t5"] = config.tokenizer_t5
        lacking = [name for name, value in given.items() if not value]
        if lacking:
            drawn = "samples" if config.samples else "class_prompt"
            why = "images" if config.images else drawn
            raise SettingError(f"'{path.name}': '{why}' needs the key '{lacking[0]}' too.")
    return config


def check_encoder_size(name: str, size: tuple[Any, ...], source: str) -> None:
    """Raise SettingError unless a text encoder can have that width, heads and layers; T5 can be
    left out."""
    if name == "t5xxl" and not size:
        return
    whole = len(size) == 3 and all(type(number) is int and number > 0 for number in size)
    if not whole or size[0] % size[1]:
        raise SettingError(
            f"'{source}': {name} is {list(size)}; it should be a width, heads that share it "
            "evenly, and layers, such as [48, 3, 3]."
        )


def check_controlnet(config: TrainingConfig, name: str) -> None:
    """Raise SettingError unless a ControlNet can be trained so."""
    if config.controlnet not in CONTROL_TYPES:
        known = ", ".join(CONTROL_TYPES)
        raise SettingError(f"'{name}': controlnet is '{config.controlnet}'; known are {known}.")
    for key in ("start", "text_encoders"):
        if not getattr(config, key):
            raise SettingError(f"'{name}': a ControlNet is trained on a model; it needs '{key}'.")
    if config.samples:
        raise SettingError(f"'{name}': no samples are drawn while a ControlNet is trained.")


def check_lora(config: TrainingConfig, name: str) -> None:
    """Raise SettingError unless a LoRA can be trained so."""
    if config.controlnet:
        raise SettingError(f"'{name}': a run trains a LoRA or a ControlNet, not both.")
    for key in ("start",) if config.examples else ("start", "text_encoders"):
        if not getattr(config, key):
            raise SettingError(f"'{name}': a LoRA is trained on a model; it needs '{key}'.")
    config.lora  # noqa: B018, says what is wrong with it
    checked_spelling(config.lora_keys, f"'{name}': lora_keys")


def check_class(config: TrainingConfig, name: str) -> None:
    """Raise SettingError unless pictures of a class can be learned beside."""
    if not config.lora_rank or not config.text_encoders:
        raise SettingError(
            f"'{name}': class_prompt is for a LoRA (lora_rank) on a model whose text encoders stay "
            "as they are (text_encoders)."
        )
    if config.class_pictures < 1 or not 0 < config.class_weight < math.inf:
        raise SettingError(
            f"'{name}': class_pictures is {config.class_pictures} and class_weight "
            f"{config.class_weight:g}; with a class_prompt they are at least 1 and above 0. Leave "
            "class_prompt out to learn without pictures of a class."
        )


def shape_given(network: MMDiTXConfig) -> dict[str, Any]:
    """What of a TrainingConfig a given network decides."""
    return {
        "depth": network.depth,
        "dual_blocks": len(network.dual_blocks),
        "pos_embed_max_size": network.pos_embed_max_size,
        "context_dim": network.context_dim,
        "patch": network.patch_size,
    }
