"""Train the tiny autoencoder: `python -m tools.nano.autoencoder --steps 5000`."""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_core import latent as scale
from sd35_core.autoencoder import Residual, TinyAutoencoder

from . import pictures, scenes
from .things import COLOURS

EMA = 0.995


def to_tensor(images: list) -> Tensor:
    """PIL RGB pictures of one size -> (B, 3, H, W), uint8."""
    import numpy

    stacked = numpy.stack([numpy.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def pool(count: int, seed: int) -> Tensor:
    """Pictures (count, 3, 128, 128) uint8: any emoji, any size, on any colours."""
    rng = random.Random(seed)
    sprites = [pictures.sprite(code) for code in pictures.code_points()]
    made = []
    for _ in range(count):
        if rng.random() < 0.5:
            made.append(scenes.draw(scenes.random_scene(rng), rng))
            continue
        canvas = scenes.background(tuple(rng.choices(list(COLOURS), k=2)))
        for _ in range(rng.choice([1, 1, 2, 3])):
            where = rng.random(), rng.random()
            scenes.paste(canvas, rng.choice(sprites), rng.uniform(0.3, 0.95), where)
        made.append(canvas)
    return to_tensor(made)


def batch(images: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Mostly sixteen 64x64 crops, now and then four whole pictures; 0..1, channels last."""
    if step % 4 == 0:
        rows = torch.randint(len(images), (4,), generator=generator)
        picked = images[rows]
    else:
        rows = torch.randint(len(images), (16,), generator=generator)
        corners = torch.randint(65, (16, 2), generator=generator).tolist()
        picked = torch.stack(
            [images[r, :, y : y + 64, x : x + 64] for r, (y, x) in zip(rows.tolist(), corners)]
        )
    picked = picked.float() / 255
    mix = torch.rand(3, generator=generator).argsort() if step % 3 == 0 else torch.arange(3)
    if step % 2:
        picked = picked.flip(-1)
    return picked[:, mix].contiguous(memory_format=torch.channels_last)


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1, L2 and the L1 of neighbouring differences."""
    made = made.float()
    edges = [F.l1_loss(made.diff(dim=d), wanted.diff(dim=d)) for d in (-1, -2)]
    return F.l1_loss(made, wanted) + 4 * F.mse_loss(made, wanted) + 0.5 * (edges[0] + edges[1])


def range_loss(z: Tensor) -> Tensor:
    """Zero where every channel has mean 0 and deviation 1."""
    deviation, mean = torch.std_mean(z.float(), dim=(0, 2, 3))
    return (mean**2 + deviation.clamp(min=1e-3).log() ** 2).mean()


def loss_of(model: TinyAutoencoder, image: Tensor, step: int, noise: float) -> Tensor:
    """The latent gets noise; in every fifth step it is halved, to be smooth at every scale."""
    z = model.taesd_encoder(image)
    wanted = image
    noisy = z + noise * torch.randn_like(z)
    if step % 5 == 1:
        noisy, wanted = F.avg_pool2d(noisy, 2), F.avg_pool2d(image, 2)
    return reconstruction_loss(model.taesd_decoder(noisy), wanted) + 0.02 * range_loss(z)


def psnr(model: TinyAutoencoder, images: Tensor) -> float:
    """Mean decibels over pictures (B, 3, H, W) uint8, there and back, rounded to 8 bits."""
    values = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for part in images.split(16):
            image = (part.float() / 255).contiguous(memory_format=torch.channels_last)
            made = model.decode(model.encode(image)).float().clamp(0, 1)
            made = (made * 255).round() / 255
            values += (-10 * (made - image).pow(2).mean(dim=(1, 2, 3)).log10()).tolist()
    return sum(values) / len(values)


def held_out_pictures(count: int) -> Tensor:
    """Scenes whose combinations are never trained on; uint8."""
    rng = random.Random(1)
    return to_tensor([scenes.draw(scenes.random_scene(rng, True), rng) for _ in range(count)])


def settle_range(model: TinyAutoencoder, images: Tensor) -> None:
    """Set vae_scale and vae_shift so that the network's latents have deviation 1."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = [model.taesd_encoder(part.float() / 255).float() for part in images.split(16)]
        z = torch.cat(parts)
        model.vae_scale.fill_(float(z.std()) * scale.SCALE)
        model.vae_shift.fill_(scale.SHIFT)
    print(f"latents: mean {z.mean():.4f}, deviation {z.std():.4f}, largest {z.abs().max():.2f}")


def main() -> None:
    """Train, report the PSNR, save the moving average; an existing file is trained further."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, default=pictures.cache_folder() / "nano" / "vae.safetensors"
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--noise", type=float, default=0.08)
    parser.add_argument("--pool", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = TinyAutoencoder()
    for block in model.modules():
        if isinstance(block, Residual):
            torch.nn.init.normal_(block.conv[4].weight, std=0.2 / math.sqrt(9 * 64))  # pyright: ignore
    if options.out.exists():
        model.load_state_dict(load_file(options.out))
    model.to(memory_format=torch.channels_last)  # pyright: ignore
    average = TinyAutoencoder().to(memory_format=torch.channels_last)  # pyright: ignore
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    images, held_out = pool(options.pool, seed=0), held_out_pictures(64)
    print(f"{len(images)} pictures", flush=True)
    generator = torch.Generator().manual_seed(0)
    trained = [*model.taesd_encoder.parameters(), *model.taesd_decoder.parameters()]
    averaged = [*average.taesd_encoder.parameters(), *average.taesd_decoder.parameters()]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=1e-4)
    started, mean = time.monotonic(), 0.0
    for step in range(1, options.steps + 1):
        share = step / options.steps
        warm = min(1.0, step / 100)
        for group in optimizer.param_groups:
            group["lr"] = (
                options.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            )
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(images, step, generator), step, options.noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        torch._foreach_lerp_(
            averaged, [p.detach() for p in trained], 1 - min(EMA, step / (step + 10))
        )
        mean += (loss.item() - mean) / min(step, 100)
        if step % 100 == 0 or step == options.steps:
            print(f"{step:6d} {time.monotonic() - started:6.0f} s  loss {mean:.4f}", flush=True)
        if step % 500 == 0 or step == options.steps:
            settle_range(average, images[:256])
            print(f"{step:6d} PSNR on held-out scenes {psnr(average, held_out):.2f} dB", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            partial = options.out.with_suffix(".partial")
            save_file({k: v.contiguous() for k, v in average.state_dict().items()}, partial)
            partial.replace(options.out)


if __name__ == "__main__":
    main()
