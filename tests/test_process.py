"""The Gaussians of q against eq. 7 typed out, brute-force conditioning and numerical Bayes."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

from minddpm.process import (
    forward_coefficients,
    posterior_coefficients,
    q_posterior,
    q_sample,
    q_step,
    reverse_log_variance,
)
from minddpm.schedule import Schedule, cosine, linear

T = 40
STRAIGHT = Schedule(1 - torch.arange(T + 1) / T, torch.arange(T + 1) / T)  # x0 to noise in a line
GROWING = Schedule(torch.ones(T + 1), torch.arange(T + 1) ** 2 / 10)
SCHEDULES = {"linear": linear(T), "cosine": cosine(T), "straight": STRAIGHT, "growing": GROWING}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
PAIRS = [(t, s) for t in range(1, T + 1) for s in range(t)]


def chain(schedule):
    """x_t = mean[t] * x_0 + noise with covariance cov[s, t], by walking one step after another."""
    ratio = (schedule.signal[1:] / schedule.signal[:-1]).tolist()
    mean, rows = [1.0], torch.zeros(T + 1, T, dtype=torch.float64)  # x_t on independent noises
    for t in range(1, T + 1):
        var = schedule.noise[t] ** 2 - ratio[t - 1] ** 2 * schedule.noise[t - 1] ** 2
        mean.append(ratio[t - 1] * mean[-1])
        rows[t] = ratio[t - 1] * rows[t - 1]
        rows[t, t - 1] = var.sqrt()
    return torch.tensor(mean, dtype=torch.float64), rows @ rows.T


def affine(function):
    """The coefficients of a function (x0, xt) -> tensor that is linear in both, one per pair."""
    one, zero = (torch.full((len(PAIRS), 1), x, dtype=torch.float64) for x in (1.0, 0.0))
    return function(one, zero).flatten(), function(zero, one).flatten()


def test_posterior_is_equation_7_at_every_step():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha, alpha_bar = 1 - beta, (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    t, one = torch.arange(1, 1001), torch.ones(1000, 1, dtype=torch.float64)
    on_x0, var = q_posterior(linear(1000), one, 0 * one, t, t - 1)
    on_xt, _ = q_posterior(linear(1000), 0 * one, one, t, t - 1)
    exact = dict(rtol=0, atol=1e-12)
    assert_close(on_x0.flatten(), before.sqrt() * beta / (1 - alpha_bar), **exact)
    assert_close(on_xt.flatten(), alpha.sqrt() * (1 - before) / (1 - alpha_bar), **exact)
    assert_close(var.flatten(), (1 - before) / (1 - alpha_bar) * beta, **exact)


@each_schedule
def test_posterior_is_the_conditional_of_the_joint_gaussian(schedule):
    mean, cov = chain(schedule)
    t, s = torch.tensor(PAIRS).T
    gain = cov[s, t] / cov[t, t]  # E[x_s | x_t, x_0] = E[x_s | x_0] + gain (x_t - E[x_t | x_0])
    on_x0, on_xt = affine(lambda x0, xt: q_posterior(schedule, x0, xt, t, s)[0])
    _, _, var = posterior_coefficients(schedule, t, s)
    close = dict(rtol=1e-9, atol=1e-12 * max(1, cov.max().item()))
    assert_close(on_xt, gain, **close)
    assert_close(on_x0, mean[s] - gain * mean[t], **close)
    assert_close(var, cov[s, s] - gain * cov[s, t], **close)


@pytest.mark.parametrize("t, s", [(1000, 999), (900, 350), (40, 3), (2, 1)])
def test_posterior_is_bayes_rule_on_a_fine_grid(t, s):
    schedule, x0, xt = linear(1000), 0.7, -0.4
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    (at, as_) = alpha_bar[t - 1], alpha_bar[s - 1]
    xs = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    log_p = Normal(as_.sqrt() * x0, (1 - as_).sqrt()).log_prob(xs)
    log_p += Normal((at / as_).sqrt() * xs, (1 - at / as_).sqrt()).log_prob(torch.tensor(xt))
    p = log_p.softmax(0)
    mean = (p * xs).sum()
    ours, var = q_posterior(schedule, *torch.tensor([[[x0]], [[xt]]]).double(), t, s)
    assert_close(ours.squeeze(), mean, rtol=1e-6, atol=1e-9)
    assert_close(var, (p * (xs - mean) ** 2).sum(), rtol=1e-6, atol=0)


@each_schedule
def test_walking_every_step_is_jumping_at_once(schedule):
    # Follow x_0 and each step's noise as a basis vector: the walk's exact law, without sampling.
    basis = torch.eye(T + 1, dtype=torch.float64)
    x = basis[:1]
    for t in range(1, T + 1):
        x = q_step(schedule, x, t, t - 1, eps=basis[t : t + 1])
        jump = q_sample(schedule, basis[:1], t, eps=basis[1:2])
        assert_close(x[0, 0], jump[0, 0], rtol=1e-10, atol=1e-12)
        assert_close(x[0, 1:].norm(), jump[0, 1], rtol=1e-10, atol=1e-12)


@each_schedule
def test_a_jump_and_a_step_make_a_jump(schedule):
    t, s = torch.tensor([p for p in PAIRS if p[1] > 0]).T
    scale, var = forward_coefficients(schedule, t, s)
    close = dict(rtol=1e-12, atol=1e-12)
    assert_close(scale * schedule.signal[s], schedule.signal[t], **close)
    assert_close(scale**2 * schedule.noise[s] ** 2 + var, schedule.noise[t] ** 2, **close)
    assert (var > 0).all()


def test_sampled_walk_has_the_moments_of_the_jump():
    rng, n = torch.Generator().manual_seed(0), 40_000
    schedule, x0 = linear(1000), torch.tensor([[-0.9, 0.2, 1.0]]).expand(n, 3)
    x = q_sample(schedule, x0, 100, torch.randn(n, 3, generator=rng))
    x = q_step(schedule, x, 400, 100, torch.randn(n, 3, generator=rng))
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[399]
    sd = (1 - alpha_bar).sqrt()
    assert_close(x.mean(0), alpha_bar.sqrt() * x0[0], rtol=0, atol=4 * sd.item() / n**0.5)
    assert_close(x.T.cov(), sd**2 * torch.eye(3), rtol=0, atol=4 * (2 / n) ** 0.5)


def test_one_step_is_equation_2():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    x, eps = torch.randn(2, 1000, 2, dtype=torch.float64, generator=torch.manual_seed(0))
    t = torch.arange(1, 1001)
    expected = (1 - beta).sqrt()[:, None] * x + beta.sqrt()[:, None] * eps
    assert_close(q_step(linear(1000), x, t, t - 1, eps), expected, rtol=1e-9, atol=1e-10)


@each_schedule
def test_posterior_of_clean_data_is_that_data(schedule):
    for t in (1, T):
        coefficients = torch.stack(posterior_coefficients(schedule, t, 0))
        assert_close(coefficients, torch.tensor([1.0, 0, 0]).double(), rtol=0, atol=1e-12)


def test_reverse_variances_are_those_of_the_authors_code():
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    posterior = beta * (1 - np.append(1.0, alpha_bar[:-1])) / (1 - alpha_bar)
    t = torch.arange(1, 1001)
    small, large = reverse_log_variance(linear(1000), t, t - 1)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    assert_close(small, torch.from_numpy(clipped), rtol=1e-9, atol=0)
    assert_close(large, torch.from_numpy(np.log(beta)), rtol=1e-9, atol=0)


@each_schedule
def test_reverse_variances_are_ordered_and_finite(schedule):
    t, s = torch.tensor(PAIRS).T
    small, large = reverse_log_variance(schedule, t, s)
    assert small.isfinite().all() and large.isfinite().all()
    assert (small <= large).all() and (small < large)[s > 0].any()


def test_one_step_schedule_has_one_reverse_variance():
    small, large = reverse_log_variance(Schedule.from_beta([0.3]), 1, 0)
    assert_close([small.item(), large.item()], [math.log(0.3)] * 2)


def test_whole_batch_is_image_by_image():
    rng = torch.manual_seed(0)
    x, eps = torch.randn(2, 4, 3, 8, 8, generator=rng)
    t, s = torch.tensor([1, 5, 40, 12]), torch.tensor([0, 2, 39, 3])
    schedule = SCHEDULES["cosine"]
    for i, (a, b) in enumerate(zip(t.tolist(), s.tolist())):
        one = slice(i, i + 1)
        for many, single in [
            (q_sample(schedule, x, t, eps), q_sample(schedule, x[one], a, eps[one])),
            (q_step(schedule, x, t, s, eps), q_step(schedule, x[one], a, b, eps[one])),
            (
                q_posterior(schedule, x, eps, t, s)[0],
                q_posterior(schedule, x[one], eps[one], a, b)[0],
            ),
        ]:
            assert_close(many[one], single, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_keep_the_type_of_the_image_and_its_precision(dtype):
    x0, eps = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    t = torch.tensor([1, 2, 500, 1000])
    exact = q_sample(linear(1000), x0, t, eps)
    low = q_sample(linear(1000), x0.to(dtype), t, eps.to(dtype))
    assert low.dtype == dtype
    bound = 8 * torch.finfo(dtype).eps
    assert_close(low.double(), exact, rtol=bound, atol=bound)


def test_strided_and_empty_batches_work():
    x = torch.randn(8, 8, 3, 4, generator=torch.manual_seed(0)).permute(3, 2, 0, 1)[::2]
    t = torch.tensor([3, 9])
    assert_close(
        q_sample(linear(T), x, t, x), q_sample(linear(T), x.contiguous(), t, x.contiguous())
    )
    empty = q_sample(linear(T), x[:0], t[:0], x[:0])
    assert empty.shape == (0, 3, 8, 8)


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda q: q_step(q, X, 5, 5, X), ValueError, "s must be smaller than t .*s = 5 and t = 5"),
        (lambda q: q_posterior(q, X, X, 5, 6), ValueError, "s must be smaller than t"),
        (
            lambda q: q_step(q, X, torch.tensor([9, 9, 9, 9]), torch.tensor([1, 2, 9, 3]), X),
            ValueError,
            "s = 9 and t = 9$",
        ),
        (
            lambda q: q_step(q, X, torch.tensor([9, 9, 9, 9]), torch.tensor([1, 2, 3]), X),
            ValueError,
            r"t and s must have one shape, got \(4,\) and \(3,\)",
        ),
        (lambda q: q_step(q, X, 5, -1, X), ValueError, r"t must lie in 0\.\.40, got -1"),
        (lambda q: q_sample(q, X, 41, X), ValueError, r"t must lie in 0\.\.40, got 41"),
        (lambda q: q_sample(q, X, 1.0, X), TypeError, "integers"),
        (lambda q: q_sample(q, X, 1, X[:1]), ValueError, r"equal shapes, got x0 \(4, 3\), eps \(1"),
        (lambda q: q_posterior(q, X, X.T, 2, 1), ValueError, r"x0 \(4, 3\), xt \(3, 4\)"),
        (lambda q: q_sample(q, X.byte(), 1, X), TypeError, "floating-point image batch"),
        (lambda q: q_sample(q, X, torch.ones(3).int(), X), ValueError, "one integer per image"),
        (lambda q: reverse_log_variance(q, 3, 3), ValueError, "s must be smaller than t"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(linear(T))
    assert "\n" not in str(caught.value)
