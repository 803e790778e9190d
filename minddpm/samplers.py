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
    heun                  the probability-flow ODE to second order
    dpm_solver, DPMSolver the same to any order up to 3, from calls within a step or from past ones
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
    """T = t_0 > ... > t_steps = 0, evenly spaced and rounded (DDIM app. D.2)."""
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


def ddim_quadratic_grid(T: int, steps: int) -> list[int]:
    """The quadratic grid of the authors' code, its choice for CIFAR-10 (DDIM app. D.2).

    Counted from 0 as there, the k-th of `steps` times is 0.8 T (k / (steps - 1))^2, rounded down: a
    path begins with N(0, I) at about 0.8 T and makes its last noisy stop at t = 1. Of times that
    round to the same one is kept, since a step between them does nothing: from some sqrt(0.8 T)
    steps on there are fewer than asked for.
    """
    check_steps(T, steps)
    if steps == 1 < T:
        raise ValueError("the ddim-quadratic grid needs 2 steps or more")
    last = max(steps - 1, 1)
    return sorted({0} | {1 + 4 * T * k**2 // (5 * last**2) for k in range(steps)}, reverse=True)


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
    "ddim-quadratic": lambda schedule, steps: ddim_quadratic_grid(schedule.T, steps),
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


def dpm_solver(
    denoiser: Denoiser, xt: Tensor, t: int, s: int, *, order=2, clip=True, generator=None
):
    """Single-step DPM-Solver of order 1, 2 or 3: (x_s, prediction at t) (DPM-Solver alg. 1, 2).

    `order` network calls: at t, and at the integer times nearest to 1/2, or to 1/3 and 2/3, of the
    way from t to s in the log of signal over noise; the formulas take the parts as they are. Order
    1 is DDIM; so is a step to s = 0, or from no signal. Where t - s < order, t - s is the order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    schedule, start = denoiser.schedule, log_ratio(denoiser.schedule, t)
    h = log_ratio(schedule, s) - start
    xs, prediction = ddim(denoiser, xt, t, s, clip=clip)
    order = min(order, t - s) if h.isfinite() else 1
    if order == 1:
        return xs, prediction
    u = time_near(schedule, t, s + order - 2, start + h / order)
    change = denoiser(mix(schedule, prediction, u), u, clip=clip).eps - prediction.eps
    r, (_, noise) = (log_ratio(schedule, u) - start) / h, schedule.at(s)
    if order == 2:
        return xs - cast(noise * torch.expm1(h) / (2 * r), xt) * change, prediction
    v = time_near(schedule, u, s, start + 2 * h / 3)
    reach, (_, noise_v) = log_ratio(schedule, v) - start, schedule.at(v)
    bend = reach / (r * h) * noise_v * (torch.expm1(reach) / reach - 1)
    xv = mix(schedule, prediction, v) - cast(bend, xt) * change
    change = denoiser(xv, v, clip=clip).eps - prediction.eps
    weight = noise * (torch.expm1(h) / h - 1) * h / reach
    return xs - cast(weight, xt) * change, prediction


def mix(schedule: Schedule, prediction: Prediction, s: int) -> Tensor:
    """signal_s * x0 + noise_s * eps: where DDIM's step ends, (B, ...) (DDIM eq. 12)."""
    signal, noise = schedule.scales(s, like=prediction.x0)
    return signal * prediction.x0 + noise * prediction.eps


def log_ratio(schedule: Schedule, t: int) -> Tensor:
    """lambda_t = log(signal / noise), half the log SNR; infinite at t = 0 (DPM-Solver sec. 3.1)."""
    signal, noise = schedule.at(t)
    return signal.log() - noise.log()


def time_near(schedule: Schedule, t: int, s: int, ratio: Tensor) -> int:
    """The time between t and s, without them, whose log_ratio is nearest (DPM-Solver sec. 3.4)."""
    table = schedule.signal[s + 1 : t].log() - schedule.noise[s + 1 : t].log()
    return s + 1 + (table - ratio).abs().argmin().item()


class DPMSolver:
    """DPM-Solver++ 2M, or 3M with order=3: x0 extrapolated from the last two or three predictions.

    One network call a step. The object remembers steps, so each path needs its own: `sample` and
    `sample_path` make one where they are given the class, or partial(DPMSolver, order=3). 2M is
    DPM-Solver++'s algorithm (DPM-Solver++ alg. 2). 3M integrates the parabola through three
    predictions; the authors' code halves its last term, and with it falls back to second order.
    """

    def __init__(self, order: int = 2):
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        self.order, self.past = order, []

    def __call__(
        self, denoiser: Denoiser, xt: Tensor, t: int, s: int, *, clip=True, generator=None
    ):
        """(x_s, prediction at t); the first step, and the one to s = 0, are DDIM's."""
        prediction = denoiser(xt, t, clip=clip)
        (signal_t, noise_t), (signal_s, noise_s) = (denoiser.schedule.at(u) for u in (t, s))
        shrink = noise_s / noise_t
        whole = signal_s - shrink * signal_t
        xs = cast(shrink, xt) * xt + cast(whole, xt) * prediction.x0
        now = log_ratio(denoiser.schedule, t)
        self.past = [*self.past, (now, prediction.x0)][-self.order :]
        if s > 0 and len(self.past) > 1:
            gaps = [after - before for (before, _), (after, _) in pairwise(self.past)]
            h = log_ratio(denoiser.schedule, s) - now
            for weight, (_, x0), (_, after) in zip(
                newton_weights(gaps, h, signal_s, whole), self.past, self.past[1:]
            ):
                xs = xs + cast(weight, xt) * (after - x0)
        return xs, prediction


def newton_weights(gaps: list[Tensor], h: Tensor, signal: Tensor, whole: Tensor) -> list[Tensor]:
    """What the last differences of x0 are multiplied by, the oldest first (DPM-Solver++ sec. 4).

    gaps: the steps of log_ratio between the past predictions; h: the step to come.
    """
    if len(gaps) == 1:  # 2M takes the slope at half of the step for the whole of it
        return [whole * h / (2 * gaps[0])]
    line = signal * h - whole  # signal times the integral of e^(u - h) u, u from 0 to h
    curve = (line * gaps[1] + signal * h**2 - 2 * line) / (gaps[0] + gaps[1])
    return [-curve / gaps[0], (line + curve) / gaps[1]]


STEPS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "reverse-diffusion": reverse_diffusion,
    "predictor-corrector": predictor_corrector,
    "heun": heun,
    "dpm-solver": DPMSolver,
    "dpm-solver-3m": partial(DPMSolver, order=3),
    "dpm-solver-single-2": dpm_solver,
    "dpm-solver-single-3": partial(dpm_solver, order=3),
}


def sample_path(
    denoiser: Denoiser, x: Tensor, grid, step: Step = ancestral, **options
) -> Iterator[Sample]:
    """Walk x from the grid's first time to its last, lazily: one Sample after each step.

    x: (B, ...) at time grid[0], pure noise N(0, I) where grid[0] = T. options go to the step
    (`clip`, `eta`, `generator`). Raises ValueError for a grid that does not fall to 0.
    """
    made = isinstance(getattr(step, "func", step), type)  # a class, or a partial of one
    step = partial(step() if made else step, **options)
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
