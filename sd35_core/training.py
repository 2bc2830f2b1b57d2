"""Train a small SD3.5 from pictures with captions.

    python -m sd35_core.training CONFIG.toml

Rectified flow with logit-normal timesteps (Esser et al. 2024, arXiv:2403.03206). A run can be
stopped at any time (Ctrl-C) and goes on bit for bit where its last checkpoint was written. In the
folder `output` are then state.safetensors, the run itself; model.safetensors, a checkpoint for
SD35Loader; and samples/, pictures on the way.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import fill, load, metadata_of, read_file, under, write_file
from .config import MMDiTXConfig
from .controlnet import CONTROL_TYPES, ControlNetConfig, ControlNetEmbedder
from .dataset import Examples, Size, read_folder
from .errors import SD35Error, SettingError
from .latent import to_model
from .layers import attention, grid_positions
from .mmditx import MMDiTX
from .pipeline import Pipeline, Settings, load_encoders, load_vae
from .sampling import shifted
from .text_encoder import ClipTextModel, clip_g, clip_l, joined, tokenizer
from .whole_file import sweep, write_picture

log = logging.getLogger("sd35")

TO_BE_TRAINED = "what is to be trained"
STATE, MODEL, SAMPLES = "state.safetensors", "model.safetensors", "samples"
"""What is in a run's folder."""


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
    """A file with a VAE in TAESD's layout, alone or in a checkpoint; `images` need it."""
    tokenizer: str = ""
    """A folder with CLIP's vocab.json and merges.txt; `images` and `samples` need it."""
    text_encoders: str = ""
    """A checkpoint whose text encoders are used as they are; without it they are trained along."""
    start: str = ""
    """A checkpoint whose diffusion model is trained further."""
    depth: int = 4
    dual_blocks: int = 2
    pos_embed_max_size: int = 32
    context_dim: int = 4096
    clip_l: tuple[int, int, int] = (48, 3, 3)
    clip_g: tuple[int, int, int] = (64, 4, 3)
    """Width, heads and layers of the text encoders that are trained along."""
    controlnet: str = ""
    """blur, canny or depth: train a ControlNet for the model in `start`, which stays as it is.
    Its hints are made from the pictures; depth maps lie beside them as NAME.depth.png."""
    controlnet_layers: int = 1
    steps: int = 6000
    batch: int = 64
    accumulate: int = 1
    rate: float = 1e-3
    warm_up: int = 200
    cosine: bool = True
    ema: float = 0.999
    caption_dropout: float = 0.1
    encoder_dropout: float = 0.08
    """The share of captions, and of each text encoder's outputs, that a step goes without."""
    shift: float = 1.0
    """Above 1, more of the timesteps are near the noise."""
    random_crops: float = 0.0
    """The share of examples that see a random crop of the position table, not its centre: what
    is learned at one size then holds at others (Stability AI trained SD3.5 Medium so)."""
    prompt_tokens: int = 77
    """Cut prompts after so many tokens: faster, for captions that are never longer."""
    clip_norm: float = 1.0
    weight_decay: float = 0.01
    bf16: bool = True
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    save_every: int = 500
    samples: tuple[str, ...] = ()
    """Captions to draw with every checkpoint; needs `vae` and `tokenizer`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Written into the finished checkpoint."""

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
        )


WORDS = {
    str: "a text", bool: "true or false", int: "a whole number", float: "a number",
    tuple: "a list", dict: "a table",
}  # fmt: skip
PATHS = ("output", "images", "vae", "tokenizer", "text_encoders", "start")
TEXTS = ("examples", "samples")


