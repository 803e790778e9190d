"""Exact denoisers: data distributions simple enough that everything about x_t is known.

For x_0 from a mixture of Gaussians, x_t = signal * x_0 + noise * eps is a mixture of Gaussians too:
its density, its score and the best prediction E[x_0 | x_t] are closed forms, the truth that
samplers, bounds and trained networks are held against.
"""

import math

import torch
from torch import Tensor

from minddpm.prediction import TARGETS, Denoiser
from minddpm.schedule import Schedule, Time, cast


class GaussianMixture:
    """sum_k weight_k N(mean_k, cov_k) over points of D coordinates, in float64.

    means: (K, D). covs: (K, D, D), or one variance for all of them (0 for a finite data set).
    weights: (K,), positive, summing to 1; equal unless given.
    """

    def __init__(self, means: Tensor, covs: Tensor | float, weights: Tensor | None = None):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2:
            raise ValueError(f"means must have shape (K, D), got {tuple(self.means.shape)}")
        k, d = self.means.shape
        covs = torch.as_tensor(covs, dtype=torch.float64)
        if covs.ndim and covs.shape != (k, d, d):
            raise ValueError(
                f"covs must be a number or of shape {(k, d, d)}, got {tuple(covs.shape)}"
            )
        self.weights = torch.as_tensor(
            [1 / k] * k if weights is None else weights, dtype=torch.float64
        )
        if (
            self.weights.shape != (k,)
            or not (self.weights > 0).all()
            or abs(self.weights.sum() - 1) > 1e-6
        ):
            raise ValueError(f"weights must be {k} positive numbers that sum to 1")
        if not torch.allclose(covs, covs.mT if covs.ndim else covs):
            raise ValueError("covs must be symmetric and finite")
        self.variances, self.axes = torch.linalg.eigh(covs) if covs.ndim else (covs, None)
        if (self.variances < -1e-12 * self.variances.abs().max()).any():
            raise ValueError("covs must have no negative eigenvalue")
        self.variances = self.variances.clamp(min=0)  # a singular matrix's come out as -1e-17

    def log_prob(
        self, xt: Tensor, signal: float | Tensor = 1.0, noise: float | Tensor = 0.0
    ) -> Tensor:
        """log q(x_t), (B,) nats, x_t (B, ...) = signal * x_0 + noise * eps; of x_0 by default."""
        return self._solve(xt, signal, noise)[0].logsumexp(1)

    def x0_mean(self, xt: Tensor, signal: float | Tensor, noise: float | Tensor) -> Tensor:
        """E[x_0 | x_t], (B, ...) like x_t: no denoiser has a smaller squared error."""
        return self._solve(xt, signal, noise)[1].view(xt.shape).to(xt)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n points (n, D) of x_0."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        if self.axes is None:
            return self.means[k] + self.variances.sqrt() * z
        return self.means[k] + torch.einsum(
            "bij,bj->bi", self.axes[k], self.variances[k].sqrt() * z
        )

    def denoiser(
        self, schedule: Schedule, predicts: str = "x0", variance: str = "small"
    ) -> Denoiser:
        """The perfect Denoiser for this data: its network is the closed form."""

        def net(xt: Tensor, t: Tensor) -> Tensor:
            signal, noise = schedule.at(t)
            x0 = self.x0_mean(xt, signal, noise)
            eps = (xt - cast(signal, xt) * x0) / cast(noise, xt)
            on_x0, on_eps = TARGETS[predicts](signal, noise)
            return cast(on_x0, xt) * x0 + cast(on_eps, xt) * eps

        return Denoiser(net, schedule, predicts, variance)

    def nll(self, schedule: Schedule, xt: Tensor, t: Time) -> Tensor:
        """-log q(x_t), (B,) nats, at time t."""
        signal, noise = schedule.at(t)
        return -self.log_prob(xt, signal, noise)

    def _solve(self, xt, signal, noise) -> tuple[Tensor, Tensor]:
        """(log weight_k q(x_t | k), (B, K); E[x_0 | x_t], (B, D))."""
        if xt.ndim < 2 or xt.shape[1:].numel() != self.means.shape[1]:
            raise ValueError(
                f"expected points of {self.means.shape[1]} coordinates, (B, ...), "
                f"got shape {tuple(xt.shape)}"
            )
        x = xt.double().cpu().flatten(1)
        signal, noise = (
            torch.as_tensor(c, dtype=torch.float64).reshape(-1, 1) for c in (signal, noise)
        )
        if self.axes is not None:
            signal, noise = signal[..., None], noise[..., None]
        total = signal**2 * self.variances + noise**2  # the variances of x_t given k, (B, K, D)
        if not (total > 0).all():
            raise ValueError(
                "points, lines and planes have no density of their own: take noise > 0"
            )
        if self.axes is None:
            return self._solve_round(x, signal, total)
        off = torch.einsum("kij,bki->bkj", self.axes, x[:, None] - signal * self.means)
        log_q = -0.5 * (off**2 / total + torch.log(2 * math.pi * total)).sum(2)
        log_joint = self.weights.log() + log_q
        shift = torch.einsum("kij,bkj->bki", self.axes, signal * self.variances / total * off)
        return log_joint, (log_joint.softmax(1)[..., None] * (self.means + shift)).sum(1)

    def _solve_round(self, x, signal, total) -> tuple[Tensor, Tensor]:
        """_solve for components of one variance, from distances, without a (B, K, D) table."""
        squares = x.square().sum(1, keepdim=True) + signal**2 * self.means.square().sum(1)
        distance = (squares - 2 * signal * (x @ self.means.T)).clamp(min=0)
        log_q = -0.5 * (distance / total + x.shape[1] * torch.log(2 * math.pi * total))
        log_joint = self.weights.log() + log_q
        centre = log_joint.softmax(1) @ self.means
        return log_joint, centre + signal * self.variances / total * (x - signal * centre)


def gaussian(mean: Tensor, cov: Tensor) -> GaussianMixture:
    """N(mean, cov): mean (D,), cov (D, D)."""
    mean, cov = (torch.as_tensor(x, dtype=torch.float64)[None] for x in (mean, cov))
    return GaussianMixture(mean, cov)


def finite(points: Tensor) -> GaussianMixture:
    """The data set itself, its points (N, ...) with weight 1 / N each: the best at memorizing."""
    return GaussianMixture(points.flatten(1), 0.0)
