"""Guidance against mixtures of Gaussians, where every guided score is a known gradient."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from minddpm import checkpoint, generate
from minddpm.guidance import classifier_free, classifier_guided, condition, inpaint
from minddpm.nets import UNet
from minddpm.oracle import GaussianMixture, gaussian
from minddpm.prediction import Denoiser, score
from minddpm.process import posterior_coefficients
from minddpm.samplers import DPMSolver, ancestral, ddim, sample, uniform_grid
from minddpm.schedule import Schedule, cosine, linear

SCHEDULE = linear(1000)
MEANS = torch.tensor([[-0.6, 0.1], [0.5, 0.4], [0.7, -0.5]])
COVS = torch.tensor([[[2, 0], [0, 2]], [[5, 2], [2, 3]], [[1, 0], [0, 4]]]) / 100
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])
WHOLE = GaussianMixture(MEANS, COVS, WEIGHTS)
CLASSES = [  # class 0 is one Gaussian, class 1 a mixture of the two others
    GaussianMixture(MEANS[:1], COVS[:1]),
    GaussianMixture(MEANS[1:], COVS[1:], WEIGHTS[1:] / 0.5),
]
TIMES = torch.tensor([1, 20, 150, 400, 700, 1000])
each_target = pytest.mark.parametrize("predicts", ["eps", "x0", "v"])


def labelled(predicts):
    """The perfect conditional denoiser: its network reads (x_t, t, labels)."""
    nets = [m.denoiser(SCHEDULE, predicts).net for m in (*CLASSES, WHOLE)]

    def net(xt, t, labels=None):
        labels = torch.full_like(t, 2) if labels is None else labels
        return torch.stack([f(xt, t) for f in nets])[labels, torch.arange(len(xt))]

    return Denoiser(net, SCHEDULE, predicts, "small")


def log_posterior(labels):
    """log p(label | x_t) by Bayes' rule, from densities alone."""

    def log_prob(xt, t):
        signal, noise = SCHEDULE.at(t)
        signal, noise = signal[:, None], noise[:, None]
        given = [m.log_prob(xt, signal, noise) + torch.tensor(0.5).log() for m in CLASSES]
        chosen = torch.stack(given)[labels, torch.arange(len(xt))]
        return chosen - WHOLE.log_prob(xt, signal, noise)

    return log_prob


def points(n=6):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


@each_target
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 4.0])
def test_classifier_free_score_is_the_gradient_of_the_tilted_density(predicts, scale):
    xt = points().requires_grad_()
    signal, noise = (x[:, None] for x in SCHEDULE.at(TIMES))
    tilted = WHOLE.log_prob(xt, signal, noise) + scale * log_posterior(LABELS)(xt, TIMES)
    (slope,) = torch.autograd.grad(tilted.sum(), xt)
    ours = score(classifier_free(labelled(predicts), LABELS, scale), xt.detach(), TIMES)
    assert_close(ours, slope, rtol=1e-7, atol=1e-7)


@each_target
def test_scale_0_and_1_are_the_denoiser_without_and_with_labels(predicts):
    denoiser, xt = labelled(predicts), points()
    for scale, same in [(0, denoiser), (1, condition(denoiser, LABELS))]:
        ours = classifier_free(denoiser, LABELS, scale)
        assert_close(ours(xt, TIMES)[:2], same(xt, TIMES)[:2], rtol=0, atol=0)


@each_target
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_exact_classifier_guides_as_the_conditional_denoiser_does(predicts, scale):
    denoiser, xt = labelled(predicts), points()
    with torch.no_grad():  # as in the sampling loop
        ours = classifier_guided(denoiser, log_posterior(LABELS), scale)(xt, TIMES)
        theirs = classifier_free(denoiser, LABELS, scale)(xt, TIMES)
    assert not ours.x0.requires_grad
    assert_close(ours[:2], theirs[:2], rtol=1e-6, atol=1e-7)


