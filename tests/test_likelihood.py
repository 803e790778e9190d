"""The bound against closed forms: scipy, erfc, torch.distributions, entropies of known data."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.stats import norm
from torch.distributions import Normal, Uniform, kl_divergence
from torch.testing import assert_close

from minddpm.likelihood import (
    bits_per_dim,
    bound_estimate,
    bound_term,
    check_grid,
    decoder_log_likelihood,
    normal_kl,
    ode_bits,
    ode_log_density,
    prior_term,
    vlb_terms,
)
from minddpm.oracle import finite, gaussian
from minddpm.prediction import Denoiser
from minddpm.schedule import Schedule, cosine, linear, straight

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_normal_kl_is_that_of_torch_distributions():
    mean1, log_var1, mean2, log_var2 = 3 * normal(4, 1000)
    p, q = Normal(mean1, (log_var1 / 2).exp()), Normal(mean2, (log_var2 / 2).exp())
    assert_close(
        normal_kl(mean1, log_var1, mean2, log_var2), kl_divergence(p, q), rtol=1e-9, atol=1e-12
    )


def test_normal_kl_is_the_mean_log_ratio_of_samples():
    p, q, n = Normal(0.3, 0.8), Normal(-0.2, 1.5), 200_000
    x = 0.3 + 0.8 * normal(n)
    ratio = p.log_prob(x) - q.log_prob(x)
    ours = normal_kl(*torch.tensor([0.3, 2 * math.log(0.8), -0.2, 2 * math.log(1.5)]))
    assert_close(ours.item(), ratio.mean().item(), rtol=0, atol=4 * ratio.std().item() / n**0.5)


def test_normal_kl_of_nearly_equal_gaussians_keeps_its_digits_in_float32():
    gap = torch.tensor([0.0, 1e-5, 1e-4, 1e-3])
    ours = normal_kl(torch.zeros(4), torch.zeros(4), torch.zeros(4), gap)
    assert_close(ours, gap**2 / 4, rtol=1e-3, atol=0)  # to second order; cancellation gives 1e-7


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("std", [1e-6, 1e-4, 0.002, 0.01, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("mean", [-50.0, -3.0, -1.0, -0.5, 1 / 255, 0.0137, 0.998, 1.0, 1.004, 7.0])
def test_decoder_probabilities_sum_to_one(mean, std, dtype, tolerance):
    x0 = LEVELS.to(dtype)
    log_var = torch.tensor(2 * math.log(std), dtype=dtype)
    log_p = decoder_log_likelihood(x0, torch.tensor(mean, dtype=dtype), log_var)
    assert log_p.isfinite().all() and (log_p <= 0).all()
    assert_close(log_p.exp().sum().item(), 1.0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mean, std", [(0.0, 0.3), (-0.8, 0.05), (0.95, 1.5), (1.7, 0.4)])
def test_decoder_is_the_difference_of_two_cdfs(mean, std):
    edges = (LEVELS[1:] + LEVELS[:-1]).numpy() / 2
    cdf = norm.cdf([-math.inf, *edges, math.inf], mean, std)
    moderate = torch.from_numpy(cdf[1:] - cdf[:-1])
    ours = decoder_log_likelihood(LEVELS, torch.tensor(mean), torch.tensor(std).double().log() * 2)
    assert_close(ours.exp(), moderate, rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("std", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("side", [-1, 1])
def test_decoder_keeps_its_digits_far_out_in_the_tails(side, std, dtype, tolerance):
    x0 = LEVELS[1:-1].to(dtype)

    def tail(x):
        return 0.5 * math.erfc(x / std / 2**0.5)

    exact = [
        math.log(tail(1 + x - 1 / 255) - tail(1 + x + 1 / 255))
        for x in LEVELS[1:-1].tolist()
        if (1 + x) / std < 36
    ]
    ours = decoder_log_likelihood(
        side * x0, torch.tensor(-side, dtype=dtype), 2 * torch.tensor(std, dtype=dtype).log()
    )
    assert_close(
        ours[: len(exact)], torch.tensor(exact, dtype=dtype), rtol=tolerance, atol=tolerance
    )


def test_decoder_has_the_gradient_of_finite_differences():
    x0, mean, log_var = LEVELS[[0, 1, 100, 200, 255]], normal(5), normal(5, seed=1) - 3
    inputs = (mean.requires_grad_(), log_var.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, v: decoder_log_likelihood(x0, m, v), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_gradients_are_finite_in_the_extremes(dtype):
    mean = torch.tensor([-3.0, -1, 0, 1, 3], dtype=dtype)[:, None].requires_grad_()
    log_var = torch.tensor([-12.0, -10, 0, 5], dtype=dtype)[:, None, None].requires_grad_()
    decoder_log_likelihood(LEVELS.to(dtype), mean, log_var).sum().backward()
    assert mean.grad.isfinite().all() and log_var.grad.isfinite().all()


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_decoder_reads_any_number_of_levels(levels):
    x0 = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_p = decoder_log_likelihood(x0, torch.tensor(0.3), torch.tensor(-1.0).double(), levels)
    assert_close(log_p.exp().sum().item(), 1.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000), cosine(10)])
def test_prior_term_is_its_closed_form(schedule):
    x0, bar = LEVELS.view(4, 64), schedule.alpha_bar[-1].item()
    closed = (bar * x0**2 - bar - math.log(1 - bar)).mean(1) / 2 / math.log(2)
    assert_close(prior_term(schedule, x0), closed, rtol=1e-6, atol=1e-16)
    assert_close(prior_term(schedule, x0.float()), closed.float(), rtol=1e-4, atol=1e-14)
    assert closed.max() < 1e-4 or schedule.T == 10


def test_bits_per_dim_of_uniform_noise_is_eight():
    cells = Uniform(-1 - 1 / 255, 1 + 1 / 255)
    log_density = cells.log_prob(torch.zeros(5, 12)).sum(1)
    assert_close(bits_per_dim(log_density, 12), torch.full((5,), 8.0), rtol=0, atol=1e-5)
    assert_close(bits_per_dim(torch.zeros(1), 7, levels=3), torch.zeros(1), rtol=0, atol=0)


def test_columns_are_the_decoder_the_divergences_and_the_prior():
    schedule, x0, T = cosine(3), LEVELS[[3, 77, 200, 255]].view(2, 2), 3
    bar, beta = schedule.alpha_bar.tolist(), schedule.beta.tolist()
    denoiser = Denoiser(lambda x, t: x.tanh(), schedule, "x0", "large")
    terms = vlb_terms(denoiser, x0, generator=torch.Generator().manual_seed(5))
    rng, columns = torch.Generator().manual_seed(5), []
    columns.append(kl_divergence(Normal(bar[T] ** 0.5 * x0, (1 - bar[T]) ** 0.5), Normal(0, 1)))
    for t in (3, 2, 1):
        xt = bar[t] ** 0.5 * x0 + (1 - bar[t]) ** 0.5 * torch.randn(
            2, 2, generator=rng, dtype=x0.dtype
        )
        on_x0 = bar[t - 1] ** 0.5 * beta[t] / (1 - bar[t])
        on_xt = (1 - beta[t]) ** 0.5 * (1 - bar[t - 1]) / (1 - bar[t])
        var = beta[t] if t > 1 else beta[2] * (1 - bar[1]) / (1 - bar[2])
        model = Normal(on_x0 * xt.tanh() + on_xt * xt, var**0.5)
        if t == 1:
            upper = torch.where(x0 == 1, torch.inf, x0 + 1 / 255)
            columns.append(-(model.cdf(upper) - model.cdf(x0 - 1 / 255)).log())
        else:
            small = beta[t] * (1 - bar[t - 1]) / (1 - bar[t])
            columns.append(kl_divergence(Normal(on_x0 * x0 + on_xt * xt, small**0.5), model))
    expected = torch.stack([c.mean(1) / math.log(2) for c in columns[::-1]], 1)
    assert_close(terms, expected, rtol=1e-6, atol=1e-9)


# Fine steps down to noise far below a grey level: here a perfect denoiser's bound is nearly tight.
FINE = Schedule.from_alpha_bar(
    torch.cat([torch.ones(1), torch.linspace(14, -14, 500).double().sigmoid()])
)
MEAN, STD = -0.1, 0.25


def discrete_gaussian():
    """(x0 (256, 1), their probabilities, bits) of N(MEAN, STD^2) cut into 256 levels."""
    edges = (LEVELS[1:] + LEVELS[:-1]).numpy() / 2
    p = torch.from_numpy(norm.cdf([-math.inf, *edges, math.inf], MEAN, STD)).diff()
    return LEVELS[:, None], p, -(p * p.clamp(min=1e-300).log2()).sum().item()


def expected_terms(schedule, variance, grid=None, repeats=4):
    """(the bound's terms averaged over discrete_gaussian(), four standard errors of their sum)."""
    x0, p, _ = discrete_gaussian()
    oracle = gaussian([MEAN], [[STD**2]]).denoiser(schedule, "x0", variance)
    rng = torch.Generator().manual_seed(0)
    terms = vlb_terms(oracle, x0.repeat(repeats, 1), grid, clip=False, generator=rng)
    terms = (p[:, None] * terms.view(repeats, 256, -1)).sum(1)
    return terms.mean(0), 4 * (terms.sum(1).var() / repeats).sqrt().item()


def test_bits_per_dim_of_a_density_is_the_entropy_of_its_levels():
    x0, p, bits = discrete_gaussian()
    assert_close(
        (p * bits_per_dim(Normal(MEAN, STD).log_prob(x0[:, 0]), 1)).sum().item(),
        bits,
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("variance", ["small", "large"])
def test_terms_of_gaussian_data_are_their_expectations(variance):
    grid, schedule = [1000, 700, 300, 150, 70, 30, 12, 5, 1, 0], linear(1000)
    x0, p, _ = discrete_gaussian()
    spread, bar, expected = (p * (x0[:, 0] - MEAN) ** 2).sum(), schedule.alpha_bar, []
    for t, s in pairwise(grid[:-1]):
        step = 1 - bar[t] / bar[s]  # beta of the step from s to t
        small = step * (1 - bar[s]) / (1 - bar[t])
        model = {"small": small, "large": step}[variance]
        gain = bar[t].sqrt() * STD**2 / (bar[t] * STD**2 + 1 - bar[t])  # x0's regression on x_t
        error = (1 - gain * bar[t].sqrt()) ** 2 * spread + gain**2 * (1 - bar[t])
        moved = bar[s] * step**2 / (1 - bar[t]) ** 2 * error
        expected.append(((model / small).log() + (small + moved) / model - 1) / 2 / math.log(2))
    ours, _ = expected_terms(schedule, variance, grid, repeats=60)
    assert_close(ours[1:-1], torch.stack(expected[::-1]), rtol=0.05, atol=1e-6)
    assert 0 < ours[-1] < 1e-4


@pytest.mark.parametrize("variance, low, high", [("large", 0.0, 0.05), ("small", 0.5, 1.5)])
def test_bound_of_gaussian_data_is_above_its_entropy_and_near_it(variance, low, high):
    bits = discrete_gaussian()[2]
    bound, error = expected_terms(linear(200), variance, repeats=40)
    assert bits + low - error < bound.sum().item() < bits + high + error


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_bound_of_a_finite_data_set_is_above_the_log_of_its_size_and_near_it(predicts):
    points = LEVELS[torch.randint(0, 256, (8, 3), generator=torch.manual_seed(2))]
    oracle = finite(points).denoiser(FINE, predicts)
    terms = vlb_terms(oracle, points.repeat(50, 1), generator=torch.Generator().manual_seed(0))
    bound, exact = terms.sum(1), math.log2(8) / 3
    error = 4 * bound.std().item() / len(bound) ** 0.5
    assert exact - error < bound.mean().item() < 1.05 * exact + error


def test_finer_grids_give_tighter_bounds():
    grids = [[500, 1, 0], [500, 250, 1, 0], [*range(500, 0, -50), 1, 0], [*range(500, 0, -5), 1, 0]]
    bounds = [expected_terms(FINE, "small", grid)[0].sum().item() for grid in grids]
    assert bounds == sorted(bounds, reverse=True) and bounds[-2] > 1.05 * bounds[-1]


def test_a_chain_that_starts_early_pays_for_its_prior():
    x0, t = LEVELS[[10, 128, 200]][:, None], 40
    bar = linear(100).alpha_bar[t]
    terms = vlb_terms(gaussian([0.0], [[0.1]]).denoiser(linear(100)), x0, [t, 10, 0])
    prior = kl_divergence(Normal(bar.sqrt() * x0, (1 - bar).sqrt()), Normal(0, 1)) / math.log(2)
    assert terms.shape == (3, 3)
    assert_close(terms[:, -1:], prior, rtol=1e-9, atol=0)


def test_one_batch_holds_several_times():
    x0, eps, t = LEVELS[[0, 50, 255]].view(3, 1), normal(3, 1), torch.tensor([1, 2, 50])
    denoiser = Denoiser(lambda x, t: x.sin(), linear(50), variance="small")
    xt = x0 + 0.1 * eps
    together = bound_term(denoiser, x0, xt, t, t - 1, denoiser(xt, t))
    for i, time in enumerate(t.tolist()):
        one = denoiser(xt[i : i + 1], time)
        alone = bound_term(denoiser, x0[i : i + 1], xt[i : i + 1], time, time - 1, one)
        assert_close(together[i : i + 1], alone, rtol=1e-12, atol=0)


def test_an_empty_batch_has_an_empty_bound():
    denoiser = Denoiser(lambda x, t: x, linear(50))
    assert vlb_terms(denoiser, torch.zeros(0, 3, 4, 4)).shape == (0, 51)


ECHO = Denoiser(lambda x, t: x, linear(50))


@pytest.mark.parametrize(
    "x0",
    [
        torch.full((2, 3), 0.5),
        torch.full((2, 3), 3.0),
        torch.full((2, 3), math.nan),
        torch.full((2, 3), 200, dtype=torch.uint8),
    ],
    ids=["between", "outside", "nan", "uint8"],
)
def test_images_off_the_levels_are_refused(x0):
    with pytest.raises(ValueError, match="256 levels in .* minddpm.data.to_model"):
        vlb_terms(ECHO, x0)


@pytest.mark.parametrize(
    "grid", [[], [0], [50], [50, 25], [51, 0], [0, 50], [50, 20, 20, 0], [50, 2.5, 0], [50, 0, -1]]
)
def test_a_grid_that_does_not_fall_to_zero_is_refused(grid):
    with pytest.raises(
        ValueError, match="integers that fall strictly from at most T = 50 to 0, got"
    ):
        check_grid(linear(50), grid)
    with pytest.raises(ValueError, match="fall strictly"):
        vlb_terms(ECHO, torch.ones(2, 3), grid)


@pytest.mark.parametrize("grid", [[50, 20, 0], torch.tensor([50, 20, 0]), (t for t in (50, 20, 0))])
def test_a_grid_may_be_any_sequence(grid):
    assert check_grid(linear(50), grid) == [50, 20, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_for_likelihoods(dtype):
    with pytest.raises(TypeError, match="256 levels apart; use float32 or float64"):
        vlb_terms(ECHO, torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("T", [1, 2, 40])
def test_estimate_of_the_bound_is_unbiased(T):
    """Its mean over many draws is that of the sum of all terms; within four standard errors."""
    denoiser = gaussian([0.1, -0.2], [[0.3, 0.1], [0.1, 0.2]]).denoiser(cosine(T), "eps", "large")
    x0 = LEVELS[[166, 64]][None]
    many = x0.expand(6000, 2)
    generator = torch.Generator().manual_seed(3)
    whole = vlb_terms(denoiser, many[:2000], clip=False, generator=generator).sum(1)
    estimate = bound_estimate(denoiser, many, clip=False, generator=generator)
    error = (whole.var() / len(whole) + estimate.var() / len(estimate)).sqrt().item()
    assert error < 0.2
    assert_close(estimate.mean().item(), whole.mean().item(), rtol=0, atol=4 * error + 1e-9)


def test_estimate_takes_no_time_beyond_T(monkeypatch):
    """In float32 the largest draw of 512, (511 + u) / 512 with u just below 1, is 1."""
    largest = torch.tensor(1 - 2**-24)
    monkeypatch.setattr(torch, "rand", lambda n, generator: largest.expand(n))
    denoiser, times = gaussian([0.0], [[1.0]]).denoiser(cosine(100)), []
    call = denoiser.forward
    denoiser.forward = lambda xt, t, clip: times.append(t) or call(xt, t, clip)
    assert bound_estimate(denoiser, LEVELS[::255].repeat(256)[:, None]).isfinite().all()
    assert (times[1].min(), times[1].max()) == (2, 100)


# The ODE's likelihood

FLOW_COV = torch.tensor([[0.3, 0.1], [0.1, 0.05]], dtype=torch.float64)
FLOW_MEAN = torch.tensor([0.1, -0.2], dtype=torch.float64)


def pulled_back(schedule, x, t):
    """log p_t of the exact flow of that Gaussian that ends in N(0, I) at T, in closed form."""
    (a, b), (c, d) = schedule.at(t), schedule.at(schedule.T)
    values, axes = torch.linalg.eigh(FLOW_COV)
    early, late = a**2 * values + b**2, c**2 * values + d**2
    scale = (late / early).sqrt()
    end = (x - a * FLOW_MEAN) @ axes * scale + c * FLOW_MEAN @ axes
    return (-0.5 * (end**2 + math.log(2 * math.pi)) + scale.log()).sum(1)


@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000)], ids=["linear", "cosine"])
def test_density_of_the_ode_is_that_of_the_flow_and_converges_with_order_2(schedule):
    denoiser = gaussian(FLOW_MEAN, FLOW_COV).denoiser(schedule)
    t = 20
    x, errors = torch.tensor([[0.4, -0.1], [-0.9, 0.3], [0.0, 0.0]], dtype=torch.float64), []
    expected = pulled_back(schedule, x, t)
    for n in (20, 40):
        grid = [round(t + (1000 - t) * k / n) for k in range(n, -1, -1)]
        errors.append(
            (ode_log_density(denoiser, x, grid, exact=True) - expected).abs().max().item()
        )
    assert errors[1] < errors[0] / 3 or errors[1] < 1e-3
    full = ode_log_density(denoiser, x, range(1000, t - 1, -1), exact=True)
    assert_close(full, expected, rtol=2e-4, atol=1e-3)


def test_estimate_along_random_directions_is_unbiased():
    denoiser, grid = gaussian(FLOW_MEAN, FLOW_COV).denoiser(linear(1000)), range(1000, 0, -50)
    x = torch.tensor([[0.4, -0.1]], dtype=torch.float64)
    exact = ode_log_density(denoiser, x, grid, exact=True)
    generator = torch.Generator().manual_seed(0)
    many = ode_log_density(denoiser, x.expand(4000, 2), grid, generator=generator)
    assert many.std() > 0.01
    assert_close(many.mean().item(), exact.item(), rtol=0, atol=4 * many.std().item() / 4000**0.5)


def test_bits_of_the_ode_are_decoder_density_and_noise():
    denoiser, schedule = gaussian(FLOW_MEAN, FLOW_COV).denoiser(linear(1000)), linear(1000)
    x0 = LEVELS[torch.tensor([[160, 90], [100, 110]])]
    bits = ode_bits(denoiser, x0, range(1000, 0, -1), True, torch.Generator().manual_seed(4))
    eps = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    signal, noise = schedule.at(1)
    x1 = signal * x0 + noise * eps
    decoder = bound_term(denoiser, x0, x1, 1, 0, denoiser(x1, 1, clip=True))
    log_q = Normal(signal * x0, noise).log_prob(x1).sum(1)
    expected = decoder + (log_q - pulled_back(schedule, x1, 1)) / (2 * math.log(2))
    assert_close(bits, expected, rtol=0, atol=2e-3)


def test_the_ode_begins_where_some_signal_is_left():
    denoiser = gaussian(FLOW_MEAN, FLOW_COV).denoiser(straight(10), "velocity", "small")
    x0 = torch.ones(2, 2).double()
    with pytest.raises(ValueError, match="no signal is left where the grid begins"):
        ode_bits(denoiser, x0, range(10, 0, -1))
    assert ode_bits(denoiser, x0, range(9, 0, -1)).isfinite().all()


def test_bits_of_the_ode_are_fewer_than_the_bound_says():
    """The chain pays for every step; the flow does not. Both bound the same data from above."""
    schedule = cosine(50)
    denoiser = gaussian(FLOW_MEAN, FLOW_COV).denoiser(schedule, "eps", "small")
    values = (
        gaussian(FLOW_MEAN, FLOW_COV).sample(3000, torch.Generator().manual_seed(1)).clamp(-1, 1)
    )
    x0 = ((values + 1) * 127.5).round() / 127.5 - 1
    generator = torch.Generator().manual_seed(2)
    chain = vlb_terms(denoiser, x0, clip=False, generator=generator).sum(1)
    flow = ode_bits(denoiser, x0, range(50, 0, -1), True, generator)
    error = (chain - flow).std() / len(x0) ** 0.5
    assert (chain - flow).mean() > 4 * error
    entropy = bits_per_dim(gaussian(FLOW_MEAN, FLOW_COV).log_prob(x0), 2).mean()
    assert flow.mean() > entropy - 4 * error
