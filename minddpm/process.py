"""The Gaussians of the forward process q, for any pair of times s < t.

The paper's formulas are the case s = t - 1. Because every function takes the pair, sampling on a
coarse grid, DDIM and bounds on sub-sequences need no further formula.
"""

import torch
from torch import Tensor

from minddpm.schedule import Schedule, Time, cast


def forward_coefficients(schedule: Schedule, t: Time, s: Time) -> tuple[Tensor, Tensor]:
    """(scale, var) of q(x_t | x_s) = N(scale * x_s, var * I) (DDPM eq. 2).

    float64, shaped like t and s. With s = t - 1: scale = sqrt(1 - beta_t) and var = beta_t.
    Raises ValueError unless 0 <= s < t <= T.
    """
    signal_t, noise_t = schedule.at(t)
    signal_s, noise_s = schedule.at(s)
    check_order(t, s)
    scale = signal_t / signal_s
    return scale, noise_t**2 - scale**2 * noise_s**2


def q_step(schedule: Schedule, xs: Tensor, t: Time, s: Time, eps: Tensor) -> Tensor:
    """Noise x_s on to x_t with eps ~ N(0, I), both (B, ...) (DDPM eq. 2)."""
    check_same_shape(xs=xs, eps=eps)
    scale, var = forward_coefficients(schedule, t, s)
    return cast(scale, xs) * xs + cast(var.sqrt(), xs) * eps


def q_sample(schedule: Schedule, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
    """Noise x_0 to x_t in one go, with eps ~ N(0, I), both (B, ...) (DDPM eq. 4)."""
    check_same_shape(x0=x0, eps=eps)
    signal, noise = schedule.scales(t, like=x0)
    return signal * x0 + noise * eps


def posterior_coefficients(schedule: Schedule, t: Time, s: Time) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, var) of q(x_s | x_t, x_0) = N(a * x_0 + b * x_t, var * I) (DDPM eq. 7).

    float64, shaped like t and s. At s = 0 they are (1, 0, 0): x_0 is known.
    """
    scale, forward_var = forward_coefficients(schedule, t, s)
    (signal_s, noise_s), (_, noise_t) = schedule.at(s), schedule.at(t)
    shrink = noise_s**2 / noise_t**2
    return signal_s * forward_var / noise_t**2, scale * shrink, forward_var * shrink


def q_posterior(
    schedule: Schedule, x0: Tensor, xt: Tensor, t: Time, s: Time
) -> tuple[Tensor, Tensor]:
    """(mean (B, ...), var () or (B, 1, ..., 1)) of q(x_s | x_t, x_0) (DDPM eq. 6, 7)."""
    check_same_shape(x0=x0, xt=xt)
    on_x0, on_xt, var = posterior_coefficients(schedule, t, s)
    return cast(on_x0, xt) * x0 + cast(on_xt, xt) * xt, cast(var, xt)


def reverse_log_variance(schedule: Schedule, t: Time, s: Time) -> tuple[Tensor, Tensor]:
    """(small, large): the logs of the two reverse variances (DDPM sec. 3.2).

    float64, shaped like t and s. `small` is the posterior's variance (beta-tilde for s = t - 1),
    `large` the forward step's (beta).
    A learned variance is exp(v * large + (1 - v) * small) with v in [0, 1] (Improved DDPM eq. 15).
    At s = 0 the posterior's variance is 0 and has no log: there `small` is the variance of the step
    from 2 to 1, as in the authors' code with every step. (On a grid Improved DDPM's code takes that
    of the grid's last step but one; a pair of times does not know the grid.)
    """
    _, _, small = posterior_coefficients(schedule, t, s)
    _, large = forward_coefficients(schedule, t, s)
    if schedule.T > 1:
        _, _, floor = posterior_coefficients(schedule, 2, 1)
        small = torch.where(torch.as_tensor(s).cpu() == 0, torch.minimum(floor, large), small)
    else:
        small = large
    return small.log(), large.log()


def check_order(t: Time, s: Time) -> None:
    """Raises ValueError unless s < t, everywhere in two batches of times of one shape."""
    t, s = torch.as_tensor(t).cpu(), torch.as_tensor(s).cpu()
    if t.numel() > 1 and s.numel() > 1 and t.shape != s.shape:
        raise ValueError(f"t and s must have one shape, got {tuple(t.shape)} and {tuple(s.shape)}")
    if not (s < t).all():
        late, early = (x[~(s < t)][0].item() for x in torch.broadcast_tensors(t, s))
        raise ValueError(f"s must be smaller than t (less noise), got s = {early} and t = {late}")


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError when the named tensors differ in shape."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "expected equal shapes, got " + ", ".join(f"{k} {v}" for k, v in shapes.items())
        )
