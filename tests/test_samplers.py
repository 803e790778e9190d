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
    FlowMatchEulerDiscreteScheduler,
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
from minddpm.schedule import SCHEDULES, Schedule, cosine, linear, straight

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


STRAIGHT = straight(100)  # no signal at T


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("schedule", [linear(100), cosine(100), STRAIGHT])
def test_every_grid_falls_from_T_to_0_in_the_steps_asked_for(make, schedule):
    for steps in (1, 2, 7, 50, 99, 100):
        if make is GRIDS["ddim-quadratic"] and steps == 1:
            with pytest.raises(ValueError, match="needs 2 steps or more"):
                make(schedule, steps)
            continue
        grid = make(schedule, steps)
        if make is GRIDS["ddim-quadratic"]:
            assert steps > 9 or len(grid) == steps + 1
            assert (grid[0], grid[-2:]) == (81, [1, 0])
        else:
            assert len(grid) == steps + 1 and (grid[0], grid[-1]) == (100, 0)
        assert all(t > s for t, s in itertools.pairwise(grid))
    assert make(Schedule([1, 0], [0, 1]), 1) == [1, 0]


@pytest.mark.parametrize(
    "make, even",
    [
        (log_snr_grid, lambda ratio: math.log(ratio)),
        (karras_grid, lambda ratio: ratio ** (-1 / 7)),
    ],
)
def test_grids_are_even_in_the_variable_they_name(make, even):
    schedule = linear(20_000)
    ratio = (schedule.signal / schedule.noise).tolist()
    grid = make(schedule, 12)
    assert grid[-2:] == [1, 0]
    gaps = [even(ratio[t]) - even(ratio[s]) for t, s in itertools.pairwise(grid[:-1])]
    # The last gaps are coarse: near t = 1 the times are few.
    assert_close(gaps[:-3], [sum(gaps) / len(gaps)] * (len(gaps) - 3), rtol=0.02, atol=0)


@pytest.mark.parametrize("S", [10, 20, 50, 100, 1000])
def test_ddim_quadratic_grid_is_that_of_the_authors(S):
    """ermongroup/ddim counts from 0, steps to seq_next, and ends with the step from 0 to -1."""
    seq = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), S) ** 2]
    steps = list(zip(reversed(seq), reversed([-1, *seq[:-1]])))
    moves = [(i + 1, j + 1) for i, j in steps if i != j]  # from i to i, nothing changes
    grid = ddim_quadratic_grid(1000, S)
    assert list(itertools.pairwise(grid)) == moves and (grid[0], grid[-2:]) == (801, [1, 0])
    assert len(grid) == S + 1 or S > 29


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


@pytest.mark.parametrize(
    "step, draws", [(ancestral, 4), (ddim, 0), (reverse_diffusion, 4), (predictor_corrector, 8)]
)
def test_noise_is_drawn_at_every_step_but_the_last(step, draws):
    rng, x = seeded(), normal(2, 3)
    end = sample(Denoiser(network, linear(1000)), x, uniform_grid(1000, 5), step, generator=rng)
    if step in (ancestral, ddim):
        assert end.abs().max() <= 1  # the last step returns the predicted image itself, clipped
    expected = seeded()
    for _ in range(draws):
        torch.randn(2, 3, dtype=torch.float64, generator=expected)
    assert torch.equal(rng.get_state(), expected.get_state())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_reverse_diffusion_is_the_formula_of_the_paper(eta):
    """With one step of the chain it is that of Score SDE app. E, in beta_t."""
    xt, t = normal(2, 3), 700
    ours, _ = reverse_diffusion(
        Denoiser(network, linear(1000)), xt, t, t - 1, eta=eta, clip=False, generator=seeded(1)
    )
    beta, bar = BETA[t - 1], (1 - BETA).cumprod(0)[t - 1]
    score = -network(xt, torch.full((2,), t)) / (1 - bar).sqrt()
    share = 1 if eta else 0.5
    theirs = (2 - (1 - beta).sqrt()) * xt + share * beta * score
    assert_close(ours, theirs + eta * beta.sqrt() * normal(2, 3, seed=1), rtol=1e-9, atol=1e-9)


