"""Likelihood: the variational bound, term by term, and bits per dimension."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from minddpm.process import q_posterior, q_sample
from minddpm.schedule import Schedule, Time, cast


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise, with broadcasting."""
    log_ratio = log_var2 - log_var1
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_var2)
    return 0.5 * (log_ratio + torch.expm1(-log_ratio) + distance)


def decoder_log_likelihood(x0: Tensor, mean: Tensor, log_var: Tensor, levels: int = 256) -> Tensor:
    """log P(x_0), nats, elementwise, under N(mean, var) cut into `levels` bins (DDPM eq. 13).

    x0 lies on the grid -1, -1 + 2 / (levels - 1), ..., 1; the two outer bins reach to infinity.
    Raises TypeError for half precision.
    """
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{x0.dtype} cannot tell {levels} levels apart; use float32 or float64")
    half_bin, inverse_std = 1 / (levels - 1), torch.exp(-0.5 * log_var)
    right = (x0 + half_bin - mean) * inverse_std
    left = (x0 - half_bin - mean) * inverse_std
    # A bin's mass is a difference of two tails; taken in the tail it lies in, it keeps its digits.
    flip = left > 0
    near, far = torch.where(flip, -left, right), torch.where(flip, -right, left)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    inside = log_near + torch.log(-torch.expm1((log_far - log_near).clamp(max=-1e-7)))
    first, last = x0 < half_bin - 1, x0 > 1 - half_bin
    edge = torch.special.log_ndtr(torch.where(first, right, -left))
    return torch.where(first | last, edge, inside)


