"""The denoiser's algebra against the papers' formulas and the gradient of log q."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from minddpm.oracle import gaussian
from minddpm.prediction import Denoiser, Prediction, score
from minddpm.process import q_sample
from minddpm.schedule import cosine, linear, straight

MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
STRAIGHT = straight(50)
each_target = pytest.mark.parametrize("predicts", ["eps", "x0", "v", "velocity"])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def echo(xt, t):
    return xt


@pytest.mark.parametrize("t", [1, 10, 500, 1000])
@pytest.mark.parametrize(
    "schedule", [linear(1000), cosine(1000, cap=0.9)], ids=["linear", "cosine"]
)
def test_all_targets_of_one_oracle_agree(schedule, t):
    x, targets = normal(16, 2), ("eps", "x0", "v", "velocity")
    answers = [gaussian(MEAN, COV).denoiser(schedule, p)(x, t) for p in targets]
    for other in answers[1:]:
        assert_close(other.x0, answers[0].x0, rtol=1e-12, atol=1e-12)
        assert_close(other.eps, answers[0].eps, rtol=1e-12, atol=1e-12)


@each_target
def test_solve_is_the_inverse_of_target(predicts):
    denoiser, t = Denoiser(echo, linear(1000), predicts), torch.tensor([1, 2, 300, 1000])
    x0, eps = normal(2, 4, 3, 8, 8)
    xt = q_sample(denoiser.schedule, x0, t, eps)
    found = denoiser.solve(xt, denoiser.target(x0, eps, t), t)
    assert_close(found, (x0, eps), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "predicts, formula",
    [
        ("eps", lambda x0, eps, a, b: eps),
        ("x0", lambda x0, eps, a, b: x0),
        ("v", lambda x0, eps, a, b: a * eps - b * x0),
        ("velocity", lambda x0, eps, a, b: eps - x0),
    ],
)
def test_target_is_its_formula(predicts, formula):
    x0, eps = normal(2, 3, 5)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000).double()).cumprod(0)[299]
    target = Denoiser(echo, linear(1000), predicts).target(x0, eps, 300)
    expected = formula(x0, eps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    assert_close(target, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "schedule, predicts",
    [
        *[(linear(1000), p) for p in ("eps", "x0", "v")],
        *[(STRAIGHT, p) for p in ("x0", "v", "velocity")],
    ],
)
def test_clipped_pair_is_in_range_and_still_consistent(schedule, predicts):
    denoiser, xt = Denoiser(lambda x, t: x.flip(1), schedule, predicts), 2 * normal(3, 3, 4, 4)
    t = torch.tensor([1, 25, schedule.T])
    signal, noise = schedule.scales(t, like=xt)
    free, clipped = denoiser(xt, t), denoiser(xt, t, clip=True)
    assert_close(clipped.x0, free.x0.clamp(-1, 1), rtol=0, atol=0)
    assert (free.x0.abs() > 1).any()
    for x0, eps, _ in (free, clipped):
        assert_close(signal * x0 + noise * eps, xt, rtol=1e-12, atol=1e-12)


def test_velocity_of_a_gaussian_is_its_flow_differentiated():
    """The flow moves x_t - a m along each axis as its deviation, sqrt(a^2 var + u^2), changes."""
    schedule, x, u, h = straight(50), normal(16, 1), 0.4, 1e-6
    law = gaussian([0.3], [[0.25]])

    def moved(w):
        spread = ((1 - w) ** 2 * 0.25 + w**2) ** 0.5 / ((1 - u) ** 2 * 0.25 + u**2) ** 0.5
        return (1 - w) * 0.3 + spread * (x - (1 - u) * 0.3)

    velocity = law.denoiser(schedule, "velocity").read(x, 20)[0]
    assert_close(velocity, (moved(u + h) - moved(u - h)) / (2 * h), rtol=1e-7, atol=1e-8)


def test_learned_variance_splits_the_channels():
    xt, raw = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    fixed = Denoiser(echo, linear(100))(xt, 7)
    learned = Denoiser(lambda x, t: torch.cat([x, raw], 1), linear(100), variance="learned")(xt, 7)
    assert_close(learned.x0, fixed.x0, rtol=0, atol=0)
    assert_close(learned.fraction, (raw + 1) / 2, rtol=0, atol=0)
    assert Denoiser(echo, linear(100), variance="large")(xt, 7).fraction == 1
    assert Denoiser(echo, linear(100), variance="small")(xt, 7).fraction == 0


def test_reverse_mean_is_equation_11():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    denoiser, t = Denoiser(lambda x, t: x.sin(), linear(1000)), torch.arange(1, 1001)
    xt = normal(1000, 1)
    mean, _ = denoiser.reverse(xt, t, t - 1, denoiser(xt, t))
    expected = (xt - (beta / (1 - alpha_bar).sqrt())[:, None] * xt.sin()) / (1 - beta).sqrt()[
        :, None
    ]
    assert_close(mean, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variance, v", [("small", 0.0), ("large", 1.0), ("learned", 0.3)])
def test_reverse_variance_interpolates_the_logarithms(variance, v):
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    small = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    denoiser, t, xt = (
        Denoiser(echo, linear(1000), variance=variance),
        torch.arange(2, 1001),
        normal(999, 1),
    )
    fraction = torch.full_like(xt, v) if variance == "learned" else denoiser.read(xt, t)[1]
    _, log_var = denoiser.reverse(xt, t, t - 1, Prediction(xt, xt, fraction))
    expected = v * beta[1:].log() + (1 - v) * small.log()
    assert_close(log_var.flatten(), expected, rtol=1e-9, atol=0)


def test_fixed_large_variance_begins_with_the_posterior_of_the_second_step():
    """The authors' fixedlarge is [beta-tilde_2, beta_2, ...]; a learned variance keeps beta_1."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    first = beta[1] * (1 - bar[0]) / (1 - bar[1])
    t, xt = torch.arange(1, 1001), normal(1000, 1)
    for variance, v, expected in [
        ("large", 1.0, torch.cat([first[None], beta[1:]])),
        ("learned", torch.ones(1000, 1), beta),
    ]:
        denoiser = Denoiser(echo, linear(1000), variance=variance)
        _, log_var = denoiser.reverse(xt, t, t - 1, Prediction(xt, xt, v))
        assert_close(log_var.exp().flatten(), expected, rtol=1e-9, atol=0)
    _, strided = Denoiser(echo, linear(1000)).reverse(xt, 20, 0, Prediction(xt, xt, 1.0))
    assert_close(strided.exp().item(), 1 - bar[19].item(), rtol=1e-9, atol=0)