def test_predictor_corrector_is_a_step_and_langevin_updates():
    denoiser, xt, rng = Denoiser(network, linear(1000)), normal(2, 3), seeded(1)
    ours, prediction = predictor_corrector(
        denoiser, xt, 500, 400, predictor=ddim, rounds=3, snr=0.1, generator=seeded(1)
    )
    xs, expected = ddim(denoiser, xt, 500, 400)
    noise = (1 - (1 - BETA).cumprod(0)[399]).sqrt()
    for _ in range(3):
        h = 2 * (0.1 * noise) ** 2
        score = -denoiser(xs, 400, clip=True).eps / noise
        z = torch.randn(xs.shape, dtype=xs.dtype, generator=rng)
        xs = xs + h * score + (2 * h).sqrt() * z
    assert_close(ours, xs, rtol=1e-9, atol=1e-9)
    assert_close(prediction.x0, expected.x0, rtol=0, atol=0)
    last, _ = predictor_corrector(denoiser, xt, 500, 0, predictor=ddim, generator=rng)
    assert_close(last, ddim(denoiser, xt, 500, 0)[0], rtol=0, atol=0)


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
        if step is reverse_diffusion:
            total = bar[t] * var + 1 - bar[t]
            noise = 0 if s == 0 else eta**2 * beta
            a = 2 - (bar[t] / bar[s]) ** 0.5 - (1 + eta**2) / 2 * beta / total
            m = a * m + (1 + eta**2) / 2 * beta / total * bar[t] ** 0.5 * mean
            v = a**2 * v + noise
            continue
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
    [
        (ancestral, 0, "small"),
        (ancestral, 0, "large"),
        (ddim, 0.0, "small"),
        (ddim, 0.6, "small"),
        (reverse_diffusion, 0.0, "small"),
        (reverse_diffusion, 0.6, "small"),
        (reverse_diffusion, 1.5, "small"),
    ],
)
@pytest.mark.parametrize("steps", [6, 60])
def test_sampler_of_a_gaussian_has_the_moments_of_its_recursion(step, eta, variance, steps):
    n, angle = 20_000, torch.tensor(0.5).double()
    axes = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    mean, var = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.6, 0.02]).double()
    data = gaussian(axes @ mean, axes * var @ axes.T)
    schedule, grid = linear(1000), quadratic_grid(1000, steps)
    options = dict(clip=False, generator=seeded(9)) | ({} if step is ancestral else dict(eta=eta))
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


THEIRS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("n", [1, 5, 20])
def test_ddim_on_the_straight_schedule_is_flow_matching_in_diffusers(n):
    denoiser = Denoiser(network, straight(1000), "velocity")
    other = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    grid, x = uniform_grid(1000, n), normal(4, 3).float()
    other.set_timesteps(sigmas=[t / 1000 for t in grid[:-1]])
    theirs = x
    for t, time in zip(grid[:-1], other.timesteps, strict=True):
        assert_close(time.item(), float(t), rtol=1e-6, atol=0)
        theirs = other.step(network(theirs, torch.tensor(t)), time, theirs).prev_sample
    assert_close(sample(denoiser, x, grid, ddim, clip=False), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [ancestral, ddim, heun, DPMSolver])
def test_a_path_rescaled_gives_the_same_images(step):
    """signal and noise both divided by their sum lie on the straight path: only x_t changes."""
    curved = linear(50)
    total = curved.signal + curved.noise
    line = Schedule(curved.signal / total, curved.noise / total)
    scaled, x = (lambda x, t: network(x * total[t].view(-1, 1), t)), normal(6, 3)
    v = Denoiser(network, curved, "velocity", "small")
    rescaled = Denoiser(scaled, line, "velocity", "small")
    ends = [
        sample(d, start, [50, 30, 10, 4, 0], step, clip=False, generator=seeded())
        for d, start in ((v, x), (rescaled, x / total[-1]))
    ]
    assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-10)


def multistep(n, order, predicts="epsilon"):
    """Theirs, at the times of uniform_grid(1000, n) less one, with their tables in float64."""
    options = dict(algorithm_type="dpmsolver++", solver_order=order, solver_type="midpoint")
    other = DPMSolverMultistepScheduler(
        beta_schedule="linear", timestep_spacing="trailing", prediction_type=predicts,
        final_sigmas_type="zero", lower_order_final=False, **options
    )  # fmt: skip
    other.set_timesteps(n)
    bar = (1 - BETA).cumprod(0)[other.timesteps]
    other.sigmas = torch.cat([((1 - bar) / bar).sqrt(), torch.zeros(1)])
    return other


def add_the_missing_half(other):
    """Their third-order update, with D2 twice what it is there.

    D2 is h^2 times a second divided difference, half of h^2 x0''; the Taylor series wants all of it
    (in `singlestep_dpm_solver_third_order_update` D2 has its factor 2).
    """
    theirs = other.multistep_dpm_solver_third_order_update

    def corrected(outputs, sample, **_):
        k = other.step_index
        lam = -other.sigmas[k - 2 : k + 2].log()
        h1, h0, h = lam.diff()
        m2, m1, m0 = outputs
        second = 2 * ((m0 - m1) / h0 - (m1 - m2) / h1) / (h0 + h1)
        alpha = 1 / (1 + other.sigmas[k + 1] ** 2).sqrt()
        missing = alpha * (h**2 / 2 - h - torch.expm1(-h)) * second / 2
        return theirs(outputs, sample=sample) + missing

    other.multistep_dpm_solver_third_order_update = corrected


