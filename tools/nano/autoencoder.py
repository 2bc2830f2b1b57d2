"""Train the tiny autoencoder on scenes: python -m tools.nano.autoencoder"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sd35_core.checkpoint.tensor_file import write_file
from sd35_core.encoders.autoencoder import TinyAutoencoder
from sd35_core.network import latent

from .pictures import nano_folder
from .prepare import pictures_of
from .scenes import draw_scene

CROP = 64
FIRST_HELD_OUT_SEED = 1_000_000


def crops(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random 64x64 cuts of pictures (N, 3, H, W) uint8, half of the batches mirrored; 0..1."""

    def below(limit: int) -> list[int]:
        return torch.randint(limit, (count,), generator=generator).tolist()

    tops, lefts = below(pool.shape[2] - CROP + 1), below(pool.shape[3] - CROP + 1)
    cut = [pool[i, :, y : y + CROP, x : x + CROP] for i, y, x in zip(below(len(pool)), tops, lefts)]
    batch = torch.stack(cut).float() / 255
    if torch.rand((), generator=generator) < 0.5:
        batch = batch.flip(-1)
    return batch.contiguous(memory_format=torch.channels_last)


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """4 L2 + L1 + the L1 of differences between neighbours, both ways."""
    edges = [F.l1_loss(made.diff(dim=d), wanted.diff(dim=d)) for d in (-2, -1)]
    return 4 * F.mse_loss(made, wanted) + F.l1_loss(made, wanted) + edges[0] + edges[1]


def range_loss(z: Tensor) -> Tensor:
    """Least where every channel of z: (B, 16, H, W) has mean 0, variance 1, and few beyond 2."""
    variance, mean = torch.var_mean(z, dim=(0, 2, 3))
    moments = mean.square().mean() + (variance - 1).square().mean()
    return 0.02 * moments + 0.001 * z.square().clamp(min=4).mean()


def loss_of(model: TinyAutoencoder, image: Tensor, noise: float) -> Tensor:
    """The decoder sees latents with a little noise, so that near latents give near pictures."""
    with torch.autocast("cpu", torch.bfloat16):
        z = model.taesd_encoder(image).float()
        made = model.taesd_decoder(z + noise * torch.randn_like(z)).float()
    return reconstruction_loss(made, image) + range_loss(z)


@torch.no_grad()
def psnr(model: TinyAutoencoder, pictures: Tensor) -> float:
    """Mean decibels of pictures (B, 3, H, W) uint8 there and back."""
    levels = []
    for part in pictures.split(16):
        image = part.float().div(255).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            made = model.decode(model.encode(image)).float().clamp(0, 1)
        levels.append(-10 * (made - image).square().mean(dim=(1, 2, 3)).log10())
    return float(torch.cat(levels).mean())


def train(pool: Tensor, held_out: Tensor, options: argparse.Namespace) -> TinyAutoencoder:
    """The moving average of a run with warm-up and cosine rate."""
    model, average = TinyAutoencoder(), TinyAutoencoder().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    for each in (model, average):
        each.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    learning = {k: p for k, p in model.named_parameters() if p.requires_grad}
    followers = dict(average.named_parameters())
    optimiser = torch.optim.AdamW(learning.values(), betas=(0.9, 0.99), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    started = time.monotonic()
    for step in range(1, options.steps + 1):
        warm = min(1.0, step / 200)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / options.steps)
        for group in optimiser.param_groups:
            group["lr"] = max(options.rate * warm * cosine, 1e-5)
        loss = loss_of(model, crops(pool, options.batch, generator), options.noise)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
        optimiser.step()
        decay = min(0.995, (1 + step) / (10 + step))
        for key, parameter in learning.items():
            followers[key].lerp_(parameter.detach(), 1 - decay)
        if step % 100 == 0:
            print(f"step {step}  {time.monotonic() - started:.0f} s  loss {loss:.4f}", flush=True)
        if step % 500 == 0:
            print(f"held-out PSNR {psnr(average, held_out):.2f} dB", flush=True)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=nano_folder() / "vae.safetensors")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=0.08)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pool = pictures_of([draw_scene(seed) for seed in range(options.scenes)], 0)
    unseen = [draw_scene(FIRST_HELD_OUT_SEED + i, unseen=True) for i in range(64)]
    held_out = pictures_of(unseen, 0)
    model = train(pool, held_out, options)
    model.vae_scale.fill_(latent.SCALE)
    model.vae_shift.fill_(latent.SHIFT)
    model.half()
    figure = psnr(model.float(), held_out)
    tensors = {key: tensor.half() for key, tensor in model.state_dict().items()}
    write_file(options.out, tensors, {"psnr": f"{figure:.2f} dB on held-out scenes"})
    print(f"wrote {options.out}, held-out PSNR {figure:.2f} dB")


if __name__ == "__main__":
    main()
