"""Samplers: time grids, steps, and the one loop that they share.

A step takes (denoiser, x_t, t, s) to x_s and says what it predicted on the way:

    ancestral       q(x_s | x_t, x0) with the predicted x0, its variance as the denoiser says
    ddim            signal_s * x0 + sqrt(noise_s^2 - sigma^2) * eps + sigma * z
      eta = 0       sigma = 0: deterministic
      eta = 1       sigma^2 = the posterior's variance: the ancestral step with small variance
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minddpm.likelihood import check_grid
from minddpm.prediction import Denoiser, Prediction
from minddpm.process import posterior_coefficients
from minddpm.schedule import cast

Step = Callable[..., tuple[Tensor, Prediction]]


class Sample(NamedTuple):
    """One stop of a sampling path: x at time t, and the x0 predicted just before, both (B, ...)."""

    t: int
    x: Tensor
    x0: Tensor


def uniform_grid(T: int, steps: int) -> list[int]:
    """T = t_0 > ... > t_steps = 0, evenly spaced and rounded (DDIM sec. 4.2)."""
    check_steps(T, steps)
    return [round(T * k / steps) for k in range(steps, -1, -1)]


def quadratic_grid(T: int, steps: int) -> list[int]:
    """T = t_0 > ... > t_steps = 0 with t proportional to k^2, finer near the image (DDIM app. D.2).

    Where rounding would repeat a time, the next larger one is taken.
    """
    check_steps(T, steps)
    grid = [0]
    for k in range(1, steps + 1):
        grid.append(max(grid[-1] + 1, round(T * (k / steps) ** 2)))
    return [min(t, T - (steps - k)) for k, t in enumerate(grid)][::-1]


GRIDS = {"uniform": uniform_grid, "quadratic": quadratic_grid}


def ancestral(denoiser: Denoiser, xt: Tensor, t: int, s: int, *, clip=True, generator=None):
    """One step of the reverse chain: (x_s, prediction); no noise at s = 0 (DDPM alg. 2)."""
    prediction = denoiser(xt, t, clip=clip)
    mean, log_var = denoiser.reverse(xt, t, s, prediction)
    if s == 0:
        return mean, prediction
    return mean + torch.exp(0.5 * log_var) * gaussian(xt, generator), prediction


def ddim(denoiser: Denoiser, xt: Tensor, t: int, s: int, *, eta=0.0, clip=True, generator=None):
    """One step of the non-Markovian family: (x_s, prediction); eta = 0 adds none (DDIM eq. 12)."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    prediction = denoiser(xt, t, clip=clip)
    signal, noise = denoiser.schedule.at(s)
    var = eta**2 * posterior_coefficients(denoiser.schedule, t, s)[2]
    direction = (noise**2 - var).clamp(min=0).sqrt()
    xs = cast(signal, xt) * prediction.x0 + cast(direction, xt) * prediction.eps
    if eta == 0 or s == 0:
        return xs, prediction
    return xs + cast(var.sqrt(), xt) * gaussian(xt, generator), prediction


STEPS = {"ancestral": ancestral, "ddim": ddim}


def sample_path(
    denoiser: Denoiser, x: Tensor, grid, step: Step = ancestral, **options
) -> Iterator[Sample]:
    """Walk x from the grid's first time to its last, lazily: one Sample after each step.

    x: (B, ...) at time grid[0], pure noise N(0, I) where grid[0] = T. options go to the step
    (`clip`, `eta`, `generator`). Raises ValueError for a grid that does not fall to 0.
    """
    step = partial(step, **options)
    for t, s in pairwise(check_grid(denoiser.schedule, grid)):
        with torch.no_grad():
            x, prediction = step(denoiser, x, t, s)
        yield Sample(s, x, prediction.x0)


def sample(denoiser: Denoiser, x: Tensor, grid, step: Step = ancestral, **options) -> Tensor:
    """The end of sample_path: images (B, ...) at time 0. Arguments as there."""
    for stop in sample_path(denoiser, x, grid, step, **options):
        x = stop.x
    return x


def gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """z ~ N(0, I) with the shape, dtype and device of `like`."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def check_steps(T: int, steps: int) -> None:
    """Raises ValueError unless 1 <= steps <= T."""
    if not 1 <= steps <= T:
        raise ValueError(f"the number of steps must lie in 1..T = {T}, got {steps}")