def read_config(path: Path) -> TrainingConfig:
    """A TOML file. Raises SettingError for an unknown key, a value of another type, a lack."""
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
        if name not in known:
            raise SettingError(
                f"'{path.name}' has an unknown key '{name}'. Known are: {', '.join(known)}."
            )
        if name == "examples" and isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        kind = {"output": str, "metadata": dict}.get(name, type(known[name].default))
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
    config = TrainingConfig(**values)
    if bool(config.images) == bool(config.examples):
        raise SettingError(f"'{path.name}' needs either 'images' or 'examples'.")
    for size in config.sizes:
        numbers = isinstance(size, tuple) and all(isinstance(side, int) for side in size)
        if not numbers or len(size) != 2 or any(side % 16 or side <= 0 for side in size):
            raise SettingError(
                f"'{path.name}': sizes has {size}; a size is a width and a height in pixels, "
                "multiples of 16, such as [128, 96]."
            )
    if config.controlnet:
        check_controlnet(config, path.name)
    needs = ["vae", "tokenizer"] if config.images or config.samples else []
    for name in needs:
        if not getattr(config, name):
            why = "images" if config.images else "samples"
            raise SettingError(f"'{path.name}': '{why}' needs the key '{name}' too.")
    return config


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


class _RMSNorm(nn.RMSNorm):
    """In the dtype of its input, as autocast leaves it out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _Operations:
    Linear, Conv2d, LayerNorm, RMSNorm = nn.Linear, nn.Conv2d, nn.LayerNorm, _RMSNorm


def plain_attention(q: Tensor, k: Tensor, v: Tensor, context_tokens: int) -> Tensor:
    """Softmax attention without a fused kernel: on a CPU its backward pass is the faster one."""
    weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Trained(nn.Module):
    """All that learns: the network and both text encoders."""

    def __init__(self, config: TrainingConfig):
        super().__init__()
        self.diffusion_model = MMDiTX(config.network, _Operations)
        self.clip_l = ClipTextModel(clip_l(*config.clip_l))
        self.clip_g = ClipTextModel(clip_g(*config.clip_g))
        self.controlnet: ControlNetEmbedder | None = None
        if config.controlnet:
            hidden = config.network.hidden
            described = ControlNetConfig(
                "2b", config.controlnet_layers, hidden, hidden, config.controlnet
            )
            self.controlnet = ControlNetEmbedder(described, _Operations)

    def initialise(self) -> None:
        """As in the paper: every adaLN and the final layer start at zero, so blocks are idle."""
        network = self.diffusion_model
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        places = torch.arange(network.config.pos_embed_max_size)
        network.pos_embed.copy_(grid_positions(places, places, network.config.hidden))
        for name, parameter in network.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
        used = self.clip_l.config.hidden_size + self.clip_g.config.hidden_size
        nn.init.normal_(network.context_embedder.weight, std=used**-0.5)
        for encoder in (self.clip_l, self.clip_g):
            encoder.initialise()

    def steer(self) -> None:
        """Let the ControlNet alone learn: it begins as a copy of the base that changes nothing."""
        base, control = self.diffusion_model.requires_grad_(False), self.controlnet
        assert control is not None
        control.x_embedder.load_state_dict(base.x_embedder.state_dict())
        control.t_embedder.load_state_dict(base.t_embedder.state_dict())
        for linear in control.y_embedder.mlp:
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        for block, joint in zip(control.transformer_blocks, base.joint_blocks):
            source = joint.get_submodule("x_block").state_dict()
            wanted = block.state_dict()
            block.load_state_dict({key: source[key][: len(t)] for key, t in wanted.items()})
        for silent in (*control.controlnet_blocks, control.pos_embed_input):
            for parameter in silent.parameters():
                nn.init.zeros_(parameter)

    def encode(
        self, tokens_l: Tensor, tokens_g: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Context and pooled; kept: (2, B), 0 where an encoder's output is dropped."""
        encoded = [self.clip_l(tokens_l), self.clip_g(tokens_g)]
        if kept is not None:
            encoded = [
                (hidden * keep[:, None, None], pooled * keep[:, None])
                for (hidden, pooled), keep in zip(encoded, kept)
            ]
        return joined(encoded, self.diffusion_model.config.context_dim)


