"""Samplers against diffusers, closed-form recursions and the distributions they must return."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from minddpm.oracle import GaussianMixture, gaussian
from minddpm.prediction import Denoiser
from minddpm.samplers import (
    ancestral,
    ddim,
    quadratic_grid,
    sample,
    sample_path,
    uniform_grid,
)
from minddpm.schedule import Schedule, cosine, linear

STEPS = [ancestral, ddim]
BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def network(xt, t):
    return torch.tanh(xt.roll(1, -1) + t.view(-1, *[1] * (xt.ndim - 1)) / 1000)


# Grids


@pytest.mark.parametrize("T", [1, 2, 7, 50, 101])
@pytest.mark.parametrize("make", [uniform_grid, quadratic_grid])
def test_grids_fall_from_T_to_0_in_the_steps_asked_for(make, T):
    for steps in range(1, T + 1):
        grid = make(T, steps)
        assert len(grid) == steps + 1 and (grid[0], grid[-1]) == (T, 0)
        assert all(t > s for t, s in itertools.pairwise(grid))


def test_grids_follow_their_formulas():
    assert uniform_grid(1000, 4) == [1000, 750, 500, 250, 0]
    assert quadratic_grid(1000, 4) == [1000, 562, 250, 62, 0]
    assert quadratic_grid(10, 8) == [10, 8, 6, 5, 4, 3, 2, 1, 0]  # rounding would repeat 0, 1 and 2


@pytest.mark.parametrize("make", [uniform_grid, quadratic_grid])
@pytest.mark.parametrize("steps", [0, -1, 101])
def test_impossible_numbers_of_steps_are_refused(make, steps):
    with pytest.raises(ValueError, match=rf"must lie in 1..T = 100, got {steps}"):
        make(100, steps)


# One step


@pytest.mark.parametrize(
    "grid, clip",
    [
        (range(1000, -1, -1), True),
        (quadratic_grid(1000, 50), True),
        (quadratic_grid(1000, 50), False),
    ],
)
def test_ddim_with_eta_1_is_ancestral_with_small_variance(grid, clip):
    denoiser, x = Denoiser(network, linear(1000), variance="small"), normal(4, 6)
    options = dict(clip=clip)
    for one, other in zip(
        sample_path(denoiser, x, grid, ancestral, generator=seeded(), **options),
        sample_path(denoiser, x, grid, ddim, eta=1.0, generator=seeded(), **options),
    ):
        assert one.t == other.t
        assert_close(one.x, other.x, rtol=1e-10, atol=1e-10)
    assert one.x.abs().max() > 0.01


def scheduler(kind, n, **options):
    """Theirs, with its float32 tables replaced by the formula in float64."""
    theirs = kind(
        num_train_timesteps=1000, beta_schedule="linear", timestep_spacing="trailing", **options
    )
    theirs.alphas_cumprod, theirs.one = (1 - BETA).cumprod(0), torch.tensor(1.0).double()
    theirs.final_alpha_cumprod = theirs.one
    theirs.set_timesteps(n)
    return theirs


@pytest.mark.parametrize("n", [100, 20])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("predicts, theirs", [("eps", "epsilon"), ("v", "v_prediction")])
def test_ddim_is_that_of_diffusers(predicts, theirs, eta, n):
    other = scheduler(DDIMScheduler, n, set_alpha_to_one=True, prediction_type=theirs)
    x, theirs_rng = normal(3, 6), seeded(5)
    denoiser = Denoiser(network, linear(1000), predicts)
    path = sample_path(denoiser, x, uniform_grid(1000, n), ddim, eta=eta, generator=seeded(5))
    for stop, t in zip(path, other.timesteps):
        guess = network(x, (t + 1).expand(3))
        step = dict(eta=eta, use_clipped_model_output=True, generator=theirs_rng)
        # At the last step they draw noise of size 0.
        x = other.step(guess, t, x, **step).prev_sample
        assert_close(stop.x, x, rtol=1e-8, atol=1e-8)
    assert stop.t == 0


@pytest.mark.parametrize("n", [1000, 20])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_is_ddpm_of_diffusers(variance, n):
    other = scheduler(DDPMScheduler, n, variance_type=f"fixed_{variance}", clip_sample=True)
    x, theirs_rng = normal(3, 6), seeded(5)
    denoiser = Denoiser(network, linear(1000), variance=variance)
    path = sample_path(denoiser, x, uniform_grid(1000, n), generator=seeded(5))
    for stop, t in zip(path, other.timesteps):
        if stop.t == 0 and n < 1000:
            break  # theirs adds noise to the final image
        guess = network(x, (t + 1).expand(3))
        x = other.step(guess, t, x, generator=theirs_rng).prev_sample
        assert_close(stop.x, x, rtol=1e-8, atol=1e-8)


def test_learned_variance_sets_the_noise_of_each_pixel():
    raw, xt, t = 2 * normal(2, 3).sigmoid() - 1, normal(2, 3, seed=1), 300
    denoiser = Denoiser(lambda x, t: torch.cat([x, raw], 1), linear(1000), variance="learned")
    ours, prediction = ancestral(denoiser, xt, t, t - 1, generator=seeded())
    mean, _ = denoiser.reverse(xt, t, t - 1, prediction)
    bar, beta = (1 - BETA).cumprod(0), BETA[t - 1]
    small = beta * (1 - bar[t - 2]) / (1 - bar[t - 1])
    v = (raw + 1) / 2
    std = ((v * beta.log() + (1 - v) * small.log()) / 2).exp()
    assert_close(ours - mean, std * normal(2, 3), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("step, draws", [(ancestral, 4), (ddim, 0)])
def test_noise_is_drawn_at_every_step_but_the_last(step, draws):
    rng, x = seeded(), normal(2, 3)
    end = sample(Denoiser(network, linear(1000)), x, uniform_grid(1000, 5), step, generator=rng)
    expected = seeded()
    for _ in range(draws):
        torch.randn(2, 3, dtype=torch.float64, generator=expected)
    assert torch.equal(rng.get_state(), expected.get_state())
    assert end.abs().max() <= 1  # the last step returns the predicted image itself, clipped


# Exact denoisers


def moments(schedule, grid, mean, var, step, eta, variance):
    """Mean and variance of the sampler's output on N(mean, var), one coordinate: all is affine."""
    m, v = 0.0, 1.0
    bar = schedule.alpha_bar.tolist()
    for t, s in itertools.pairwise(grid):
        gain = bar[t] ** 0.5 * var / (bar[t] * var + 1 - bar[t])
        x0 = (gain, mean * (1 - gain * bar[t] ** 0.5))  # E[x_0 | x_t] = x0[0] x_t + x0[1]
        beta = 1 - bar[t] / bar[s]
        small = beta * (1 - bar[s]) / (1 - bar[t])
        if step is ancestral:
            noise = 0 if s == 0 else {"small": small, "large": beta}[variance]
            on_x0 = bar[s] ** 0.5 * beta / (1 - bar[t])
            on_xt = (bar[t] / bar[s]) ** 0.5 * (1 - bar[s]) / (1 - bar[t])
        else:
            noise = eta**2 * small
            on_xt = ((1 - bar[s] - noise) / (1 - bar[t])) ** 0.5
            on_x0 = bar[s] ** 0.5 - bar[t] ** 0.5 * on_xt
        a = on_x0 * x0[0] + on_xt
        m, v = a * m + on_x0 * x0[1], a**2 * v + noise
    return m, v


