"""Noise schedules: how much signal and how much noise an image holds at each step.

A schedule is two float64 tables with T + 1 entries. Entry t belongs to the image after t noising
steps, the paper's own index, so entry 0 is the clean image:

    x_t = signal[t] * x_0 + noise[t] * eps,    eps ~ N(0, I)

DDPM's preserve the variance: signal[t] = sqrt(alpha_bar_t), noise[t] = sqrt(1 - alpha_bar_t).
Flow matching's add up to 1 instead.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Time = int | Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables `signal` and `noise`, (T + 1,) float64 each, with signal[0] = 1 and noise[0] = 0.

    Raises ValueError unless they are finite, not negative, and their ratio falls strictly with t.
    """

    signal: Tensor
    noise: Tensor

    def __post_init__(self):
        signal, noise = (torch.as_tensor(x, dtype=torch.float64) for x in (self.signal, self.noise))
        if signal.ndim != 1 or signal.shape != noise.shape or len(signal) < 2:
            raise ValueError(
                "signal and noise must be two lists of the same length T + 1 >= 2, "
                f"got shapes {tuple(signal.shape)} and {tuple(noise.shape)}"
            )
        if signal[0] != 1 or noise[0] != 0:
            raise ValueError(
                "entry 0 is the clean image: signal[0] must be 1 and noise[0] must be 0, "
                f"got {signal[0]:g} and {noise[0]:g}"
            )
        if not (torch.stack([signal, noise]).isfinite().all() and (signal >= 0).all()):
            raise ValueError("signal and noise must be finite, and signal not negative")
        if not ((signal[1:] / noise[1:]).diff() < 0).all() or not (noise[1:] > 0).all():
            raise ValueError("every step must add noise: signal / noise must fall strictly with t")
        object.__setattr__(self, "signal", signal)
        object.__setattr__(self, "noise", noise)

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Tensor) -> "Schedule":
        """The variance-preserving schedule of alpha_bar[0..T], 1 = alpha_bar[0] > ... >= 0."""
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
        if not ((alpha_bar >= 0) & (alpha_bar <= 1)).all():
            raise ValueError("alpha_bar must lie in [0, 1]")
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @classmethod
    def from_beta(cls, beta: Tensor) -> "Schedule":
        """The schedule of beta_1 ... beta_T: alpha_bar is the running product of 1 - beta."""
        beta = torch.as_tensor(beta, dtype=torch.float64)
        if not ((beta > 0) & (beta <= 1)).all():
            raise ValueError("every beta must lie in (0, 1]")
        return cls.from_alpha_bar(torch.cat([torch.ones(1).double(), (1 - beta).cumprod(0)]))

    @property
    def T(self) -> int:
        """The number of noising steps."""
        return len(self.signal) - 1

    @property
    def alpha_bar(self) -> Tensor:
        """alpha_bar[0..T] = signal ** 2, (T + 1,) float64 (DDPM eq. 4)."""
        return self.signal**2

    @property
    def beta(self) -> Tensor:
        """beta[0..T], (T + 1,) float64; beta[0] = 0 stands for no step (DDPM eq. 2)."""
        return torch.cat([torch.zeros(1).double(), 1 - (self.signal[1:] / self.signal[:-1]) ** 2])

    @property
    def log_snr(self) -> Tensor:
        """log(signal^2 / noise^2), (T + 1,) float64; +inf at t = 0."""
        return 2 * (self.signal.log() - self.noise.log())

    def at(self, t: Time) -> tuple[Tensor, Tensor]:
        """(signal, noise) at integer t in 0..T, float64 on the CPU, shaped like t.

        Raises ValueError for t outside 0..T and TypeError for a t that is not an integer.
        """
        t = torch.as_tensor(t)
        if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool:
            raise TypeError(f"t must hold integers in 0..{self.T}, got {t.dtype}")
        t = t.cpu().long()
        if t.numel() and (t.min() < 0 or t.max() > self.T):
            raise ValueError(f"t must lie in 0..{self.T}, got {t.min().item()}..{t.max().item()}")
        return self.signal[t], self.noise[t]

    def scales(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) at t, ready to multiply `like`: its dtype, its device, (B, 1, ..., 1)."""
        signal, noise = self.at(t)
        return cast(signal, like), cast(noise, like)


def cast(coefficient: Tensor, like: Tensor) -> Tensor:
    """A float64 coefficient, () or (B,), cast to `like`'s dtype and device, shaped (B, 1, ..., 1).

    Coefficients are derived in float64 and cast once, at the very end: sqrt(1 - alpha_bar_1)
    computed in float32 is wrong in the fourth digit. Raises ValueError unless B is 1 or the size of
    like's batch.
    """
    if not like.dtype.is_floating_point:
        raise TypeError(f"expected a floating-point image batch in [-1, 1], got {like.dtype}")
    if coefficient.ndim == 0:
        return coefficient.to(like.dtype).to(like.device)
    if coefficient.ndim != 1 or len(coefficient) not in (1, len(like)):
        raise ValueError(
            f"t must be an integer or hold one integer per image, shape ({len(like)},), "
            f"got shape {tuple(coefficient.shape)}"
        )
    return coefficient.to(like.dtype).to(like.device).view(-1, *[1] * (like.ndim - 1))


def linear(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """beta_1 ... beta_T evenly spaced, `first` to `last`, both times 1000 / T (DDPM sec. 4).

    The scaling keeps alpha_bar_T near 4e-5 for T >= 300; at T = 1000 the betas are the paper's.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    scale = 1000 / T
    if not 0 < first * scale <= last * scale <= 1:
        raise ValueError(
            f"the betas, scaled by 1000 / T, must lie in (0, 1], got {first * scale:g}.."
            f"{last * scale:g}; take a larger T or smaller betas"
        )
    return Schedule.from_beta(torch.linspace(first * scale, last * scale, T, dtype=torch.float64))


def cosine(T: int = 1000, s: float = 0.008, cap: float = 0.999) -> Schedule:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2) (Improved DDPM eq. 17).

    Every beta is cut to at most `cap`.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    f = (
        torch.cos((torch.linspace(0, 1, T + 1, dtype=torch.float64) + s) / (1 + s) * math.pi / 2)
        ** 2
    )
    return Schedule.from_beta((1 - f[1:] / f[:-1]).clamp(max=cap))


def straight(T: int = 1000) -> Schedule:
    """signal = 1 - t/T, noise = t/T: x_t moves on a line from x_0 to eps (Rectified Flow eq. 1).

    No signal is left at T, so predict x0, v or velocity. Times run from the image to the noise;
    that paper's run the other way.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    u = torch.arange(T + 1, dtype=torch.float64) / T
    return Schedule(1 - u, u)


SCHEDULES = {"linear": linear, "cosine": cosine, "straight": straight}