def test_one_label_is_for_all_and_none_is_the_denoiser_itself():
    denoiser, xt = labelled("eps"), points()
    ones = torch.ones(6, dtype=torch.int64)
    assert_close(condition(denoiser, 1)(xt, 50), condition(denoiser, ones)(xt, 50), rtol=0, atol=0)
    assert condition(denoiser, None) is denoiser
    end = sample(condition(denoiser, 0), points(500), uniform_grid(1000, 100), ddim, clip=False)
    assert_close(end.mean(0), MEANS[0].double(), rtol=0, atol=5 * (0.02 / 500) ** 0.5)


def test_a_learned_variance_is_the_one_with_the_labels():
    def net(xt, t, labels=None):
        shown = 0.0 if labels is None else 1.0 + labels[:, None, None, None]
        return torch.cat([xt * (2 + shown), (xt * 0 + 0.5) * shown], dim=1)

    denoiser = Denoiser(net, SCHEDULE, "eps", "learned")
    xt = torch.randn(2, 1, 3, 3)
    labels = torch.tensor([0, 1])
    ours = classifier_free(denoiser, labels, 3.0)(xt, 9)
    assert_close(ours.fraction, condition(denoiser, labels)(xt, 9).fraction)
    factor = torch.tensor([2 + 3 * 1.0, 2 + 3 * 2.0])[:, None, None, None]
    assert_close(ours.eps, factor * xt)
    pushed = classifier_guided(denoiser, lambda x, t: x.flatten(1).sum(1), 2.0)(xt, 9)
    assert_close(pushed.eps, 2 * xt - 2 * SCHEDULE.noise[9].float())
    assert_close(pushed.fraction, denoiser(xt, 9).fraction)


def test_a_guided_network_is_still_a_network():
    """Samplers ask it for its shape and for the device of its weights."""
    torch.manual_seed(0)
    net = UNet(1, 8, 8, (1,), 1, (), 0.0, classes=3).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    denoiser = Denoiser(net, cosine(10), "v")
    ours = classifier_free(denoiser, torch.tensor([2, 0]), 2.0)
    assert ours.net.shape == net.shape
    assert len(list(ours.parameters())) == len(list(net.parameters()))
    xt, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    apart = [net(xt, t, torch.tensor(y)) for y in ([2, 0], [3, 3])]
    assert_close(ours.read(xt, t)[0], 2 * apart[0] - apart[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(*apart)


def test_mistakes_are_named():
    without = Denoiser(UNet(1, 8, 8, (1,), 1, ()), cosine(10), "v")
    with pytest.raises(ValueError, match="trained without classes"):
        condition(without, 1)
    with pytest.raises(ValueError, match="trained without classes"):
        classifier_free(without, 1, 2.0)
    few = Denoiser(UNet(1, 8, 8, (1,), 1, (), classes=3), cosine(10), "v")
    for bad in (-1, 4, torch.tensor([0, 7])):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, got"):
            condition(few, bad)
    blank = Schedule(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.75**0.5, 1.0]))
    with pytest.raises(ValueError, match="where the signal is 0"):
        classifier_guided(Denoiser(lambda x, t: x, blank, "v"), lambda x, t: x)
    for step, rounds in [(ancestral, 0), (DPMSolver, 1)]:
        with pytest.raises(ValueError, match="rounds must be 1 or more, and the step one that"):
            inpaint(step, points(), points() > 0, rounds)
    step = inpaint(ddim, points(3), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="expected equal shapes, got known"):
        sample(labelled("eps"), points(), [9, 0], step)


# Inpainting, of one coordinate of a Gaussian given the other

COV = torch.tensor([[0.3, 0.2], [0.2, 0.25]], dtype=torch.float64)
KNOWN = 0.8


def law(grid, rounds):
    """(mean, variance) of the inpainted coordinate: the chain is linear, its moments matrices."""
    mean, cov = torch.zeros(2).double(), torch.eye(2).double()
    hide = torch.tensor([0.0, 1.0]).double()
    for t, s in pairwise(grid):
        signal, noise = SCHEDULE.at(t)
        gain = signal * COV @ torch.linalg.inv(signal**2 * COV + noise**2 * torch.eye(2))
        on_x0, on_xt, var = posterior_coefficients(SCHEDULE, t, s)
        step = on_x0 * gain + on_xt * torch.eye(2)
        signal_s, noise_s = SCHEDULE.at(s)
        scale = signal / signal_s
        for left in reversed(range(rounds)):
            mean, cov = step @ mean, step @ cov @ step.T + var * torch.eye(2)
            mean = hide * mean + (1 - hide) * signal_s * KNOWN
            cov = hide[:, None] * cov * hide + torch.diag(1 - hide) * noise_s**2
            if left:
                again = noise**2 - scale**2 * noise_s**2
                mean, cov = scale * mean, scale**2 * cov + again * torch.eye(2)
    return mean[1].item(), cov[1, 1].item()


