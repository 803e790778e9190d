"""Samplers: time grids, steps, and the one loop that they share.

A step takes (denoiser, x_t, t, s) to x_s and says what it predicted on the way:

    ancestral       q(x_s | x_t, x0) with the predicted x0, its variance as the denoiser says
    ddim            signal_s * x0 + sqrt(noise_s^2 - sigma^2) * eps + sigma * z
      eta = 0       sigma = 0: deterministic
      eta = 1       sigma^2 = the posterior's variance: the ancestral step with small variance
    reverse_diffusion     (2 - scale) * x_t + (1 + eta^2) / 2 * var * score + eta * sqrt(var) * z
      eta = 0       one Euler step of the probability-flow ODE
      eta = 1       one Euler step of the reverse SDE
    predictor_corrector   any of these, then Langevin updates at s
    heun, DPMSolver       the probability-flow ODE to second order
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minddpm.likelihood import check_grid
from minddpm.prediction import Denoiser, Prediction
from minddpm.process import forward_coefficients, posterior_coefficients
from minddpm.schedule import Schedule, cast

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


def log_snr_grid(schedule: Schedule, steps: int) -> list[int]:
    """T = t_0 > ... > t_steps = 0; log SNR rises evenly up to t = 1 (DPM-Solver sec. 3.3)."""
    return even_grid(schedule, schedule.log_snr[1:], steps)


def karras_grid(schedule: Schedule, steps: int, rho: float = 7.0) -> list[int]:
    """T = t_0 > ... > t_steps = 0; (noise / signal)^(1 / rho) falls evenly to t = 1 (EDM eq. 5)."""
    return even_grid(schedule, -(schedule.log_snr[1:] / (-2 * rho)).exp(), steps)


def even_grid(schedule: Schedule, table: Tensor, steps: int) -> list[int]:
    """T = t_0 > ... > t_steps = 0: the times where `table`, of t = 1..T, is nearest to even steps.

    Where rounding would repeat a time, the next smaller one is taken while there is one.
    """
    check_steps(schedule.T, steps)
    if steps == 1:
        return [schedule.T, 0]
    last = table[table.isfinite()][-1]  # where no signal is left at T, start just before
    grid = [schedule.T]
    for k, value in enumerate(torch.linspace(last, table[0], steps)[1:], start=2):
        nearest = 1 + (table - value).abs().argmin().item()
        grid.append(max(min(nearest, grid[-1] - 1), 1 + steps - k))
    return [*grid, 0]


GRIDS = {
    "uniform": lambda schedule, steps: uniform_grid(schedule.T, steps),
    "quadratic": lambda schedule, steps: quadratic_grid(schedule.T, steps),
    "log-snr": log_snr_grid,
    "karras": karras_grid,
}


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


def reverse_diffusion(
    denoiser: Denoiser, xt: Tensor, t: int, s: int, *, eta=1.0, clip=True, generator=None
):
    """One Euler step back in time: (x_s, prediction); no noise at s = 0 (Score SDE app. E).

    eta = 1 follows the reverse SDE (Score SDE eq. 6), eta = 0 the probability-flow ODE (Score SDE
    eq. 13); every eta >= 0 has the same marginals in the limit of many steps. With eta = 0 the step
    to s = 0 removes half of the noise that eta = 1 removes: end such a path at the predicted x0.
    """
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta must be 0 or more, and finite, got {eta}")
    prediction = denoiser(xt, t, clip=clip)
    scale, var = forward_coefficients(denoiser.schedule, t, s)
    _, noise = denoiser.schedule.at(t)
    score = prediction.eps / cast(-noise, xt)
    xs = cast(2 - scale, xt) * xt + cast((1 + eta**2) / 2 * var, xt) * score
    if eta == 0 or s == 0:
        return xs, prediction
    return xs + cast(eta * var.sqrt(), xt) * gaussian(xt, generator), prediction


@torch.no_grad()
def langevin(
    denoiser: Denoiser, x: Tensor, t: int, *, rounds=1, snr=0.16, clip=True, generator=None
):
    """`rounds` Langevin updates of x (B, ...) within q(x_t), t > 0 (Score SDE alg. 5).

    One is x + h * score + sqrt(2 h) * z with h = 2 (snr * noise_t)^2. There h follows from norms
    taken over the batch; here it is their typical value, so that no image depends on the others.
    """
    if not (rounds >= 0 and 0 < snr < float("inf")):
        raise ValueError(f"rounds must be 0 or more and snr positive, got {rounds} and {snr}")
    _, noise = denoiser.schedule.at(t)
    h = 2 * (snr * noise) ** 2
    for _ in range(rounds):
        score = denoiser(x, t, clip=clip).eps / cast(-noise, x)
        x = x + cast(h, x) * score + cast((2 * h).sqrt(), x) * gaussian(x, generator)
    return x


def predictor_corrector(
    denoiser: Denoiser,
    xt: Tensor,
    t: int,
    s: int,
    *,
    predictor: Step = reverse_diffusion,
    rounds=1,
    snr=0.16,
    clip=True,
    generator=None,
):
    """A predictor's step, then `langevin` at s > 0: (x_s, prediction) (Score SDE alg. 1)."""
    xs, prediction = predictor(denoiser, xt, t, s, clip=clip, generator=generator)
    if s > 0:
        options = dict(rounds=rounds, snr=snr, clip=clip, generator=generator)
        xs = langevin(denoiser, xs, s, **options)
    return xs, prediction