@each_target
@pytest.mark.parametrize("t", [1, 30, 600, 1000])
def test_score_is_the_gradient_of_log_q(predicts, t):
    schedule = linear(1000)
    alpha_bar = math.prod(1 - (1e-4 + 0.0199 * i / 999) for i in range(t))
    cov = alpha_bar * COV + (1 - alpha_bar) * torch.eye(2).double()
    x = normal(8, 2).requires_grad_()
    log_q = MultivariateNormal(alpha_bar**0.5 * MEAN, cov).log_prob(x)
    (gradient,) = torch.autograd.grad(log_q.sum(), x)
    ours = score(gaussian(MEAN, COV).denoiser(schedule, predicts), x.detach(), t)
    assert_close(ours, gradient, rtol=1e-9, atol=1e-9)


def test_network_sees_one_time_per_image_and_gradients_flow_through():
    seen, weight = [], torch.tensor(0.5, requires_grad=True)
    denoiser = Denoiser(lambda x, t: seen.append(t) or weight * x, linear(100))
    for t in (7, torch.tensor(7), torch.tensor([7]), torch.full((5,), 7, dtype=torch.uint8)):
        denoiser(torch.ones(5, 2), t).x0.sum().backward()
        assert seen[-1].tolist() == [7] * 5
    assert weight.grad != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prediction_has_the_type_of_the_image(dtype):
    net = torch.nn.Linear(2, 4, dtype=dtype)
    denoiser = Denoiser(lambda x, t: net(x), linear(100), "v", "learned")
    assert {part.dtype for part in denoiser(torch.ones(3, 2, dtype=dtype), 5, clip=True)} == {dtype}


def test_network_is_a_submodule():
    assert set(Denoiser(torch.nn.Linear(2, 2), linear(50)).state_dict()) == {
        "net.weight",
        "net.bias",
    }


X = torch.zeros(4, 3, 2, 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Denoiser(echo, linear(50), "noise"), ValueError, "x0, v, velocity, got 'noise'"),
        (
            lambda: Denoiser(echo, linear(50), variance="fixed"),
            ValueError,
            "one of small, large, learned, got 'fixed'",
        ),
        (lambda: Denoiser(echo, linear(20)), ValueError, "signal is 0.* predict x0 or v"),
        (lambda: Denoiser(echo, linear(50))(X, 0), ValueError, "t = 0 is the clean image"),
        (lambda: Denoiser(echo, linear(50))(X, 51), ValueError, r"t must lie in 0\.\.50, got 51"),
        (lambda: Denoiser(echo, linear(50))(X, 1.0), TypeError, "integers in 0..50"),
        (lambda: Denoiser(echo, linear(50))(X.byte(), 1), TypeError, "floating-point image batch"),
        (
            lambda: Denoiser(echo, linear(50))(X, torch.ones(3).int()),
            ValueError,
            r"one integer per image, shape \(4,\)",
        ),
        (
            lambda: Denoiser(lambda x, t: x[:, :2], linear(50))(X, 1),
            ValueError,
            r"return shape \(4, 3, 2, 2\), got \(4, 2, 2, 2\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3, 5, 7])
def test_learned_variance_needs_twice_the_channels(channels):
    denoiser = Denoiser(
        lambda x, t: X[:, :1].expand(4, channels, 2, 2), linear(50), variance="learned"
    )
    with pytest.raises(
        ValueError, match=rf"'learned' .* \(4, 6, 2, 2\), got \(4, {channels}, 2, 2\)"
    ):
        denoiser(X, 1)