def draw_timesteps(count: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Logit-normal in 0..1, most at the middle of the way; a larger shift moves it to the noise."""
    return shifted(torch.sigmoid(torch.randn(count, generator=generator)), shift)


def crops(
    table: Tensor, size: Size, count: int, share: float, generator: torch.Generator
) -> Tensor:
    """Crops of a position table (S, S, C), rows x columns: (count, rows * columns, C).

    A `share` of them lie anywhere, the others at the centre, where sampling looks.
    """
    rows, columns = size
    moved = torch.rand(count, generator=generator) < share
    corners = []
    for side, whole in zip(size, table.shape):
        anywhere = torch.randint(whole - side + 1, (count,), generator=generator)
        corners.append(torch.where(moved, anywhere, (whole - side) // 2))
    top, left = corners
    down = (top[:, None] + torch.arange(rows))[:, :, None]
    across = (left[:, None] + torch.arange(columns))[:, None, :]
    return table[down, across].flatten(1, 2)


def flow_loss(
    model: MMDiTX,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    context: Tensor,
    y: Tensor,
    positions: Tensor | None = None,
    control: ControlNetEmbedder | None = None,
    hint: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the velocity noise - x0; x0 and hint: (B, 16, H, W), sigma: (B,)."""
    share = sigma[:, None, None, None]
    attend = plain_attention if x0.device.type == "cpu" else attention
    x = (1 - share) * x0 + share * noise
    residuals: list[Tensor] = []
    if control is not None and hint is not None:
        layers = control(model, x, 1000 * sigma, y, hint, attend)
        residuals = [layers[i] for i in control.config.spread(model.config.depth)]
    velocity = model(
        x, 1000 * sigma, context, y, attend=attend, residuals=residuals, positions=positions
    )
    return (velocity.float() - (noise - x0)).square().mean()


class Run:
    """A training run: its data, model, optimiser, moving average and step.

    Raises SettingError or CheckpointError for data or files that can't be used.
    """

    def __init__(self, config: TrainingConfig):
        check_output(Path(config.output))
        encoders = load_encoders(Path(config.text_encoders)) if config.text_encoders else {}
        sizes = {name: encoder.config.size for name, encoder in encoders.items()}
        self.config = config = replace(config, **sizes)
        self.device = torch.device(config.device if config.device != "auto" else best_device())
        self.vae = load_vae(Path(config.vae)) if config.vae else None
        self.tokenize = tokenizer(Path(config.tokenizer)) if config.tokenizer else None
        self.groups = self.read_examples()
        torch.manual_seed(config.seed)
        self.model = Trained(config)
        self.model.initialise()
        for name, encoder in encoders.items():
            setattr(self.model, name, encoder)
        if config.start:
            start = load(config.start, dtype=torch.float32).state_dict()
            fill(self.model.diffusion_model, start, config.start, TO_BE_TRAINED)
        if config.controlnet:
            self.model.steer()
        self.model.to(self.device)
        if config.compile:
            self.model.diffusion_model.compile()
        self.learning = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(
            self.learning.values(),
            lr=config.rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.average = {k: p.detach().clone() for k, p in self.learning.items()}
        self.step = 0

    def read_examples(self) -> list[Examples]:
        """One group per size."""
        config = self.config
        if config.examples:
            groups = [read_examples_file(path) for path in config.examples]
        else:
            assert self.vae is not None and self.tokenize is not None, "read_config sees to it"
            groups = read_folder(
                Path(config.images), list(config.sizes), self.vae, self.tokenize, config.controlnet
            )
        if config.controlnet and any("hints" not in group for group in groups):
            raise SettingError("The examples have no hints to train a ControlNet with.")
        cells = 2 * config.pos_embed_max_size
        largest = max(max(group["latents"].shape[2:]) for group in groups)
        if largest > cells:
            raise SettingError(
                f"A picture is {8 * largest} pixels wide or high, but pos_embed_max_size "
                f"{config.pos_embed_max_size} allows {8 * cells}."
            )
        return groups

    @property
    def state_file(self) -> Path:
        return Path(self.config.output) / STATE

    def rate(self) -> float:
        """Warm-up, then constant or a cosine down to a twentieth."""
        config = self.config
        warm = min(1.0, (self.step + 1) / max(1, config.warm_up))
        if not config.cosine:
            return config.rate * warm
        progress = min(1.0, self.step / config.steps)
        return config.rate * warm * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * progress)))

    def batch_loss(self, generator: torch.Generator) -> Tensor:
        """The loss of a batch from one group, larger groups more often."""
        config, batch = self.config, self.config.batch
        counts = torch.tensor([len(group["latents"]) for group in self.groups], dtype=torch.float)
        examples = self.groups[int(torch.multinomial(counts, 1, generator=generator))]
        chosen = torch.randint(len(examples["latents"]), (batch,), generator=generator)
        uncaptioned = torch.rand(batch, generator=generator) < config.caption_dropout
        kept = (torch.rand(2, batch, generator=generator) >= config.encoder_dropout).float()
        x0 = to_model(examples["latents"][chosen].float())
        noise = torch.randn(x0.shape, generator=generator)
        sigma = draw_timesteps(batch, generator, config.shift)
        positions = None
        if config.random_crops:
            network = self.model.diffusion_model
            size = config.pos_embed_max_size
            table = network.pos_embed.view(size, size, -1)
            patch = network.config.patch_size
            patches = (x0.shape[2] // patch, x0.shape[3] // patch)
            positions = crops(table, patches, batch, config.random_crops, generator)
        tokens = []
        for name in ("tokens_l", "tokens_g"):
            ids = examples[name][chosen, : config.prompt_tokens].long()
            ids[uncaptioned] = examples[f"{name}_empty"][: config.prompt_tokens].long()
            tokens.append(ids.to(self.device))
        x0, noise, sigma, kept = (t.to(self.device) for t in (x0, noise, sigma, kept))
        hint = None
        if self.model.controlnet is not None:
            hint = to_model(examples["hints"][chosen].float()).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            context, y = self.model.encode(*tokens, kept=kept)
            return flow_loss(
                self.model.diffusion_model,
                x0,
                noise,
                sigma,
                context,
                y,
                positions,
                self.model.controlnet,
                hint,
            )

    def advance(self) -> float:
        """One optimiser step; everything random in it depends on the seed and the step alone."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        total = 0.0
        for _ in range(config.accumulate):
            loss = self.batch_loss(generator) / config.accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.learning.values(), config.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.learning.items():
                self.average[name].lerp_(parameter, 1 - decay)
        return total

    def save(self) -> None:
        """Write everything that a resumed run needs, under the final name once it is whole.

        Raises CheckpointError when it can't be written; the last checkpoint is then intact.
        """
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for name, parameter in self.learning.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimiser.state:
                    tensors[f"{key}.{name}"] = self.optimiser.state[parameter][key]
        write_file(self.state_file, tensors, {"step": self.step, "config": asdict(self.config)})

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        if not self.state_file.exists():
            return
        tensors, metadata = read_file(self.state_file)
        self.step = int(metadata["step"])
        fill(self.model, under(tensors, "model."), str(self.state_file), TO_BE_TRAINED)
        self.average = {k: v.to(self.device) for k, v in under(tensors, "average.").items()}
        first, second = under(tensors, "exp_avg."), under(tensors, "exp_avg_sq.")
        for name, parameter in self.learning.items():
            if name not in first:
                continue
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": first[name].to(self.device),
                "exp_avg_sq": second[name].to(self.device),
            }

    def averaged(self) -> Trained:
        """A copy of the model with the moving average's weights."""
        model = Trained(self.config)
        model.load_state_dict({**self.model.state_dict(), **self.average})
        return model.requires_grad_(False).eval()

    def draw_samples(self) -> None:
        """Draw the captions of `samples` in a row: samples/STEP.png."""
        from PIL import Image

        if not self.config.samples:
            return
        assert self.vae is not None and self.tokenize is not None, "read_config sees to it"
        model = self.averaged().to(self.device)
        encoders = {"clip_l": model.clip_l, "clip_g": model.clip_g}
        captions = list(self.config.samples)
        pipeline = Pipeline(
            model.diffusion_model, encoders, self.vae.to(self.device), self.tokenize
        )
        height, width = (8 * side for side in self.groups[0]["latents"].shape[2:])
        drawn = pipeline.draw(captions, list(range(len(captions))), Settings(size=(width, height)))
        file = Path(self.config.output) / SAMPLES / f"{self.step:06}.png"
        write_picture(file, Image.fromarray(torch.cat(drawn, dim=1).numpy()), replace=True)

    def write_model(self, path: Path) -> None:
        """The moving average in fp16: a single-file SD3.5 checkpoint, with the VAE if known, or
        the ControlNet alone."""
        model = self.averaged()
        if model.controlnet is not None:
            tensors = {key: t.half().cpu() for key, t in model.controlnet.state_dict().items()}
            number = CONTROL_TYPES.index(self.config.controlnet)
            tensors["control_type"] = torch.tensor([number], dtype=torch.int32)
            about = {"steps_trained": self.step, **self.config.metadata}
            write_file(path, tensors, {"sd35_config": about})
            return
        parts = {
            "model.diffusion_model.": model.diffusion_model.state_dict(),
            "text_encoders.clip_l.transformer.": model.clip_l.state_dict(),
            "text_encoders.clip_g.transformer.": model.clip_g.state_dict(),
            "first_stage_model.": self.vae.state_dict() if self.vae else {},
        }
        tensors = {
            prefix + key: tensor.half().cpu()
            for prefix, part in parts.items()
            for key, tensor in part.items()
        }
        described = {
            "text_encoders": {
                "clip_l": model.clip_l.config.described(),
                "clip_g": model.clip_g.config.described(),
            },
            "steps_trained": self.step,
            **self.config.metadata,
        }
        title = str(self.config.metadata.get("title", "a small SD3.5"))
        write_file(path, tensors, {"sd35_config": described, "modelspec.title": title})

    def go_on(self) -> None:
        """Train to the last step, with a progress bar; Ctrl-C finishes the step, saves, stops."""
        from tqdm import tqdm

        config, smooth = self.config, 0.0
        sweep(Path(config.output) / SAMPLES)
        with (
            _until_interrupted() as interrupted,
            tqdm(total=config.steps, initial=self.step, unit="step", mininterval=1.0) as bar,
        ):
            while self.step < config.steps and not interrupted():
                loss = self.advance()
                smooth = loss if smooth == 0 else 0.98 * smooth + 0.02 * loss
                bar.update()
                bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
                if self.step % config.save_every == 0 and self.step < config.steps:
                    self.save()
                    self.draw_samples()
        self.save()
        model_file = Path(config.output) / MODEL
        self.write_model(model_file)
        self.draw_samples()
        log.info(f"stopped at step {self.step} of {config.steps}; wrote {model_file}")


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; a second one stops at once."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler
    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def check_output(folder: Path) -> None:
    """Raise SettingError where a run would replace what no training wrote."""
    state, model = (metadata_of(folder / name) for name in (STATE, MODEL))
    known = {STATE: "step" in state and "config" in state}
    known[MODEL] = "steps_trained" in model.get("sd35_config", "")
    others = [folder / name for name in known if os.path.lexists(folder / name) and not known[name]]
    if not any(known.values()):
        others += sorted(p for p in (folder / SAMPLES).glob("*.png") if p.stem.isdigit())
    if others:
        raise SettingError(
            f"'{others[0]}' was not written by a training, or is damaged, and this run would "
            "replace it. Choose another folder as 'output', or move that file away."
        )


def read_examples_file(path: str) -> Examples:
    """A group of examples. Raises CheckpointError or SettingError for a file without them."""
    tensors, _ = read_file(path)
    wanted = ("latents", "tokens_l", "tokens_g", "tokens_l_empty", "tokens_g_empty")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise SettingError(f"'{path}' has no examples to train on: it lacks {missing[0]}.")
    return tensors


def best_device() -> str:
    """cuda or mps where there is one, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(arguments) != 1:
        log.error("usage: python -m sd35_core.training CONFIG.toml")
        return 2
    try:
        run = Run(read_config(Path(arguments[0])))
        run.resume()
        run.go_on()
    except (SD35Error, OSError) as error:
        log.error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
