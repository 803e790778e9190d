"""Samplers against diffusers, closed-form recursions and the distributions they must return."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
)
from torch.testing import assert_close

from minddpm.oracle import GaussianMixture, gaussian
from minddpm.prediction import Denoiser
from minddpm.samplers import (
    GRIDS,
    DPMSolver,
    ancestral,
    ddim,
    ddim_quadratic_grid,
    dpm_solver,
    heun,
    karras_grid,
    langevin,
    log_snr_grid,
    predictor_corrector,
    quadratic_grid,
    reverse_diffusion,
    sample,
    sample_path,
    uniform_grid,
)
from minddpm.schedule import Schedule, cosine, linear

SINGLE_3, MULTI_3 = partial(dpm_solver, order=3), partial(DPMSolver, order=3)
STEPS = [ancestral, ddim, reverse_diffusion, predictor_corrector, heun, DPMSolver, MULTI_3]
SINGLE = [dpm_solver, SINGLE_3]  # these ask the network between t and s, too
CALLS_AT_S = [predictor_corrector, heun]  # these ask the network at s, too
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


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("steps", [0, -1, 101])
def test_impossible_numbers_of_steps_are_refused(make, steps):
    with pytest.raises(ValueError, match=rf"must lie in 1..T = 100, got {steps}"):
        make(linear(100), steps)


STRAIGHT = Schedule(1 - torch.arange(101) / 100, torch.arange(101) / 100)  # no signal at T


@pytest.mark.parametrize("make", [DPMSolver, partial(dpm_solver, None, None, 2, 1)])
@pytest.mark.parametrize("order", [0, 4, 1.5])
def test_impossible_order_is_refused(make, order):
    with pytest.raises(ValueError, match=f"order must be 1, 2 or 3, got {order}"):
        make(order=order)


@THEIRS
def test_heun_is_that_of_diffusers():
    """Theirs steps x / signal, once for each network call. 40 steps: none halves the noise."""
    n = 40
    other = HeunDiscreteScheduler(beta_schedule="linear", timestep_spacing="trailing",
                                  beta_start=1e-4, beta_end=0.02)  # fmt: skip
    other.set_timesteps(n)
    bar = (1 - BETA).cumprod(0)[other.timesteps.long()]
    other.sigmas = torch.cat([((1 - bar) / bar).sqrt(), torch.zeros(1)])
    x, schedule = normal(3, 6), linear(1000)
    y = x / schedule.signal[1000]
    path = sample_path(Denoiser(network, schedule), x, uniform_grid(1000, n), heun, clip=False)
    ends = []
    for t in other.timesteps:
        x = other.scale_model_input(y, t)
        y = other.step(network(x, (t.long() + 1).expand(3)), t, y).prev_sample
        if other.state_in_first_order:  # both halves of a step are done
            ends.append(y)
    ends.append(y)  # the last step is one half
    stops = list(path)
    assert len(stops) == n
    for stop, end in zip(stops, ends):
        assert_close(stop.x / schedule.signal[stop.t], end, rtol=1e-6, atol=1e-6)


def flow(schedule, x, t, s, mean=0.3, var=0.25):
    """Where the probability-flow ODE of N(mean, var) takes x from t to s."""
    (a, b), (c, d) = schedule.at(t), schedule.at(s)
    return c * mean + ((c**2 * var + d**2) / (a**2 * var + b**2)).sqrt() * (x - a * mean)


def made(step):
    """A step that is ready to be called: what is a class, or a partial of one, makes it first."""
    return step() if isinstance(getattr(step, "func", step), type) else step


@pytest.mark.parametrize(
    "step, order, counts",
    [
        (ddim, 1, (200, 400, 800)),
        (heun, 2, (200, 400, 800)),
        (DPMSolver, 2, (200, 400, 800)),
        (dpm_solver, 2, (100, 200, 400)),
        (SINGLE_3, 3, (10, 20, 40)),
        (MULTI_3, 3, (50, 100, 200)),
    ],
)
@pytest.mark.parametrize("make", [linear, cosine])
def test_solvers_have_their_order(step, order, counts, make):
    """The error at t = 0.1 T, from t = 0.75 T, falls as (number of steps)^-order.

    3M gets its first two steps from the flow: its own, of lower order, would hide what follows.
    """
    var = torch.tensor([1.5, 0.25, 0.09, 0.01], dtype=torch.float64)  # one alone may err by luck
    schedule = make(320_000 if step is SINGLE_3 else 32_000)  # rounded nodes are a little off
    denoiser = gaussian(0.3 * torch.ones(4), var.diag()).denoiser(schedule)
    start, stop, x = 3 * schedule.T // 4, schedule.T // 10, normal(5, 4)
    expected, errors = flow(schedule, x, start, stop, var=var), []
    for n in counts:
        times = [start - k * (start - stop) // n for k in range(n + 1)]
        walk, at = made(step), x
        for k, (t, s) in enumerate(itertools.pairwise(times)):
            end, _ = walk(denoiser, at, t, s, clip=False)
            at = flow(schedule, at, t, s, var=var) if step is MULTI_3 and k < 2 else end
        errors.append((at - expected).norm().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert_close(slopes, [float(order)] * 2, rtol=0, atol=0.15)


def test_second_order_is_worth_it_in_ten_calls():
    denoiser = gaussian([0.3], [[0.25]]).denoiser(linear(1000))
    x, errors = normal(200, 1), {}
    expected = flow(denoiser.schedule, x, 1000, 0)
    for name, step, steps in [("ddim", ddim, 10), ("heun", heun, 5), ("2M", DPMSolver, 10)]:
        end = sample(denoiser, x, log_snr_grid(denoiser.schedule, steps), step, clip=False)
        errors[name] = (end - expected).square().mean().sqrt().item()
    assert errors["2M"] < errors["ddim"] / 4 and errors["2M"] < errors["heun"]


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("schedule", [cosine(1000), STRAIGHT], ids=["cosine", "straight"])
def test_heun_is_worth_it_where_hardly_any_signal_is_left(schedule, kind):
    """The mean of the noises alone errs by 0.1 to 100 here: its x0 overshoots."""
    denoiser, x = gaussian([0.3], [[0.25]]).denoiser(schedule, "v"), normal(200, 1)
    grid = GRIDS[kind](schedule, 10)
    one, two = (sample(denoiser, x, grid, step, clip=False) for step in (ddim, heun))
    true = flow(schedule, x, schedule.T, 0)
    errors = [(end - true).square().mean().sqrt() for end in (one, two)]
    assert errors[1] < errors[0] / 2 and errors[1] < 0.12


@pytest.mark.parametrize("step", [DPMSolver, MULTI_3])
def test_one_solver_object_walks_one_path(step):
    denoiser, x = Denoiser(network, linear(100)), normal(2, 3)
    whole = sample(denoiser, x, [100, 60, 20, 0], step)
    paths = [sample_path(denoiser, x, [100, 60, 20, 0], step) for _ in range(2)]
    for stops in zip(*paths):  # interleaved, they do not see each other's past
        assert torch.equal(stops[0].x, stops[1].x)
    assert torch.equal(stops[0].x, whole)


@pytest.mark.parametrize("step", [ddim, heun, DPMSolver, MULTI_3, *SINGLE])
def test_flow_without_signal_at_T_is_followed(step):
    denoiser = gaussian([0.3], [[0.25]]).denoiser(STRAIGHT, "v")
    x = normal(20, 1)
    end = sample(denoiser, x, range(100, -1, -1), step, clip=False)
    assert_close(end, 0.3 + 0.5 * x, rtol=0, atol=0.02 if step is ddim else 0.002)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reverse_diffusion_converges_with_order_1(eta):
    """The error of the variance halves with the step, and vanishes: the SDE has the right law."""
    grids = [uniform_grid(4000, n) for n in (500, 1000, 2000, 4000)]
    law = [moments(linear(4000), grid, 0.3, 0.25, reverse_diffusion, eta, None) for grid in grids]
    vars = [var for _, var in law]
    ratios = [(a - 0.25) / (b - 0.25) for a, b in itertools.pairwise(vars)]
    assert_close(ratios, [2.0] * 3, rtol=0, atol=0.2)
    assert_close(2 * vars[-1] - vars[-2], 0.25, rtol=0, atol=2e-4)  # the limit, extrapolated


@pytest.mark.parametrize("snr", [0.1, 0.4])
def test_langevin_has_the_stationary_law_of_its_recursion(snr):
    """x + h score + sqrt(2 h) z on N(m, V) is affine: it settles at N(m, V / (1 - h / (2 V)))."""
    n, schedule, t = 20_000, linear(1000), 400
    bar = schedule.alpha_bar[t].item()
    h, var = 2 * snr**2 * (1 - bar), bar * 0.25 + 1 - bar
    denoiser = gaussian([0.5], [[0.25]]).denoiser(schedule)
    x = langevin(denoiser, 3 + normal(n, 1), t, rounds=300, snr=snr, clip=False, generator=seeded())
    expected = var / (1 - h / (2 * var))
    assert_close(x.mean().item(), bar**0.5 * 0.5, rtol=0, atol=4 * (expected / n) ** 0.5)
    assert_close(x.var().item(), expected, rtol=4 * (2 / n) ** 0.5, atol=0)


def test_langevin_that_cannot_be_is_refused_and_records_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    denoiser, x = Denoiser(lambda x, t: weight * x, linear(100)), torch.ones(2, 3)
    assert not langevin(denoiser, x, 50, rounds=2).requires_grad
    assert langevin(denoiser, x, 50, rounds=0) is x
    for options, message in [
        (dict(rounds=-1), "rounds must be 0 or more"),
        (dict(snr=0), "snr positive"),
        (dict(snr=math.nan), "snr positive"),
        (dict(t=0), "t = 0 is the clean image"),
    ]:
        with pytest.raises(ValueError, match=message):
            langevin(denoiser, x, **dict(t=50) | options)
    with pytest.raises(ValueError, match="eta must be 0 or more, and finite, got -1"):
        reverse_diffusion(denoiser, x, 50, 40, eta=-1)


@pytest.mark.parametrize(
    "step, variance",
    [
        (ancestral, "large"),
        (ancestral, "small"),
        (ddim, "small"),
        (predictor_corrector, "small"),
    ],
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
    corrected = step in CALLS_AT_S
    assert calls == ([100, 60] if corrected else [100]) and first.t == 60
    stops = [first, *path]
    assert (
        calls == ([100, 60, 60, 10, 10] if corrected else grid[:-1])
        and [stop.t for stop in stops] == grid[1:]
    )
    assert_close(stops[-1].x, sample(denoiser, x, grid, step, generator=seeded()), rtol=0, atol=0)
    assert_close(stops[0].x0, denoiser(x, 100, clip=True).x0, rtol=0, atol=0)


@pytest.mark.parametrize("step", STEPS + SINGLE)
def test_sampling_records_no_gradient_and_leaves_the_caller_his(step):
    weight = torch.ones(1, requires_grad=True)
    denoiser = Denoiser(lambda x, t: weight * x, linear(100))
    for stop in sample_path(denoiser, torch.ones(2, 3), [100, 50, 0], step):
        assert torch.is_grad_enabled() and not stop.x.requires_grad


@pytest.mark.parametrize("step", STEPS + SINGLE)
@pytest.mark.parametrize("schedule", [cosine(1), cosine(2), linear(25)])
def test_short_chains_and_single_steps_work(step, schedule):
    denoiser = gaussian([0.2, 0.1], 0.01 * torch.eye(2)).denoiser(schedule)
    for grid in (range(schedule.T, -1, -1), [schedule.T, 0]):
        x = sample(denoiser, normal(50, 2), grid, step)
        assert x.isfinite().all()
        assert x.abs().max() <= 1 or step in (reverse_diffusion, predictor_corrector)
    assert sample(denoiser, normal(0, 2), [schedule.T, 0], step).shape == (0, 2)


@pytest.mark.parametrize("step", STEPS + SINGLE)
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