@THEIRS
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("n", [5, 20])
def test_dpm_solver_is_that_of_diffusers(predicts, n, order):
    other = multistep(n, order, predicts)
    if order == 3:
        add_the_missing_half(other)
    x = normal(3, 6)
    ours = {"epsilon": "eps", "v_prediction": "v"}[predicts]
    denoiser = Denoiser(network, linear(1000), ours)
    step = partial(DPMSolver, order=order)
    path = sample_path(denoiser, x, uniform_grid(1000, n), step, clip=False)
    for stop, t in zip(path, other.timesteps):
        x = other.step(network(x, (t + 1).expand(3)), t, x).prev_sample
        assert_close(stop.x, x, rtol=1e-5, atol=1e-5)  # their state passes through float32
    assert stop.t == 0


def nodes(schedule, grid, order):
    """The grid with the times between that the single-step solver takes."""
    lam = (schedule.signal.log() - schedule.noise.log()).tolist()
    stops = [grid[0]]
    for t, s in itertools.pairwise(grid[:-1]):
        for k in range(1, order):
            target = lam[t] + k / order * (lam[s] - lam[t])
            stops.append(min(range(s + 1, t), key=lambda u: abs(lam[u] - target)))
        stops.append(s)
    return stops


@THEIRS
@pytest.mark.filterwarnings("ignore:`algorithm_types=dpmsolver` is deprecated:FutureWarning")
@pytest.mark.parametrize("order", [2, 3])
def test_single_step_dpm_solver_is_that_of_diffusers(order):
    """One call a step there. Their second stage of order 3 is alg. 2's with solver_type heun."""
    schedule, grid = linear(1000), [1000, 800, 500, 200, 20, 0]
    other = DPMSolverSinglestepScheduler(
        beta_schedule="linear", solver_order=order, algorithm_type="dpmsolver",
        solver_type="midpoint", final_sigmas_type="sigma_min", lower_order_final=True
    )  # fmt: skip
    times = nodes(schedule, grid, order)
    other.set_timesteps(len(times))
    other.timesteps = torch.tensor(times) - 1
    bar = (1 - BETA).cumprod(0)[other.timesteps]
    other.sigmas = torch.cat([((1 - bar) / bar).sqrt(), torch.ones(1)])
    other.order_list = (list(range(1, order + 1)) * len(grid))[: len(times)]
    x, ends = normal(3, 6), {}
    step, denoiser = partial(dpm_solver, order=order), Denoiser(network, schedule)
    path = {stop.t: stop.x for stop in sample_path(denoiser, x, grid, step, clip=False)}
    for k, t in enumerate(times[:-1]):
        stage = other.order_list[k]
        other.register_to_config(solver_type="heun" if stage == 2 < order else "midpoint")
        x = other.step(network(x, torch.full((3,), t)), torch.tensor(t - 1), x).prev_sample
        ends[times[k + 1]] = x
    for t in grid[1:-1]:
        assert_close(path[t], ends[t], rtol=1e-5, atol=1e-5)
    assert_close(path[0], ddim(denoiser, path[20], 20, 0, clip=False)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("step", [partial(dpm_solver, order=1), partial(DPMSolver, order=1)])
def test_first_order_is_ddim(step, clip):
    denoiser, x, grid = Denoiser(network, linear(1000)), normal(3, 6), quadratic_grid(1000, 12)
    paths = [sample_path(denoiser, x, grid, one, clip=clip) for one in (step, ddim)]
    for ours, other in zip(*paths):
        assert_close(ours.x, other.x, rtol=1e-12, atol=1e-12)


def test_single_step_calls_the_network_where_it_says():
    """At t and in equal parts of lambda; fewer times where there are no times between."""
    calls = []
    denoiser = Denoiser(lambda x, t: calls.append(t[0].item()) or network(x, t), linear(1000))
    for order, t, s in [(1, 900, 300), (2, 900, 300), (3, 900, 300), (3, 9, 7), (2, 9, 8),
                        (3, 9, 8), (2, 9, 0), (3, 9, 0), (3, 9, 6)]:  # fmt: skip
        calls.append("")
        dpm_solver(denoiser, normal(2, 3), t, s, order=order)
    expected = [nodes(linear(1000), [900, 300, 0], k)[:-1] for k in (1, 2, 3)]
    expected += [[9, 8], [9], [9], [9], [9], [9, 8, 7]]
    assert calls == [call for few in expected for call in ["", *few]]


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
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
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
    true = flow(schedule, x, grid[0], 0)
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
    denoiser = gaussian([0.3], [[0.25]]).denoiser(STRAIGHT, "velocity")
    x = normal(20, 1)
    grid = range(100, -1, -4 if step in SINGLE else -1)  # these need times between
    end = sample(denoiser, x, grid, step, clip=False)
    assert_close(end, 0.3 + 0.5 * x, rtol=0, atol=0.02 if step is ddim else 0.006)


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
    law = gaussian([0.5, -0.2], [[0.2, 0.1], [0.1, 0.3]])
    denoiser = law.denoiser(straight(T), "velocity")
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
