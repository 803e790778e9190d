"""The denoiser: a network, a schedule, and what the network's output stands for."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minddpm.process import posterior_coefficients, reverse_log_variance
from minddpm.schedule import Schedule, Time, cast

# What a network may predict: a combination on_x0 * x_0 + on_eps * eps, as (on_x0, on_eps).
TARGETS = {
    "eps": lambda signal, noise: (torch.zeros_like(noise), torch.ones_like(noise)),
    "x0": lambda signal, noise: (torch.ones_like(signal), torch.zeros_like(signal)),
    "v": lambda signal, noise: (-noise, signal),
    "velocity": lambda signal, noise: (-torch.ones_like(signal), torch.ones_like(noise)),
}
VARIANCES = ("small", "large", "learned")


class Prediction(NamedTuple):
    """A consistent pair: x_t = signal * x0 + noise * eps, both (B, ...).

    `fraction` places the log of the reverse variance between small (0) and large (1): a float, or
    (B, ...) where the network learns it.
    """

    x0: Tensor
    eps: Tensor
    fraction: float | Tensor


class Denoiser(nn.Module):
    """Reads the output of `net(x_t, t)` as a prediction of the clean image and of the noise.

    net: any callable (x_t (B, C, ...), t (B,)) -> (B, C, ...), or 2C channels where it learns the
    variance.
    predicts: "eps" (DDPM eq. 11), "x0", "v" = signal * eps - noise * x0, or "velocity" = eps - x0.
    variance: "small" or "large" (DDPM sec. 3.2), or "learned" (Improved DDPM eq. 15). At the very
    last step, from 1 to 0, "large" is the small one, as in the authors' code.
    """

    def __init__(self, net, schedule: Schedule, predicts: str = "eps", variance: str = "large"):
        super().__init__()
        if predicts not in TARGETS:
            raise ValueError(f"predicts must be one of {', '.join(TARGETS)}, got {predicts!r}")
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
        if predicts == "eps" and schedule.signal[-1] == 0:
            raise ValueError(
                "where the signal is 0, eps does not determine x0: "
                "predict x0 or v, or take a schedule that keeps some signal at T"
            )
        self.net, self.schedule, self.predicts, self.variance = net, schedule, predicts, variance

    def forward(self, xt: Tensor, t: Time, clip: bool = False) -> Prediction:
        """Predict from x_t (B, ...) at t in 1..T; `clip` cuts x0 to [-1, 1] and eps follows."""
        output, fraction = self.read(xt, t)
        x0, eps = self.solve(xt, output, t)
        if clip:
            signal, noise = self.schedule.scales(t, like=xt)
            x0 = x0.clamp(-1, 1)
            eps = (xt - signal * x0) / noise
        return Prediction(x0, eps, fraction)

    def read(self, xt: Tensor, t: Time) -> tuple[Tensor, float | Tensor]:
        """The network's raw answer (B, ...) and the variance fraction that goes with it."""
        signal, _ = self.schedule.at(t)
        if (torch.as_tensor(t) == 0).any():
            raise ValueError(
                "t = 0 is the clean image, with nothing to denoise; t must lie in 1..T"
            )
        cast(signal, xt)  # a wrong dtype or batch size is one clear error, before the network runs
        steps = torch.as_tensor(t, device=xt.device).expand(len(xt))
        output = self.net(xt, steps)
        learned = self.variance == "learned"
        expected = (len(xt), xt.shape[1] * (1 + learned), *xt.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"with variance = {self.variance!r} and x_t of shape {tuple(xt.shape)} "
                f"the network must return shape {expected}, got {tuple(output.shape)}"
            )
        if not learned:
            return output, float(self.variance == "large")
        output, raw = output.chunk(2, dim=1)
        return output, (raw + 1) / 2

    def solve(self, xt: Tensor, output: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """(x0, eps) from x_t and the network's answer: two linear equations in two unknowns."""
        signal, noise = self.schedule.at(t)
        on_x0, on_eps = TARGETS[self.predicts](signal, noise)
        det = signal * on_eps - noise * on_x0
        x0 = cast(on_eps / det, xt) * xt - cast(noise / det, xt) * output
        eps = cast(signal / det, xt) * output - cast(on_x0 / det, xt) * xt
        return x0, eps

    def target(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """What the network should have answered, (B, ...)."""
        on_x0, on_eps = TARGETS[self.predicts](*self.schedule.at(t))
        return cast(on_x0, x0) * x0 + cast(on_eps, x0) * eps

    def reverse(
        self, xt: Tensor, t: Time, s: Time, prediction: Prediction
    ) -> tuple[Tensor, Tensor]:
        """(mean, log_var) of p(x_s | x_t) (DDPM eq. 1, 11).

        mean (B, ...): the posterior's, with the predicted x0 for the true one. log_var: () or
        (B, 1, ..., 1), or (B, ...) where it is learned.
        """
        on_x0, on_xt, _ = posterior_coefficients(self.schedule, t, s)
        small, large = reverse_log_variance(self.schedule, t, s)
        if self.variance == "large":  # the authors' fixedlarge: at the very last step it is small
            large = torch.where(torch.as_tensor(t).cpu() == 1, small, large)
        small, large = cast(small, xt), cast(large, xt)
        log_var = prediction.fraction * large + (1 - prediction.fraction) * small
        return cast(on_x0, xt) * prediction.x0 + cast(on_xt, xt) * xt, log_var


def score(denoiser: Denoiser, xt: Tensor, t: Time) -> Tensor:
    """The gradient of log q(x_t) as the denoiser sees it, -eps / noise, (B, ...)."""
    _, noise = denoiser.schedule.scales(t, like=xt)
    return -denoiser(xt, t).eps / noise
