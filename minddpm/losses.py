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
