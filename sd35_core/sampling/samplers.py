"""Samplers for a rectified flow, with k-diffusion's signature, so that a host can call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[..., Tensor]
"""(x, sigma (B,), **extra_args) -> the denoised x."""
Callback = Callable[[dict[str, Any]], None]


def _report(callback: Callback | None, i: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
    if callback is not None:
        callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


@torch.no_grad()
def euler(
    model: Denoise,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 2 without churn)."""
    ones = x.new_ones(len(x))
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        denoised = model(x, sigma * ones, **(extra_args or {}))
        _report(callback, i, x, sigma, denoised)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


@torch.no_grad()
def dpmpp_2m(
    model: Denoise,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order with one model call a step (Lu et al. 2022, algorithm 2)."""
    ones = x.new_ones(len(x))
    previous, last_h = None, None
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        denoised = model(x, sigma * ones, **(extra_args or {}))
        _report(callback, i, x, sigma, denoised)
        h = sigma.log() - following.log()
        target = denoised
        if previous is not None and last_h is not None and following > 0:
            target = denoised + (denoised - previous) * (h / (2 * last_h))
        x = following / sigma * x - torch.expm1(-h) * target
        previous, last_h = denoised, h
    return x


SAMPLERS = {"dpmpp_2m": dpmpp_2m, "euler": euler}
