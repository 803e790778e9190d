"""Guidance: ask the same network for more, by swapping the denoiser or the step.

`condition`, `classifier_free` and `classifier_guided` make a Denoiser of a Denoiser, `inpaint` a
step of a step. Losses, bounds, grids and the sampling loop stay as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minddpm.prediction import TARGETS, Denoiser
from minddpm.process import check_same_shape, q_sample, q_step
from minddpm.samplers import DPMSolver
from minddpm.schedule import cast

Rule = Callable[[Tensor, Tensor], Tensor]


class Guided(nn.Module):
    """A network that answers rule(x_t, t); its weights, and the shape it reads, are net's."""

    def __init__(self, net, rule: Rule):
        super().__init__()
        self.net, self.rule, self.shape = net, rule, getattr(net, "shape", None)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        return self.rule(xt, t)


def guided(denoiser: Denoiser, rule: Rule) -> Denoiser:
    """The denoiser with `rule` in the place of its network."""
    net = Guided(denoiser.net, rule)
    return Denoiser(net, denoiser.schedule, denoiser.predicts, denoiser.variance)


def condition(denoiser: Denoiser, labels: int | Tensor | None = None) -> Denoiser:
    """The denoiser of q(x_0 | label): a class for all images, or one for each, (B,).

    Its network takes (x_t, t, labels); None is "no class", the denoiser as it is. Raises ValueError
    where the network was built without classes, or a label is none of them.
    """
    if labels is None:
        return denoiser
    labels, classes = torch.as_tensor(labels), getattr(denoiser.net, "classes", None)
    if classes == 0:
        raise ValueError("this model was trained without classes: it takes no labels")
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1:
        raise ValueError("labels must be one whole number, or one for each image, (B,)")
    labels = labels.long()
    # On a GPU this would wait for it, at every update.
    if classes and labels.is_cpu and not ((labels >= 0) & (labels <= classes)).all():
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {labels.tolist()}")

    def rule(xt: Tensor, t: Tensor) -> Tensor:
        if labels.ndim and len(labels) not in (1, len(xt)):
            raise ValueError(f"{len(labels)} labels do not fit a batch of {len(xt)} images")
        return denoiser.net(xt, t, labels.to(xt.device).expand(len(xt)))

    return guided(denoiser, rule)


def classifier_free(denoiser: Denoiser, labels: int | Tensor, scale: float) -> Denoiser:
    """The answer without the labels plus `scale` times what they change (CFG eq. 6).

    scale: 0 ignores the labels, 1 is `condition`, more overdoes it; the paper's w is scale - 1. Two
    network calls. A learned variance is the one with the labels.
    """
    given = condition(denoiser, labels).net

    def rule(xt: Tensor, t: Tensor) -> Tensor:
        with_labels, without, c = given(xt, t), denoiser.net(xt, t), xt.shape[1]
        mixed = (1 - scale) * without[:, :c] + scale * with_labels[:, :c]
        return torch.cat([mixed, with_labels[:, c:]], dim=1)

    return guided(denoiser, rule)


def guide(denoiser: Denoiser, labels: int | Tensor | None = None, scale: float = 1.0) -> Denoiser:
    """`classifier_free` (CFG eq. 6), in one network call where one does: no labels, or scale 1."""
    if labels is None or scale == 1:
        return condition(denoiser, labels)
    return classifier_free(denoiser, labels, scale)


def classifier_guided(
    denoiser: Denoiser, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> Denoiser:
    """eps moved by -noise * scale * grad log p(label | x_t) (ADM alg. 2).

    log_prob: (x_t (B, ...), t (B,)) -> (B,), of a classifier of noisy images. Raises ValueError for
    a schedule that keeps no signal at T.
    """
    if denoiser.schedule.signal[-1] == 0:
        raise ValueError("where the signal is 0, a gradient does not determine x0")

    def rule(xt: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            at = xt.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_prob(at, t).sum(), at)
        signal, noise = denoiser.schedule.at(t)
        on_x0, on_eps = TARGETS[denoiser.predicts](signal, noise)
        on_slope = -scale * noise * (on_eps - on_x0 * noise / signal)  # x_t stays: x0 moves too
        output, c = denoiser.net(xt, t), xt.shape[1]
        return torch.cat([output[:, :c] + cast(on_slope, xt) * slope, output[:, c:]], dim=1)

    return guided(denoiser, rule)


def inpaint(step, known: Tensor, mask: Tensor, rounds: int = 1):
    """`step`, after which the known pixels are the noisy known image (RePaint alg. 1).

    known: (B, ...), the clean image, read where mask, (B, ...) or one for all, is True. rounds: how
    often each step is taken; in between x_s is noised to x_t again.
    """
    if rounds < 1 or isinstance(getattr(step, "func", step), (type, DPMSolver)):
        raise ValueError("rounds must be 1 or more, and the step one that remembers nothing")

    def stepping(denoiser: Denoiser, xt: Tensor, t: int, s: int, *, generator=None, **options):
        check_same_shape(known=known, xt=xt)
        noise = dict(generator=generator, dtype=xt.dtype, device=xt.device)
        for left in reversed(range(rounds)):
            xs, prediction = step(denoiser, xt, t, s, generator=generator, **options)
            eps = torch.randn(xt.shape, **noise)
            xs = torch.where(mask, q_sample(denoiser.schedule, known, s, eps), xs)
            if left:
                xt = q_step(denoiser.schedule, xs, t, s, torch.randn(xt.shape, **noise))
        return xs, prediction

    return stepping
