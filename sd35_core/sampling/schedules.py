"""Noise schedules for a rectified flow.

A sigma is the share of noise in x: 1 is pure noise, 0 the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import SettingError

STEPS_OF_TRAINING = 1000
DEFAULT_SHIFT = 3.0
"""What SD3.5 was made for."""
MOST_STEPS = 1_000_000
"""Of a whole schedule, of which denoise may leave out a part."""
LEAST_SHIFT, MOST_SHIFT = 1e-3, 1e3
"""Beyond these fp32 tells no levels apart."""


def shifted(t: Tensor, shift: float) -> Tensor:
    """Time in 0..1 -> sigma: shift t / (1 + (shift - 1) t). Esser et al. 2024, section 5.3.2."""
    return shift * t / (1 + (shift - 1) * t)


def _normal(steps: int, shift: float) -> Tensor:
    """The reference's: timesteps from the largest to the smallest sigma, shifted once more."""
    lowest = float(shifted(torch.tensor(1 / STEPS_OF_TRAINING), shift))
    timesteps = torch.linspace(STEPS_OF_TRAINING, lowest * STEPS_OF_TRAINING, steps)
    return shifted(timesteps / STEPS_OF_TRAINING, shift)


def _simple(steps: int, shift: float) -> Tensor:
    """Equal steps in time on the training grid, shifted once."""
    i = torch.arange(steps, dtype=torch.float64)
    grid = STEPS_OF_TRAINING - (i * STEPS_OF_TRAINING / steps).floor()
    return shifted(grid.float() / STEPS_OF_TRAINING, shift)


def _sgm_uniform(steps: int, shift: float) -> Tensor:
    """As normal, but the last point of the grid is left out, so the last step is a longer one."""
    return _normal(steps + 1, shift)[:-1]


def _beta(steps: int, shift: float, shape: float = 0.6) -> Tensor:
    """Quantiles of a Beta distribution: dense at both ends (Lee et al. 2024, arXiv:2407.12173)."""
    angle = torch.linspace(0, math.pi / 2, 20001, dtype=torch.float64)
    density = (angle.sin() * angle.cos()) ** (2 * shape - 1)
    mass = torch.cumulative_trapezoid(density, angle)
    mass = torch.cat([mass.new_zeros(1), mass / mass[-1]])
    wanted = 1 - torch.arange(steps, dtype=torch.float64) / steps
    right = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    share = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    quantile = torch.lerp(angle[right - 1], angle[right], share).sin() ** 2
    index = (quantile * (STEPS_OF_TRAINING - 1)).round().unique().flip(0)
    return shifted((index.float() + 1) / STEPS_OF_TRAINING, shift)


def _linear_quadratic(steps: int, shift: float, first: float = 0.025) -> Tensor:
    """Half the steps, evenly, on the first 2.5 % of the way, the rest quadratically; no shift."""
    if steps == 1:
        return torch.ones(1)
    half = steps // 2
    slope = first / half
    curve = (1 - slope * steps) / (steps - half) ** 2
    i = torch.arange(steps, dtype=torch.float32)
    return 1 - (slope * i + curve * (i - half).clamp(min=0) ** 2)


SCHEDULES: dict[str, Callable[[int, float], Tensor]] = {
    "normal": _normal,
    "simple": _simple,
    "sgm_uniform": _sgm_uniform,
    "beta": _beta,
    "linear_quadratic": _linear_quadratic,
}
"""Name -> (steps, shift) -> the noise level at which each step begins: (steps,)."""


def make_sigmas(steps: int, shift: float, schedule: str = "normal", denoise: float = 1.0) -> Tensor:
    """The noise levels of a run, falling, with 0 at the end: (steps + 1,), fp32.

    With `denoise` below 1 the last `steps` steps of a schedule of steps / denoise are taken, as
    ComfyUI does it. `beta` may give fewer steps where two fall on the same level. Raises
    SettingError for an unknown schedule, and for steps, a shift or a denoise out of range.
    """
    if schedule not in SCHEDULES:
        raise SettingError(f"Unknown schedule '{schedule}'. Choose one of {', '.join(SCHEDULES)}.")
    if steps < 1:
        raise SettingError(f"steps is {steps}; at least 1 step is needed to make a picture.")
    if not LEAST_SHIFT <= shift <= MOST_SHIFT:
        raise SettingError(
            f"shift is {shift}; it must be above 0, from {LEAST_SHIFT:g} to {MOST_SHIFT:g} (SD3.5 "
            f"was made for {DEFAULT_SHIFT})."
        )
    if not 0 < denoise <= 1:
        raise SettingError(f"denoise is {denoise}; it must be above 0 and at most 1.")
    if not steps / denoise <= MOST_STEPS:
        raise SettingError(
            f"steps is {steps} and denoise {denoise:g}: that is the end of a schedule of "
            f"{steps / denoise:.3g} steps, and {MOST_STEPS:,} is the most. Raise denoise, or take "
            "fewer steps."
        )
    total = steps if denoise > 0.9999 else int(steps / denoise)
    return torch.cat([SCHEDULES[schedule](total, shift), torch.zeros(1)])[-(steps + 1) :]


def acting_steps(
    sigmas: Sequence[float], start: float, end: float, shift: float, closed: bool = False
) -> list[int]:
    """The steps, from 0, that lie between two shares of the way from noise to picture.

    sigmas: (steps + 1,). As the host and ControlNets have it, a share is a time, shifted; the end
    belongs to the window only if it is `closed`.
    """
    first, last = (_level_at(share, shift) for share in (start, end))
    return [
        step
        for step, sigma in enumerate(sigmas[:-1])
        if last < sigma <= first or (closed and sigma == last)
    ]


def _level_at(share: float, shift: float) -> float:
    return float(shifted(torch.tensor(1.0 - share, dtype=torch.float64), shift))