TRUE = (KNOWN * 0.2 / 0.3, 0.25 - 0.2**2 / 0.3)


@pytest.mark.parametrize("rounds", [1, 4])
def test_inpainting_a_gaussian_has_the_law_that_its_matrices_say(rounds):
    n, grid = 20_000, uniform_grid(1000, 40)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=g, dtype=torch.float64)
    known = torch.tensor([KNOWN, 77.0], dtype=torch.float64).expand(n, 2)  # 77 is not read
    step = inpaint(ancestral, known, torch.tensor([True, False]), rounds)
    denoiser = gaussian(torch.zeros(2), COV).denoiser(SCHEDULE)
    end = sample(denoiser, x, grid, step, clip=False, generator=g)
    mean, var = law(grid, rounds)
    assert (end[:, 0] == KNOWN).all()
    assert abs(end[:, 1].mean() - mean) < 5 * (var / n) ** 0.5
    assert abs(end[:, 1].var() / var - 1) < 5 * (2 / n) ** 0.5


def test_rounds_bring_inpainting_nearer_to_the_conditional_law():
    errors = [abs(law(uniform_grid(1000, 40), r)[0] - TRUE[0]) for r in (1, 4, 16)]
    assert errors[0] > 0.02 and errors[0] > 1.5 * errors[1] > 2 * errors[2], errors


def test_nothing_known_is_the_step_itself_and_all_known_is_the_image():
    denoiser, x = gaussian(torch.zeros(2), COV).denoiser(SCHEDULE), points()
    nothing, everything = (torch.full((2,), known) for known in (False, True))
    grid = uniform_grid(1000, 20)
    ours = sample(denoiser, x, grid, inpaint(ddim, x, nothing), clip=False)
    assert_close(ours, sample(denoiser, x, grid, ddim, clip=False), rtol=0, atol=0)
    assert torch.equal(sample(denoiser, x, grid, inpaint(ddim, x + 1, everything)), x + 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0]), "labels must be one whole number"),
        (torch.tensor([True, False]), "labels must be one whole number"),
        (torch.zeros(2, 1).long(), "labels must be one whole number"),
        ([0, 1, 2], "3 labels do not fit a batch of 2 images"),
    ],
)
def test_labels_that_cannot_be_get_one_line(labels, message):
    denoiser = Denoiser(lambda x, t, y: x * y.view(-1, 1), cosine(10), "v")
    with pytest.raises(ValueError, match=message):
        condition(denoiser, labels)(torch.randn(2, 3), 5)


@pytest.mark.parametrize("step", [DPMSolver, DPMSolver(), partial(DPMSolver, order=3)])
def test_a_step_that_remembers_is_refused_for_inpainting(step):
    with pytest.raises(ValueError):
        inpaint(step, torch.zeros(1, 3), torch.ones(1, 3).bool())


def test_shipped_ships_are_on_water_and_frogs_are_not():
    """Blue less red, in levels: 16 on average for CIFAR-10's ships and -32 for its frogs."""
    denoiser = checkpoint.load("cifar10-tiny")
    assert (denoiser.net.shape, denoiser.net.classes) == ((3, 32, 32), 10)
    grid, labels = uniform_grid(1000, 10), [6] * 8 + [8] * 8
    pixels = generate.samples(denoiser, 16, grid, DPMSolver, labels=labels, scale=3.0).float()
    blue = (pixels[:, 2] - pixels[:, 0]).mean(dim=(1, 2))
    frogs, ships = blue.split(8)
    assert ships.mean() > 0 > frogs.mean() and ships.mean() - frogs.mean() > 40