def bound_term(denoiser, x0: Tensor, xt: Tensor, t: Time, s: Time, prediction) -> Tensor:
    """One term of the bound, (B,) bits per dimension: the decoder at s = 0, else a KL (DDPM eq. 5).

    x0, xt: (B, ...); prediction: what the denoiser made of x_t.
    """
    mean, log_var = denoiser.reverse(xt, t, s, prediction)
    true_mean, true_var = q_posterior(denoiser.schedule, x0, xt, t, s)
    kl = normal_kl(true_mean, true_var.clamp(min=1e-30).log(), mean, log_var)
    last = cast((torch.as_tensor(s) == 0).double(), xt).bool()
    nats = torch.where(last, -decoder_log_likelihood(x0, mean, log_var), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def prior_term(schedule: Schedule, x0: Tensor, t: int | None = None) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)), (B,), bits per dimension; at t if given (DDPM eq. 5)."""
    signal, noise = schedule.scales(schedule.T if t is None else t, like=x0)
    zero = torch.zeros_like(noise)
    return normal_kl(signal * x0, 2 * noise.log(), zero, zero).flatten(1).mean(1) / math.log(2)


@torch.no_grad()
def vlb_terms(
    denoiser, x0: Tensor, grid=None, clip: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """The bound on -log2 p(x_0) per dimension, term by term, (B, K + 1) (DDPM eq. 5).

    x0: (B, ...) on the 256 levels of [-1, 1]. grid: t_0 > ... > t_K = 0, every step unless given;
    the chain begins with N(0, I) at t_0. Column k is the term that ends in the grid's k-th time
    counted from 0: with every step it is the paper's L_k, column 0 the decoder and column T the
    prior. Each entry is one Monte Carlo draw of x_t, so columns and rows are unbiased estimates.
    """
    check_levels(x0)
    schedule = denoiser.schedule
    grid = list(range(schedule.T, -1, -1)) if grid is None else check_grid(schedule, grid)
    terms = [prior_term(schedule, x0, grid[0])]
    for t, s in pairwise(grid):
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        xt = q_sample(schedule, x0, t, eps)
        terms.append(bound_term(denoiser, x0, xt, t, s, denoiser(xt, t, clip=clip)))
    return torch.stack(terms[::-1], dim=1)


@torch.no_grad()
def bound_estimate(
    denoiser, x0: Tensor, clip: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """An unbiased estimate of `vlb_terms(...).sum(1)`, (B,), from two network calls (DDPM eq. 5).

    The prior and the decoder are taken as they are, and of the T - 1 terms between them one an
    image, at times that the batch spreads evenly over 2..T. generator: on the CPU.
    """
    check_levels(x0)
    schedule, n = denoiser.schedule, len(x0)
    stratum, within = torch.randperm(n, generator=generator), torch.rand(n, generator=generator)
    spread = (stratum + within.double()) / n  # which float32 might round to 1
    t = 2 + (spread * (schedule.T - 1)).long()
    bits = prior_term(schedule, x0)
    for times, weight in [(torch.ones_like(t), 1), (t, schedule.T - 1)]:
        if weight:
            eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
            xt = q_sample(schedule, x0, times, eps)
            term = bound_term(denoiser, x0, xt, times, times - 1, denoiser(xt, times, clip=clip))
            bits = bits + weight * term
    return bits


def ode_log_density(
    denoiser, xt: Tensor, grid, exact: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """log p(x_t), (B,) nats, under the probability-flow ODE from N(0, I) (Score SDE eq. 39).

    xt: (B, ...) at the last time of the grid t_0 > ... > t_K >= 1. Heun's method follows
    y = x / signal in sigma = noise / signal, where dy / dsigma = eps, and the trapezoidal rule
    integrates the divergence over log sigma. exact: the divergence by one pass for each dimension;
    otherwise an unbiased estimate from one random direction (Hutchinson's).
    """
    schedule, dims = denoiser.schedule, xt[0].numel()
    times = check_grid(schedule, [*grid, 0])[-2::-1]
    signal, noise = schedule.at(torch.tensor(times))
    if not signal[-1] > 0:
        raise ValueError("no signal is left where the grid begins: begin it a step later")
    sigma = noise / signal
    probe = None if exact else 2.0 * torch.randint(2, xt.shape, generator=generator).to(xt) - 1
    y, total = xt / cast(signal[0], xt), -dims * signal[0].log().item()
    eps, slope = divergence(denoiser, y, times[0], probe)
    for t, before, now, scale in zip(times[1:], sigma, sigma[1:], signal[1:]):
        step = cast(now - before, xt)
        with torch.no_grad():
            guess = denoiser(cast(scale, xt) * (y + step * eps), t).eps
        y = y + step * (eps + guess) / 2
        eps, after = divergence(denoiser, y, t, probe)
        mean = (before.item() * slope + now.item() * after) / 2
        total, slope = total + mean * (now / before).log().item(), after
    x = (cast(signal[-1], xt) * y).double().flatten(1)
    normal = -0.5 * (x**2 + math.log(2 * math.pi)).sum(1)
    return total + normal + dims * signal[-1].log().item()


def divergence(denoiser, y: Tensor, t: int, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """eps at x_t = signal * y, (B, ...), and its divergence in y, (B,) (Score SDE app. D.2).

    The divergence is that along `probe` (B, ...), or the sum over all dimensions without one.
    """
    signal, _ = denoiser.schedule.at(t)
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        eps = denoiser(cast(signal, y) * y, t).eps
        axes = torch.eye(y[0].numel()).to(y).view(-1, *y.shape[1:])
        along = axes[:, None].expand(-1, *y.shape) if probe is None else [probe]
        parts = [d * torch.autograd.grad(eps, y, d, retain_graph=True)[0] for d in along]
    return eps.detach(), sum(part.double().flatten(1).sum(1) for part in parts)


def ode_bits(
    denoiser, x0: Tensor, grid, exact: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """A bound on -log2 P(x_0) per dimension, (B,), with x_1 as its only latent (Score SDE eq. 39).

    x_1 is drawn from q(x_1 | x_0), the decoder gives P(x_0 | x_1), and the probability-flow ODE the
    density of x_1: no term of the chain between is paid for. grid: as in `ode_log_density`, down
    to 1. generator: on the CPU.
    """
    check_levels(x0)
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
    x1 = q_sample(denoiser.schedule, x0, 1, eps)
    with torch.no_grad():
        decoder = bound_term(denoiser, x0, x1, 1, 0, denoiser(x1, 1, clip=True))
    _, noise = denoiser.schedule.at(1)
    log_q = (
        -0.5 * (eps.double() ** 2 + math.log(2 * math.pi)).flatten(1).mean(1) - noise.log().item()
    )
    log_p = ode_log_density(denoiser, x1, grid, exact, generator) / x0[0].numel()
    return decoder + (log_q - log_p) / math.log(2)


def bits_per_dim(log_density: Tensor, dims: int, levels: int = 256) -> Tensor:
    """Bits per dimension on `levels` grey values, from a log-density in nats over [-1, 1]^dims.

    A grey value is a cell of width 2 / (levels - 1): its probability is about density times width,
    hence the constant log2((levels - 1) / 2), 6.99 bits for 256 levels.
    """
    return -log_density / (dims * math.log(2)) + math.log2((levels - 1) / 2)


def check_levels(x0: Tensor, levels: int = 256) -> None:
    """Raises ValueError unless x0 lies on the grey values -1, -1 + 2 / (levels - 1), ..., 1."""
    grey = (x0.double() + 1) * (levels - 1) / 2
    if not ((grey - grey.round()).abs() <= 1e-2).all() or (x0.abs() > 1 + 1e-6).any():
        raise ValueError(
            f"a likelihood in bits needs images on {levels} levels in [-1, 1]; "
            "scale uint8 images with minddpm.data.to_model"
        )


def check_grid(schedule: Schedule, grid) -> list[int]:
    """The grid as a list; raises ValueError unless it falls strictly from at most T to 0."""
    times = [float(t) for t in grid]
    falls = len(times) >= 2 and all(t > s for t, s in pairwise(times))
    if not falls or times[0] > schedule.T or times[-1] != 0 or any(t % 1 for t in times):
        raise ValueError(
            f"a grid must hold integers that fall strictly from at most T = {schedule.T} to 0, "
            f"got {str(times)[:80]}"
        )
    return [int(t) for t in times]