@pytest.mark.parametrize(
    "step, eta, variance",
    [(ancestral, 0, "small"), (ancestral, 0, "large"), (ddim, 0.0, "small"), (ddim, 0.6, "small")],
)
@pytest.mark.parametrize("steps", [6, 60])
def test_sampler_of_a_gaussian_has_the_moments_of_its_recursion(step, eta, variance, steps):
    n, angle = 20_000, torch.tensor(0.5).double()
    axes = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    mean, var = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.6, 0.02]).double()
    data = gaussian(axes @ mean, axes * var @ axes.T)
    schedule, grid = linear(1000), quadratic_grid(1000, steps)
    options = dict(clip=False, generator=seeded(9)) | (dict(eta=eta) if step is ddim else {})
    x = sample(data.denoiser(schedule, "eps", variance), normal(n, 2), grid, step, **options)
    x = x @ axes  # along the principal axes
    expected = [
        moments(schedule, grid, m, v, step, eta, variance)
        for m, v in zip(mean.tolist(), var.tolist())
    ]
    for i, (m, v) in enumerate(expected):
        assert_close(x[:, i].mean().item(), m, rtol=0, atol=4 * (v / n) ** 0.5)
        assert_close(x[:, i].var().item(), v, rtol=4 * (2 / n) ** 0.5, atol=0)
    correlation = x.T.corrcoef()[0, 1].item()
    assert abs(correlation) < 4 / n**0.5


@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000)], ids=["linear", "cosine"])
def test_discretization_error_of_ddim_shrinks_with_the_step(schedule):
    denoiser = gaussian([0.3], [[0.25]]).denoiser(schedule)
    signal, noise = schedule.at(schedule.T)
    # x_T = its mean, and one standard deviation above: the flow takes them to 0.3 and 0.8.
    x = torch.stack([signal * 0.3, signal * 0.3 + (signal**2 * 0.25 + noise**2).sqrt()])[:, None]
    ends = [sample(denoiser, x, uniform_grid(1000, n), ddim, clip=False) for n in (25, 100, 400)]
    errors = [abs((end[1] - end[0]).item() - 0.5) for end in ends]
    assert_close([end[0].item() for end in ends], [0.3] * 3, rtol=0, atol=1e-9)
    assert errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5 and errors[2] < 0.01