def heun(denoiser: Denoiser, xt: Tensor, t: int, s: int, *, clip=True, generator=None):
    """A DDIM step, then again with the mean of the noises at both ends (EDM alg. 1).

    With r = noise / signal at t over that at s, it is a DDIM step whose x0 lies the part r / 2 of
    the way from the first x0 to the second. Where r > 2 that would overshoot the second, by as much
    as there is noise where hardly any signal is left: there the second is taken.
    Returns (x_s, prediction at t). Two network calls, or one where s = 0.
    """
    xs, prediction = ddim(denoiser, xt, t, s, clip=clip)
    if s == 0:
        return xs, prediction
    (signal_t, noise_t), (signal_s, noise_s) = (denoiser.schedule.at(u) for u in (t, s))
    part = (noise_t * signal_s / (signal_t * noise_s) / 2).clamp(max=1)
    change = denoiser(xs, s, clip=clip).x0 - prediction.x0
    shrink = noise_s / noise_t
    return xs + cast((signal_s - shrink * signal_t) * part, xt) * change, prediction


class DPMSolver:
    """DPM-Solver++ 2M: a DDIM step with x0 extrapolated from the last two predictions.

    One network call a step. The object remembers a step, so each path needs its own: `sample` and
    `sample_path` make one where they are given the class (DPM-Solver++ alg. 2).
    """

    def __init__(self):
        self.past = None

    def __call__(
        self, denoiser: Denoiser, xt: Tensor, t: int, s: int, *, clip=True, generator=None
    ):
        """(x_s, prediction at t); the first step, and the one to s = 0, are DDIM's."""
        log_snr = denoiser.schedule.log_snr
        prediction = denoiser(xt, t, clip=clip)
        x0, (before, past) = prediction.x0, self.past or (None, None)
        if past is not None and s > 0:
            ratio = (log_snr[s] - log_snr[t]) / (log_snr[t] - log_snr[before])
            x0 = x0 + cast(ratio / 2, xt) * (x0 - past)
        (signal_t, noise_t), (signal_s, noise_s) = (denoiser.schedule.at(u) for u in (t, s))
        shrink = noise_s / noise_t
        self.past = t, prediction.x0
        return cast(shrink, xt) * xt + cast(signal_s - shrink * signal_t, xt) * x0, prediction


STEPS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "reverse-diffusion": reverse_diffusion,
    "predictor-corrector": predictor_corrector,
    "heun": heun,
    "dpm-solver": DPMSolver,
}


def sample_path(
    denoiser: Denoiser, x: Tensor, grid, step: Step = ancestral, **options
) -> Iterator[Sample]:
    """Walk x from the grid's first time to its last, lazily: one Sample after each step.

    x: (B, ...) at time grid[0], pure noise N(0, I) where grid[0] = T. options go to the step
    (`clip`, `eta`, `generator`). Raises ValueError for a grid that does not fall to 0.
    """
    step = partial(step() if isinstance(step, type) else step, **options)
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
