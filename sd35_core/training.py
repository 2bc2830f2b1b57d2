"""Train a small SD3.5, with its text encoders, from latents and captions.

    python -m sd35_core.training CONFIG.toml

Rectified flow with logit-normal timesteps (Esser et al. 2024, arXiv:2403.03206). A run can be
stopped at any time and goes on bit for bit where its last checkpoint was written.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import read_file, write_file
from .config import MMDiTXConfig
from .errors import SettingError
from .latent import to_model
from .layers import attention
from .mmditx import MMDiTX
from .sampling import shifted
from .text_encoder import ClipTextModel, clip_g, clip_l, joined

log = logging.getLogger("sd35")


@dataclass(frozen=True)
class TrainingConfig:
    """What a TOML file may say; paths are relative to it."""

    examples: str
    output: str
    depth: int = 4
    dual_blocks: int = 2
    pos_embed_max_size: int = 32
    context_dim: int = 4096
    clip_l: tuple[int, int, int] = (48, 3, 3)
    clip_g: tuple[int, int, int] = (64, 4, 3)
    steps: int = 6000
    batch: int = 64
    accumulate: int = 1
    rate: float = 1e-3
    warm_up: int = 200
    cosine: bool = True
    ema: float = 0.999
    caption_dropout: float = 0.1
    encoder_dropout: float = 0.08
    shift: float = 1.0
    clip_norm: float = 1.0
    weight_decay: float = 0.01
    bf16: bool = True
    compile: bool = False
    device: str = "cpu"
    seed: int = 0
    save_every: int = 500
    log_every: int = 50
    metadata: dict[str, Any] = field(default_factory=dict)

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


def read_config(path: Path) -> TrainingConfig:
    """A TOML file. Raises SettingError for a key that does not exist or a value of another type."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"'{path}' can't be read as TOML: {error}") from error
    known = {f.name: f for f in fields(TrainingConfig)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise SettingError(
            f"'{path.name}' has an unknown key '{unknown[0]}'. Known are: {', '.join(known)}."
        )
    for name in ("examples", "output"):
        if name not in values:
            raise SettingError(f"'{path.name}' lacks the key '{name}'.")
        values[name] = str((path.parent / Path(values[name]).expanduser()).resolve())
    for name in ("clip_l", "clip_g"):
        if name in values:
            values[name] = tuple(values[name])
    return TrainingConfig(**values)


def position_table(width: int, size: int) -> Tensor:
    """Sines and cosines of row and column, (1, size * size, width)."""
    quarter = width // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(size, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns = axis.repeat(size, 1)
    rows = axis.repeat_interleave(size, dim=0)
    return torch.cat([columns, rows], dim=-1)[None].float()


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

    def initialise(self) -> None:
        """As in the paper: every adaLN and the final layer start at zero, so blocks are idle."""
        network = self.diffusion_model
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        size = network.config.pos_embed_max_size
        network.pos_embed.copy_(position_table(network.config.hidden, size))
        for name, parameter in network.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
        used = self.clip_l.config.hidden_size + self.clip_g.config.hidden_size
        nn.init.normal_(network.context_embedder.weight, std=used**-0.5)
        for encoder in (self.clip_l, self.clip_g):
            embeddings = encoder.text_model.embeddings
            nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
            nn.init.normal_(embeddings.position_embedding.weight, std=0.1)

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


def flow_loss(
    model: MMDiTX, x0: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, y: Tensor
) -> Tensor:
    """Mean squared error of the velocity noise - x0; x0: (B, 16, H, W), sigma: (B,)."""
    share = sigma[:, None, None, None]
    attend = plain_attention if x0.device.type == "cpu" else attention
    x = (1 - share) * x0 + share * noise
    velocity = model(x, 1000 * sigma, context, y, attend=attend)
    return (velocity.float() - (noise - x0)).square().mean()


class Run:
    """A training run: its model, optimiser, moving average and step."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.examples = load_file(config.examples)
        torch.manual_seed(config.seed)
        self.model = Trained(config)
        self.model.initialise()
        self.model.to(config.device)
        if config.compile:
            self.model.diffusion_model.compile()
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
        )
        self.average = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.step = 0

    @property
    def state_file(self) -> Path:
        return Path(self.config.output) / "state.safetensors"

    def rate(self) -> float:
        """Warm-up, then constant or a cosine down to a twentieth."""
        config = self.config
        warm = min(1.0, (self.step + 1) / max(1, config.warm_up))
        if not config.cosine:
            return config.rate * warm
        progress = min(1.0, self.step / config.steps)
        return config.rate * warm * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * progress)))

    def batch_loss(self, generator: torch.Generator) -> Tensor:
        config, examples = self.config, self.examples
        chosen = torch.randint(len(examples["latents"]), (config.batch,), generator=generator)
        uncaptioned = torch.rand(config.batch, generator=generator) < config.caption_dropout
        kept = (torch.rand(2, config.batch, generator=generator) >= config.encoder_dropout).float()
        x0 = to_model(examples["latents"][chosen].float())
        noise = torch.randn(x0.shape, generator=generator)
        sigma = draw_timesteps(config.batch, generator, config.shift)
        tokens = []
        for name in ("tokens_l", "tokens_g"):
            ids = examples[name][chosen].long()
            ids[uncaptioned] = examples[f"{name}_empty"].long()
            tokens.append(ids.to(config.device))
        x0, noise, sigma, kept = (t.to(config.device) for t in (x0, noise, sigma, kept))
        kind = torch.device(config.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=config.bf16):
            context, y = self.model.encode(*tokens, kept=kept)
            return flow_loss(self.model.diffusion_model, x0, noise, sigma, context, y)

    def advance(self) -> float:
        """One optimiser step; everything random in it depends on the seed and the step alone."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        total = 0.0
        for _ in range(config.accumulate):
            loss = self.batch_loss(generator) / config.accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        return total

    def save(self) -> None:
        """Write everything that a resumed run needs, under the final name once it is whole."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for name, parameter in self.model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimiser.state:
                    tensors[f"{key}.{name}"] = self.optimiser.state[parameter][key]
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.state_file, tensors, {"step": self.step, "config": asdict(self.config)})

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        if not self.state_file.exists():
            return
        tensors, metadata = read_file(self.state_file)

        def under(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.step = int(metadata["step"])
        self.model.load_state_dict(under("model."))
        self.average = {k: v.to(self.config.device) for k, v in under("average.").items()}
        first, second = under("exp_avg."), under("exp_avg_sq.")
        for name, parameter in self.model.named_parameters():
            if name not in first:
                continue
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": first[name].to(self.config.device),
                "exp_avg_sq": second[name].to(self.config.device),
            }

    def averaged(self) -> Trained:
        """A copy of the model with the moving average's weights."""
        model = Trained(self.config)
        model.load_state_dict({**self.model.state_dict(), **self.average})
        return model.requires_grad_(False).eval()

    def go_on(self) -> None:
        """Train to the last step; Ctrl-C saves and stops."""
        started, first, smooth = time.monotonic(), self.step, 0.0
        try:
            while self.step < self.config.steps:
                loss = self.advance()
                smooth = loss if smooth == 0 else 0.98 * smooth + 0.02 * loss
                if self.step % self.config.log_every == 0:
                    pace = (time.monotonic() - started) / (self.step - first)
                    left = pace * (self.config.steps - self.step) / 60
                    log.info(
                        f"step {self.step}/{self.config.steps}  loss {smooth:.4f}  "
                        f"{pace:.2f} s a step, {left:.0f} minutes left"
                    )
                if self.step % self.config.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            log.info(f"stopped at step {self.step}")
        self.save()


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(arguments) != 1:
        log.error("usage: python -m sd35_core.training CONFIG.toml")
        return 2
    try:
        run = Run(read_config(Path(arguments[0])))
        run.resume()
        run.go_on()
    except SettingError as error:
        log.error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
