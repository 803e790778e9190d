"""Training objectives, one value per image."""

import torch
from torch import Tensor

from minddpm.likelihood import bound_term
from minddpm.prediction import Prediction
from minddpm.process import q_sample


def simple_loss(denoiser, x0: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
    """Squared error of the network's answer, averaged per image, (B,) (DDPM eq. 14).

    x0: (B, ...) in [-1, 1]. t (B,) in 1..T and eps (B, ...) are drawn here unless given. A learned
    variance receives no gradient from this loss.
    """
    t, eps = draw(denoiser.schedule.T, x0, t, eps)
    output, _ = denoiser.read(q_sample(denoiser.schedule, x0, t, eps), t)
    return squared_error(output, denoiser.target(x0, eps, t))


def vlb_loss(denoiser, x0: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
    """T times a random term L_{t-1}, (B,), bits per dimension (Improved DDPM eq. 4).

    Its mean over t is the bound without L_T, which no parameter changes. Arguments as above.
    """
    t, eps = draw(denoiser.schedule.T, x0, t, eps)
    xt = q_sample(denoiser.schedule, x0, t, eps)
    return denoiser.schedule.T * bound_term(denoiser, x0, xt, t, t - 1, denoiser(xt, t))


def hybrid_loss(
    denoiser, x0: Tensor, t: Tensor | None = None, eps: Tensor | None = None, weight: float = 1e-3
) -> Tensor:
    """simple_loss + weight * vlb_loss, (B,), from one network call (Improved DDPM eq. 16).

    The bound's gradient reaches the variance alone: the mean is detached. Arguments as above.
    """
    t, eps = draw(denoiser.schedule.T, x0, t, eps)
    xt = q_sample(denoiser.schedule, x0, t, eps)
    output, fraction = denoiser.read(xt, t)
    frozen = Prediction(*denoiser.solve(xt, output.detach(), t), fraction)
    bound = denoiser.schedule.T * bound_term(denoiser, x0, xt, t, t - 1, frozen)
    return squared_error(output, denoiser.target(x0, eps, t)) + weight * bound


def draw(T: int, x0: Tensor, t: Tensor | None, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    """t ~ Uniform{1..T} on the CPU and eps ~ N(0, I) like x0, where not given (DDPM alg. 1)."""
    if not x0.dtype.is_floating_point:
        raise TypeError(f"expected a floating-point image batch in [-1, 1], got {x0.dtype}")
    t = torch.randint(1, T + 1, (len(x0),)) if t is None else t
    return t, torch.randn_like(x0) if eps is None else eps


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over everything but the batch, (B,), in float32 at least."""
    precise = torch.promote_types(target.dtype, torch.float32)
    return (output.to(precise) - target).square().flatten(1).mean(1)


class ImportanceTimes:
    """Draws t with p_t proportional to sqrt(E[L_t^2]), from past losses (Improved DDPM eq. 18).

    history: (T, length) float64, the last losses of each time 1..T, NaN where there are none yet.
    Until it is full, times are uniform. A share `uniform` of the draws stays uniform, so that every
    time keeps a chance.
    """

    def __init__(self, T: int, length: int = 10, uniform: float = 1e-3):
        if T < 1 or length < 1 or not 0 < uniform <= 1:
            raise ValueError(
                "T and length must be 1 or more and uniform in (0, 1], "
                f"got {T}, {length} and {uniform}"
            )
        self.history = torch.full((T, length), torch.nan, dtype=torch.float64)
        self.uniform = uniform

    def probabilities(self) -> Tensor:
        """p_1 ... p_T, (T,) float64, summing to 1 (Improved DDPM eq. 18)."""
        root, T = self.history.square().mean(1).sqrt(), len(self.history)
        if root.isnan().any() or root.sum() == 0:
            return torch.full((T,), 1 / T, dtype=torch.float64)
        return (1 - self.uniform) * root / root.sum() + self.uniform / T

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(t, weight), (n,) each; the mean of weight * vlb_loss(denoiser, x0, t) is unbiased.

        weight = 1 / (T p_t) (Improved DDPM eq. 18).
        """
        p = self.probabilities()
        row = torch.multinomial(p, n, replacement=True, generator=generator)
        return row + 1, (1 / (len(p) * p[row])).float()

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Remember the losses (B,) at times t (B,), without their weights; the oldest are lost."""
        loss = loss.detach().double().cpu()
        if t.shape != loss.shape or not ((t >= 1) & (t <= len(self.history))).all():
            raise ValueError(f"expected one loss for each t in 1..{len(self.history)}")
        if not loss.isfinite().all():
            raise ValueError("a loss is NaN or infinite: lower the learning rate")
        for row, value in zip((t - 1).tolist(), loss):
            self.history[row] = torch.cat([self.history[row, 1:], value[None]])
