"""The oracles against torch.distributions, quadrature, sampling and plain loops."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch.testing import assert_close

from minddpm.oracle import GaussianMixture, finite, gaussian
from minddpm.schedule import linear

MEANS = torch.tensor([[0.5, -1.0], [-0.7, 0.2], [1.5, 1.0]], dtype=torch.float64)
COVS = torch.tensor(
    [[[0.3, 0.1], [0.1, 0.2]], [[0.05, 0.0], [0.0, 0.4]], [[0.2, -0.15], [-0.15, 0.2]]]
).double()
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
MIXTURE = GaussianMixture(MEANS, COVS, WEIGHTS)
LEVELS = [(1.0, 0.0), (0.999, 0.05), (0.6, 0.8), (0.01, 0.9999), (1.0, 20.0), (0.0, 1.0)]
each_level = pytest.mark.parametrize("signal, noise", LEVELS)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def marginal(signal, noise):
    covs = signal**2 * COVS + noise**2 * torch.eye(2).double()
    return MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(signal * MEANS, covs))


@each_level
def test_log_prob_is_that_of_torch_distributions(signal, noise):
    x = 2 * normal(50, 2)
    expected = marginal(signal, noise).log_prob(x)
    assert_close(MIXTURE.log_prob(x, signal, noise), expected, rtol=1e-10, atol=1e-10)


def test_weights_are_equal_unless_given():
    x, thirds = normal(5, 1), GaussianMixture([[-1.0], [0.0], [2.0]], 0.01)
    exact = sum((-50 * (x[:, 0] - m) ** 2).exp() for m in (-1, 0, 2)) / (
        0.3 * math.sqrt(2 * math.pi)
    )
    assert_close(thirds.log_prob(x), exact.log(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("signal, noise", LEVELS[1:])
def test_x0_mean_is_the_integral_over_x0(signal, noise):
    means, stds, weights = [-1.0, 0.4], [0.1, 0.5], [0.3, 0.7]
    covs = torch.tensor(stds).double().square().view(2, 1, 1)
    oracle = GaussianMixture(torch.tensor(means).double()[:, None], covs, weights)
    x0 = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    xt = torch.tensor([[-1.3], [0.0], [0.7]], dtype=torch.float64)
    prior = sum(w * Normal(m, s).log_prob(x0).exp() for w, m, s in zip(weights, means, stds))
    posterior = prior * Normal(signal * x0, noise).log_prob(xt).exp()
    expected = (posterior * x0).sum(1, keepdim=True) / posterior.sum(1, keepdim=True)
    assert_close(oracle.x0_mean(xt, signal, noise), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("signal, noise", LEVELS[2:])
def test_x0_mean_is_the_weighted_mean_of_samples(signal, noise):
    n = 200_000
    x0 = MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(MEANS, COVS))
    torch.manual_seed(0)
    x0, xt = x0.sample((n,)), torch.tensor([[0.3, -0.2]]).double()
    weight = Normal(signal * x0, noise).log_prob(xt).sum(1).softmax(0)[:, None]
    expected = (weight * x0).sum(0)
    error = 4 * (weight**2 * (x0 - expected) ** 2).sum(0).sqrt().max().item()
    assert_close(MIXTURE.x0_mean(xt, signal, noise)[0], expected, rtol=0, atol=error)
    assert error < 0.02


@pytest.mark.parametrize("signal, noise", LEVELS[1:5])
def test_x0_mean_obeys_tweedies_formula(signal, noise):
    x = normal(20, 2).requires_grad_()
    (score,) = torch.autograd.grad(marginal(signal, noise).log_prob(x).sum(), x)
    expected = (x.detach() + noise**2 * score) / signal
    assert_close(MIXTURE.x0_mean(x.detach(), signal, noise), expected, rtol=1e-9, atol=1e-9)


def test_finite_data_set_is_a_softmax_over_its_points():
    points, xt, signal, noise = normal(7, 1, 2, 2), normal(3, 1, 2, 2, seed=1), 0.8, 0.6
    expected = torch.empty_like(xt)
    for i, x in enumerate(xt):
        weights = [math.exp(-((x - signal * p) ** 2).sum() / (2 * noise**2)) for p in points]
        expected[i] = sum(w * p for w, p in zip(weights, points)) / sum(weights)
    assert_close(finite(points).x0_mean(xt, signal, noise), expected, rtol=1e-10, atol=1e-10)
    assert finite(points).x0_mean(xt.float(), signal, noise).dtype == torch.float32


def test_nearly_clean_image_is_recognized():
    points = normal(50, 64)
    schedule = linear(1000)
    xt = schedule.signal[1] * points + schedule.noise[1] * normal(50, 64, seed=1)
    assert_close(finite(points).denoiser(schedule)(xt, 1).x0, points, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variance", [0.0, 0.3])
@pytest.mark.parametrize("signal, noise", LEVELS[1:])
def test_round_components_are_a_case_of_full_covariances(variance, signal, noise):
    full = GaussianMixture(MEANS, variance * torch.eye(2).expand(3, 2, 2).double(), WEIGHTS)
    round_ = GaussianMixture(MEANS, variance, WEIGHTS)
    x = normal(20, 2)
    for method in ("log_prob", "x0_mean"):
        ours, theirs = (getattr(o, method)(x, signal, noise) for o in (round_, full))
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("oracle", [MIXTURE, GaussianMixture(MEANS, 0.2, WEIGHTS)])
def test_samples_have_the_moments_of_the_mixture(oracle):
    covs = COVS if oracle is MIXTURE else 0.2 * torch.eye(2).double()
    mean = WEIGHTS @ MEANS
    spread = MEANS - mean
    cov = (WEIGHTS[:, None, None] * (covs + spread[:, :, None] * spread[:, None])).sum(0)
    n = 50_000
    x = oracle.sample(n, torch.Generator().manual_seed(0))
    assert_close(x.mean(0), mean, rtol=0, atol=4 * (cov.max().item() / n) ** 0.5)
    assert_close(x.T.cov(), cov, rtol=0, atol=4 * cov.max().item() * (3 / n) ** 0.5)
    assert_close(x, oracle.sample(n, torch.Generator().manual_seed(0)), rtol=0, atol=0)


def test_nll_is_minus_the_log_density_at_each_time():
    t, x = torch.tensor([1, 30, 100]), normal(3, 2)
    bar = linear(100).alpha_bar[t].tolist()
    expected = [-marginal(b**0.5, (1 - b) ** 0.5).log_prob(x[i]).item() for i, b in enumerate(bar)]
    assert_close(MIXTURE.nll(linear(100), x, t), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_singular_covariances_are_welcome():
    direction = normal(100, 4)
    for v in direction:  # some of these have an eigenvalue of -1e-17
        line = gaussian(torch.zeros(4), v[:, None] * v)
        off = line.sample(3, torch.Generator().manual_seed(0)) @ (
            torch.eye(4).double() - v[:, None] * v / (v @ v)
        )
        assert_close(off, torch.zeros(3, 4).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GaussianMixture(MEANS[0], 1.0), r"means must have shape \(K, D\), got \(2,\)"),
        (lambda: GaussianMixture(MEANS, COVS[:2]), r"shape \(3, 2, 2\), got \(2, 2, 2\)"),
        (lambda: GaussianMixture(MEANS, COVS, [0.5, 0.5]), "weights must be 3 positive"),
        (lambda: GaussianMixture(MEANS, COVS, [0.5, 0.5, 0.0]), "weights must be 3 positive"),
        (lambda: GaussianMixture(MEANS, COVS, [0.5, 0.5, 0.5]), "that sum to 1"),
        (lambda: GaussianMixture(MEANS, COVS, [0.5, 0.5, math.nan]), "weights must be 3 positive"),
        (lambda: GaussianMixture(MEANS, -COVS), "no negative eigenvalue"),
        (lambda: GaussianMixture(MEANS, -0.1), "no negative eigenvalue"),
        (lambda: GaussianMixture(MEANS, math.nan), "symmetric and finite"),
        (lambda: gaussian(MEANS[0], [[1.0, 0.5], [0.0, 1.0]]), "symmetric and finite"),
        (
            lambda: MIXTURE.log_prob(torch.zeros(4, 3)),
            r"points of 2 coordinates.* got shape \(4, 3\)",
        ),
        (lambda: MIXTURE.log_prob(torch.zeros(2)), r"\(B, ...\), got shape \(2,\)"),
        (lambda: finite(MEANS).log_prob(MEANS), "no density of their own: take noise > 0"),
        (lambda: gaussian(MEANS[0], torch.ones(2, 2)).log_prob(MEANS), "take noise > 0"),
        (lambda: MIXTURE.denoiser(linear(50), "noise"), "predicts must be one of"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