@pytest.mark.parametrize(
    "step, variance", [(ancestral, "large"), (ancestral, "small"), (ddim, "small")]
)
def test_samples_of_a_mixture_have_its_weights_means_and_covariances(step, variance):
    n = 6000
    means = torch.tensor([[-0.8, 0.0], [0.6, 0.7], [0.7, -0.6]], dtype=torch.float64)
    covs = torch.tensor(
        [[[0.02, 0.01], [0.01, 0.02]], [[0.01, 0], [0, 0.04]], [[0.03, 0], [0, 0.01]]]
    )
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    denoiser = GaussianMixture(means, covs, weights).denoiser(linear(200), "x0", variance)
    x = sample(denoiser, normal(n, 2), range(200, -1, -1), step, clip=False, generator=seeded(1))
    nearest = torch.cdist(x, means).argmin(1)
    share = nearest.bincount(minlength=3) / n
    assert_close(share.double(), weights, rtol=0, atol=4 * 0.5 / n**0.5)
    for k in range(3):
        own = x[nearest == k]
        assert_close(own.mean(0), means[k], rtol=0, atol=4 * (0.04 / len(own)) ** 0.5)
        assert_close(own.T.cov(), covs[k].double(), rtol=0.15, atol=0.003)


@pytest.mark.parametrize(
    "options", [dict(step=ancestral), dict(step=ddim), dict(step=ddim, eta=1.0)]
)
def test_schedule_that_does_not_preserve_variance_is_sampled_too(options):
    T, n = 300, 10_000
    straight = Schedule(1 - torch.arange(T + 1) / T, torch.arange(T + 1) / T)
    denoiser = gaussian([0.5, -0.2], [[0.2, 0.1], [0.1, 0.3]]).denoiser(straight, "v")
    grid = range(T, -1, -1)
    x = sample(denoiser, normal(n, 2), grid, clip=False, **options, **rng_of(options))
    assert_close(x.mean(0), torch.tensor([0.5, -0.2]).double(), rtol=0, atol=0.025)
    assert_close(x.T.cov(), torch.tensor([[0.2, 0.1], [0.1, 0.3]]).double(), rtol=0, atol=0.02)


def rng_of(options):
    return {} if options == dict(step=ddim) else dict(generator=seeded(2))


# The loop


@pytest.mark.parametrize("step", STEPS)
def test_path_is_lazy_and_ends_at_the_sample(step):
    calls, grid = [], [100, 60, 10, 0]
    denoiser = Denoiser(lambda x, t: calls.append(t[0].item()) or network(x, t), linear(100))
    x = normal(2, 3)
    path = sample_path(denoiser, x, grid, step, generator=seeded())
    assert calls == []
    first = next(path)
    assert calls == [100] and first.t == 60
    stops = [first, *path]
    assert calls == grid[:-1] and [stop.t for stop in stops] == grid[1:]
    assert_close(stops[-1].x, sample(denoiser, x, grid, step, generator=seeded()), rtol=0, atol=0)
    assert_close(stops[0].x0, denoiser(x, 100, clip=True).x0, rtol=0, atol=0)


@pytest.mark.parametrize("step", STEPS)
def test_sampling_records_no_gradient_and_leaves_the_caller_his(step):
    weight = torch.ones(1, requires_grad=True)
    denoiser = Denoiser(lambda x, t: weight * x, linear(100))
    for stop in sample_path(denoiser, torch.ones(2, 3), [100, 50, 0], step):
        assert torch.is_grad_enabled() and not stop.x.requires_grad


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("schedule", [cosine(1), cosine(2), linear(25)])
def test_short_chains_and_single_steps_work(step, schedule):
    denoiser = gaussian([0.2, 0.1], 0.01 * torch.eye(2)).denoiser(schedule)
    for grid in (range(schedule.T, -1, -1), [schedule.T, 0]):
        x = sample(denoiser, normal(50, 2), grid, step)
        assert x.isfinite().all() and x.abs().max() <= 1
    assert sample(denoiser, normal(0, 2), [schedule.T, 0], step).shape == (0, 2)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_have_the_type_of_the_noise(step, dtype):
    x = sample(
        Denoiser(lambda x, t: x.sin(), linear(100)),
        normal(2, 3, 4, 4).to(dtype),
        [100, 50, 0],
        step,
    )
    assert x.dtype == dtype and x.isfinite().all()


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match=rf"eta must lie in \[0, 1\], got {eta}"):
        sample(Denoiser(network, linear(100)), normal(2, 3), [100, 0], ddim, eta=eta)


@pytest.mark.parametrize("grid", [[0, 100], [200, 0], [100, 50], [100, 50.5, 0]])
def test_impossible_grid_is_refused(grid):
    with pytest.raises(ValueError, match="fall strictly from at most T = 100 to 0"):
        sample(Denoiser(network, linear(100)), normal(2, 3), grid)
