"""A run of training that can be stopped at any time and goes on bit for bit.

In the folder `output` are then state.safetensors, the run itself; model.safetensors, a checkpoint
for SD35Loader; and samples/, pictures on the way.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.layouts import under
from ..checkpoint.loading import fill, load
from ..checkpoint.tensor_file import TensorFile, read_file, write_file
from ..encoders.autoencoder import PixelSpace
from ..encoders.described import load_encoders
from ..encoders.t5 import t5_tokenizer
from ..encoders.text_encoder import columns_used, tokenizer
from ..errors import CheckpointError, SettingError
from ..network.controlnet import CONTROL_TYPES
from ..network.latent import to_model
from ..pipeline import MODEL, STATE, Pipeline, Settings, load_vae
from ..whole_file import sweep, write_picture
from .config import SAMPLES, TO_BE_TRAINED, TrainingConfig, check_output
from .dataset import Examples, Size, read_examples_file, read_folder
from .objective import crops, draw_timesteps, flow_loss
from .optimisers import MOMENTS, optimisers
from .trained import Trained

log = logging.getLogger("sd35")
MINUTE = 60.0


class Run:
    """A training run: its data, model, optimiser, moving average and step.

    Raises SettingError or CheckpointError for data or files that can't be used.
    """

    def __init__(self, config: TrainingConfig):
        check_output(Path(config.output))
        encoders = load_encoders(TensorFile(config.text_encoders)) if config.text_encoders else {}
        sizes = {name: encoder.config.size for name, encoder in encoders.items()}
        self.config = config = replace(config, **sizes)
        self.device = torch.device(config.device if config.device != "auto" else best_device())
        self.vae = PixelSpace(config.pixels) if config.pixels else None
        if config.vae:
            self.vae = load_vae(Path(config.vae))
        self.tokenize = tokenizer(Path(config.tokenizer)) if config.tokenizer else None
        t5 = config.t5xxl and config.tokenizer_t5
        self.tokenize_t5 = t5_tokenizer(Path(config.tokenizer_t5)) if t5 else None
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
        self.optimisers = optimisers(self.learning, config)
        self.average = {k: p.detach().clone() for k, p in self.learning.items()}
        self.step = 0

    @property
    def optimiser_of(self) -> dict[str, torch.optim.Optimizer]:
        """Of each parameter that learns, by its name."""
        names = {id(parameter): name for name, parameter in self.learning.items()}
        return {
            names[id(parameter)]: optimiser
            for optimiser in self.optimisers
            for group in optimiser.param_groups
            for parameter in group["params"]
        }

    def read_examples(self) -> list[Examples]:
        """One group per size."""
        config = self.config
        if config.examples:
            groups = [read_examples_file(path) for path in config.examples]
        else:
            assert self.vae is not None and self.tokenize is not None, "read_config sees to it"
            groups = read_folder(
                Path(config.images), list(config.sizes), self.vae, self.tokenize,
                config.controlnet, self.tokenize_t5,
            )  # fmt: skip
        if config.t5xxl and any("tokens_t5" not in group for group in groups):
            raise SettingError("The examples have no tokens for T5 to read (tokens_t5).")
        if config.controlnet and any("hints" not in group for group in groups):
            raise SettingError("The examples have no hints to train a ControlNet with.")
        cells = config.patch * config.pos_embed_max_size
        largest = max(max(group["latents"].shape[2:]) for group in groups)
        if largest > cells:
            raise SettingError(
                f"A picture is {config.cell * largest} pixels wide or high, but "
                f"pos_embed_max_size {config.pos_embed_max_size} allows {config.cell * cells}."
            )
        return groups

    @property
    def size(self) -> Size:
        """Width and height in pixels of the first group."""
        height, width = self.groups[0]["latents"].shape[2:]
        return self.config.cell * width, self.config.cell * height

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
        columns = columns_used(examples["tokens_g"][chosen], config.prompt_tokens)
        for name in ("tokens_l", "tokens_g"):
            ids = examples[name][chosen, :columns].long()
            ids[uncaptioned] = examples[f"{name}_empty"][:columns].long()
            tokens.append(ids.to(self.device))
        tokens_t5 = None
        if config.t5xxl and torch.rand((), generator=generator) >= config.encoder_dropout:
            ids = examples["tokens_t5"][chosen].long()
            ids[uncaptioned] = examples["tokens_t5_empty"].long()
            tokens_t5 = ids[:, : columns_used(ids, config.t5_tokens)].to(self.device)
        x0, noise, sigma, kept = (t.to(self.device) for t in (x0, noise, sigma, kept))
        hint = None
        if self.model.controlnet is not None:
            hint = to_model(examples["hints"][chosen].float()).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            context, y = self.model.encode(*tokens, kept=kept, tokens_t5=tokens_t5)
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
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.rate()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
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
        for name, optimiser in self.optimiser_of.items():
            state = optimiser.state.get(self.learning[name], {})
            tensors |= {f"{k}.{name}": state[k] for keys in MOMENTS for k in keys if k in state}
        write_file(self.state_file, tensors, {"step": self.step, "config": asdict(self.config)})

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        if not self.state_file.exists():
            return
        tensors, metadata = read_file(self.state_file)
        self.step = int(metadata["step"])
        fill(self.model, under(tensors, "model."), str(self.state_file), TO_BE_TRAINED)
        self.average = {k: v.to(self.device) for k, v in under(tensors, "average.").items()}
        for name, optimiser in self.optimiser_of.items():
            of_muon = not isinstance(optimiser, torch.optim.AdamW)
            keys = [key for key in MOMENTS[of_muon] if f"{key}.{name}" in tensors]
            if keys and len(keys) < len(MOMENTS[of_muon]):
                raise CheckpointError(
                    f"'{self.state_file}' does not fit {TO_BE_TRAINED}: of the moments of '{name}' "
                    f"it has {keys[0]} alone. Choose another 'output', or begin again."
                )
            state = {key: tensors[f"{key}.{name}"].to(self.device) for key in keys}
            if state and not of_muon:
                state["step"] = torch.tensor(float(self.step))
            optimiser.state[self.learning[name]] = state

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
        captions = list(self.config.samples)
        pipeline = Pipeline(
            model.diffusion_model, model.encoders, self.vae.to(self.device), self.tokenize,
            tokens=self.config.prompt_tokens, tokenize_t5=self.tokenize_t5,
        )  # fmt: skip
        drawn = pipeline.draw(captions, list(range(len(captions))), Settings(size=self.size))
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
            **{
                f"text_encoders.{name}.transformer.": encoder.state_dict()
                for name, encoder in model.encoders.items()
            },
            "first_stage_model.": self.vae.state_dict() if self.vae else {},
        }
        tensors = {
            prefix + key: tensor.half().cpu()
            for prefix, part in parts.items()
            for key, tensor in part.items()
        }
        described = {
            "text_encoders": {n: e.config.described() for n, e in model.encoders.items()},
            "steps_trained": self.step,
            "pixels": self.config.pixels,
            "prompt_tokens": self.config.prompt_tokens,
            "size": list(self.size),
            **self.config.metadata,
        }
        title = str(self.config.metadata.get("title", "a small SD3.5"))
        write_file(path, tensors, {"sd35_config": described, "modelspec.title": title})

    def go_on(self) -> None:
        """Train to the last step, with a progress bar, or a line a minute where there is no
        terminal; Ctrl-C finishes the step, saves, stops."""
        from tqdm import tqdm

        config, smooth, said = self.config, 0.0, time.monotonic()
        sweep(Path(config.output) / SAMPLES)
        with (
            _until_interrupted() as interrupted,
            tqdm(
                total=config.steps, initial=self.step, unit="step", mininterval=1.0, disable=None
            ) as bar,
        ):
            while self.step < config.steps and not interrupted():
                loss = self.advance()
                smooth = loss if smooth == 0 else 0.98 * smooth + 0.02 * loss
                bar.update()
                bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
                if bar.disable and time.monotonic() - said > MINUTE:
                    said = time.monotonic()
                    log.info(f"step {self.step} of {config.steps}, loss {smooth:.4f}")
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


def best_device() -> str:
    """cuda or mps where there is one, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
