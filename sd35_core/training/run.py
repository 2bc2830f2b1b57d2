"""A run of training that can be stopped at any time and goes on bit for bit.

In the folder `output` are then state.safetensors, the run itself; model.safetensors, a checkpoint
for SD35Loader, a ControlNet or a LoRA; best.safetensors, the best LoRA on the way; loss.png, the
curve of the losses; class.safetensors, pictures of the class; samples/, pictures on the way, and
samples.png, a strip of them. `run_alone` keeps other runs out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.tensor_file import TensorFile, write_file
from ..encoders.autoencoder import PixelSpace
from ..encoders.described import T5, load_encoders
from ..encoders.t5 import t5_tokenizer
from ..encoders.text_encoder import KINDS, tokenizer
from ..errors import SettingError
from ..network.latent import to_model
from ..pipeline import MODEL, STATE, load_vae
from ..whole_file import sweep, write_picture
from .config import BEST, CURVE, SAMPLES, STRIP, TrainingConfig, shape_given
from .dataset import Examples, Size
from .drawing import Drawing, class_examples, own_drawing, sample_row, strip_of
from .estimate import best_device, check_memory
from .gathering import check_examples, gather_examples, held_out
from .history import History
from .judging import JUDGED, Judged, judged_before
from .objective import crops, draw_timesteps, flow_losses
from .optimisers import optimiser_of_each, optimisers
from .prompts import dropouts, read_prompts
from .state import check_output, read_state, write_state
from .trained import Trained, compile_blocks, to_be_trained, trainable_base
from .written import about_run, learned, lora_metadata


class DivergedError(SettingError):
    """Losses or gradients that are no numbers any more."""


class Run:
    """A training run: its data, model, optimiser, moving average and step.

    Raises SettingError or CheckpointError for data or files that can't be used.
    """

    def __init__(
        self,
        config: TrainingConfig,
        groups: list[Examples] | None = None,
        captions: Sequence[str] = (),
        drawing: Drawing | None = None,
    ):
        """`groups` and their `captions` are examples that are at hand already; `drawing` is for
        runs whose text encoders and VAE are another program's."""
        check_output(Path(config.output))
        encoders = load_encoders(TensorFile(config.text_encoders)) if config.text_encoders else {}
        sizes = {name: encoder.config.size for name, encoder in encoders.items()}
        self.config = config = replace(config, **sizes)
        self.device = torch.device(config.device if config.device != "auto" else best_device())
        network = None
        if config.lora_rank:
            check_memory(config, groups, self.device)
            network = trainable_base(config.start, config.bf16)
            self.config = config = replace(config, **shape_given(network.config))
        self.vae = PixelSpace(config.pixels) if config.pixels else None
        if config.vae:
            self.vae = load_vae(Path(config.vae))
        self.tokenize = tokenizer(Path(config.tokenizer)) if config.tokenizer else None
        t5 = config.t5xxl and config.tokenizer_t5
        self.tokenize_t5 = t5_tokenizer(Path(config.tokenizer_t5)) if t5 else None
        self.captions = list(captions)
        if groups is None:
            groups, self.captions = gather_examples(
                config, self.vae, self.tokenize, self.tokenize_t5
            )
        shape = network.config if network else config.network
        check_examples(groups, config, shape.pooled_dim)
        self.groups, self.held_out = held_out(groups, config)
        self.of_class: list[Examples] = []
        self.given = drawing
        torch.manual_seed(config.seed)
        self.model = to_be_trained(config, network, encoders)
        self.model.to(self.device)
        if config.compile:
            compile_blocks(self.model)
        self.learning = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        self.optimisers = optimisers(self.learning, config)
        self.average = {k: p.detach().clone() for k, p in self.learning.items()}
        self.dropouts = dropouts(config.encoder_dropout, config.dropout_of)
        self.history = History()
        self.best: Judged | None = None
        self.last: Judged | None = None
        self.strip: Any = None  # of samples, a picture of Pillow's
        self.seen: list[tuple[Tensor, Tensor]] = []  # noise levels and losses of this step
        self.step = 0

    @property
    def optimiser_of(self) -> dict[str, torch.optim.Optimizer]:
        """Of each parameter that learns, by its name."""
        return optimiser_of_each(self.learning, self.optimisers)

    @property
    def size(self) -> Size:
        """Width and height in pixels of the first group."""
        height, width = self.groups[0]["latents"].shape[2:]
        return self.config.cell * width, self.config.cell * height

    @property
    def state_file(self) -> Path:
        return Path(self.config.output) / STATE

    @property
    def due(self) -> bool:
        """Whether a run that nobody stops is saved and judged at this step."""
        return self.step % self.config.save_every == 0 or self.step == self.config.steps

    def rate(self) -> float:
        """Warm-up, then constant or a cosine down to a twentieth."""
        config = self.config
        warm = min(1.0, (self.step + 1) / max(1, config.warm_up))
        if not config.cosine:
            return config.rate * warm
        progress = min(1.0, self.step / config.steps)
        return config.rate * warm * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * progress)))

    def batch_loss(
        self, generator: torch.Generator, groups: Sequence[Examples] | None = None
    ) -> Tensor:
        """The loss of a batch from one group, larger groups more often."""
        config, batch = self.config, self.config.batch
        groups = groups or self.groups
        counts = torch.tensor([len(group["latents"]) for group in groups], dtype=torch.float)
        examples = groups[int(torch.multinomial(counts, 1, generator=generator))]
        chosen = torch.randint(len(examples["latents"]), (batch,), generator=generator)
        uncaptioned = torch.rand(batch, generator=generator) < config.caption_dropout
        rates = torch.tensor([[self.dropouts[name]] for name in KINDS])
        kept = (torch.rand(2, batch, generator=generator) >= rates).float()
        x0 = to_model(examples["latents"][chosen].float())
        noise = torch.randn(x0.shape, generator=generator)
        sigma = draw_timesteps(batch, generator, config.shift, config.timesteps)
        positions = None
        if config.random_crops:
            network = self.model.diffusion_model
            size = config.pos_embed_max_size
            table = network.pos_embed.view(size, size, -1)
            patch = network.config.patch_size
            patches = (x0.shape[2] // patch, x0.shape[3] // patch)
            positions = crops(table, patches, batch, config.random_crops, generator)
        t5 = "context" in examples or config.t5xxl
        heard = t5 and float(torch.rand((), generator=generator)) >= self.dropouts[T5]
        x0, noise, sigma = (t.to(self.device) for t in (x0, noise, sigma))
        hint = None
        if self.model.controlnet is not None:
            hint = to_model(examples["hints"][chosen].float()).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            least = (config.prompt_tokens, config.t5_tokens)
            context, y = read_prompts(
                self.model, examples, chosen, uncaptioned, kept, bool(heard), least
            )
            losses = flow_losses(
                self.model.diffusion_model, x0, noise, sigma, context, y, positions,
                self.model.controlnet, hint, config.checkpoint,
            )  # fmt: skip
        self.seen.append((sigma, losses.detach()))
        return losses.mean()

    def advance(self) -> float:
        """One optimiser step; everything random in it depends on the seed and the step alone."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        total = 0.0
        self.seen.clear()
        for _ in range(config.accumulate):
            loss = self.batch_loss(generator) / config.accumulate
            loss.backward()
            total += loss.item()
            if self.of_class:
                heard = len(self.seen)
                beside = config.class_weight * self.batch_loss(generator, self.of_class)
                (beside / config.accumulate).backward()
                del self.seen[heard:]  # the curve is the subject's
        length = float(nn.utils.clip_grad_norm_(self.learning.values(), config.clip_norm))
        if not math.isfinite(total) or not math.isfinite(length):
            raise DivergedError(
                f"Training ran away at step {self.step + 1}: the loss is {total:g}, the gradient's "
                f"length {length:g}. What was learned before is kept. Lower the rate (now "
                f"{config.rate:g}) and look for broken pictures; then begin again."
            )
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.rate()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.history.add(*map(torch.cat, zip(*self.seen)))
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.learning.items():
                self.average[name].lerp_(parameter, 1 - decay)
        return total

    def save(self) -> None:
        """Write everything that a resumed run needs; as `write_state`."""
        about: dict[str, Any] = {"step": self.step, "config": asdict(self.config)}
        if self.best is not None:
            about["best"] = self.best
        write_state(
            self.state_file, self.learning, self.average, self.optimiser_of, self.history, about
        )

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one; as `read_state`."""
        if not self.state_file.exists():
            return
        self.average, self.history, said = read_state(
            self.state_file, self.model, self.learning, self.optimiser_of, self.device
        )
        self.step = int(said["step"])
        if (Path(self.config.output) / BEST).exists():
            self.best = judged_before(said.get("best", ""))

    def keep_best(self) -> None:
        """Write a LoRA under the name BEST where the average is better than at every step at which
        it was judged before, by this run or by those that it goes on from.

        It is judged by the loss of the same batches with the same noise, of pictures that were held
        out where there are some.
        """
        if not self.config.lora_rank:
            return
        generator = torch.Generator().manual_seed(self.config.seed)
        with self.averaged():
            losses = [
                float(self.batch_loss(generator, self.held_out or self.groups))
                for _ in range(JUDGED)
            ]
        self.last = Judged(self.step, tuple(losses))
        best = math.inf if self.best is None else self.best.loss
        if self.last.loss < best:  # which a loss that is no number is not
            self.best = self.last
            self.write_model(Path(self.config.output) / BEST)

    def better(self) -> Judged | None:
        """The best under the name BEST, where the last is worse by more than noise."""
        better = self.best and self.last and self.best.beats(self.last)
        return self.best if better else None

    @contextmanager
    def averaged(self) -> Iterator[Trained]:
        """The model with the moving average's weights, for as long as they are needed."""
        self.swap()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Have weights that learn and their average change places."""
        for name, parameter in self.learning.items():
            learned = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name] = learned

    @cached_property
    def drawing(self) -> Drawing:
        """What was given, else with the run's own text encoders and VAE."""
        if self.given is not None:
            return self.given
        vae, tokenize = self.vae, self.tokenize
        assert vae is not None and tokenize is not None, "read_config sees to it"
        return own_drawing(self.config, self.model, vae, tokenize, self.tokenize_t5)

    def draw_samples(self) -> None:
        """Draw the captions of `samples` in a row, samples/STEP.png, and add it to the strip."""
        if not self.config.samples:
            return
        with self.averaged() as model:
            row = sample_row(self.drawing, model, self.config, self.size)
        folder = Path(self.config.output)
        write_picture(folder / SAMPLES / f"{self.step:06}.png", row, replace=True)
        self.strip = strip_of(folder / SAMPLES, self.step)
        write_picture(folder / STRIP, self.strip, replace=True)

    def write_model(self, path: Path) -> None:
        """The moving average in fp16: a single-file SD3.5 checkpoint, with the VAE if known, or
        the ControlNet or the LoRA alone."""
        config = self.config
        with self.averaged() as model:
            tensors = learned(model, self.vae, config)
        metadata = {**self.about_lora, "ss_steps": self.step} if config.lora_rank else {}
        metadata |= about_run(self.model, config, self.size, self.step)
        write_file(path, tensors, metadata)

    @cached_property
    def about_lora(self) -> dict[str, Any]:
        """What a LoRA's file says of how it was trained; the base is read once for its hash."""
        network = self.model.diffusion_model.config
        return lora_metadata(self.config, network, self.size, self.captions)

    def go_on(
        self,
        show: Callable[[float], object] = lambda loss: None,
        interrupted: Callable[[], bool] = lambda: False,
        drawn: Callable[[int, int], None] = lambda count, total: None,
    ) -> Path:
        """Train to the last step, or to the step at which it is interrupted, and save; the file of
        what was learned. `show` hears the loss of every step, `drawn` how many pictures of the
        class there are before it."""
        config = self.config
        file = Path(config.output) / MODEL
        sweep(file.parent / SAMPLES)
        if config.class_prompt and not self.of_class:
            found = class_examples(
                self.drawing, self.model, config, self.groups, drawn, interrupted
            )
            self.of_class = [found] if found else []
        while self.step < config.steps and not interrupted():
            try:
                show(self.advance())
            except DivergedError:
                self.keep_best()
                self.write_model(file)
                raise
            if self.due:
                self.keep_best()
                self.leave()
                self.draw_samples()
        if not self.due:
            self.leave()
        self.write_model(file)
        return file

    def leave(self) -> None:
        """What lies in the folder from now on: the run and its curve."""
        self.save()
        write_picture(Path(self.config.output) / CURVE, self.history.curve(), replace=True)
