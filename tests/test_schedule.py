"""Schedules against the papers' formulas typed out, and against diffusers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from minddpm.schedule import SCHEDULES, Schedule, cosine, linear, straight


def linear_by_hand(T):
    table = [1.0]
    for t in range(1, T + 1):
        beta = (1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)) * 1000 / T
        table.append(table[-1] * (1 - beta))
    return table


def cosine_by_hand(T):
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    table = [1.0]
    for t in range(1, T + 1):
        table.append(table[-1] * (1 - min(1 - f(t) / f(t - 1), 0.999)))
    return table


@pytest.mark.parametrize("T", [100, 1000, 4000])
@pytest.mark.parametrize("name, by_hand", [("linear", linear_by_hand), ("cosine", cosine_by_hand)])
def test_schedule_is_the_formula_typed_out(name, by_hand, T):
    schedule, alpha_bar = SCHEDULES[name](T), torch.tensor(by_hand(T), dtype=torch.float64)
    assert schedule.T == T
    assert_close(schedule.alpha_bar, alpha_bar, rtol=1e-11, atol=0)
    assert_close(schedule.signal, alpha_bar.sqrt(), rtol=1e-11, atol=0)
    assert_close(schedule.noise, (1 - alpha_bar).sqrt(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("ours, theirs", [(linear, "linear"), (cosine, "squaredcos_cap_v2")])
def test_schedule_is_the_one_of_diffusers(ours, theirs):
    other = DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs).alphas_cumprod.double()
    # Their tables are cumulative products in float32.
    assert_close(ours(1000).alpha_bar[1:], other, rtol=1e-4, atol=0)


@pytest.mark.parametrize("T", [1, 3, 1000])
def test_straight_goes_from_image_to_noise_at_constant_speed(T):
    schedule = straight(T)
    assert schedule.T == T and SCHEDULES["straight"] is straight
    assert schedule.signal.tolist() == [1 - k / T for k in range(T + 1)]
    assert schedule.noise.tolist() == [k / T for k in range(T + 1)]
    assert schedule.signal[-1] == 0


def test_straight_has_the_noise_levels_of_flow_matching_in_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    assert_close(straight(1000).noise[1:].flip(0), theirs.sigmas.double(), rtol=1e-6, atol=0)


def test_cosine_caps_beta_where_it_must():
    beta = cosine(1000).beta
    assert_close(beta[-1].item(), 0.999, rtol=1e-9, atol=0)
    assert_close(cosine(1000, cap=0.5).beta.max().item(), 0.5, rtol=1e-12, atol=0)
    assert (beta[:-1] < 0.99).all()


def test_linear_beta_is_evenly_spaced_and_is_zero_at_no_step():
    beta = linear(1000).beta
    assert beta[0] == 0
    assert_close(beta[1:], torch.linspace(1e-4, 0.02, 1000).double(), rtol=1e-6, atol=0)
    assert_close(beta[[1, 1000]].tolist(), [1e-4, 0.02], rtol=1e-11, atol=0)


@pytest.mark.parametrize("T", [300, 1000, 4000, 100_000])
def test_linear_ends_in_the_same_noise_for_any_number_of_steps(T):
    assert 3e-5 < linear(T).alpha_bar[-1] < 4.5e-5


@pytest.mark.parametrize("schedule", [linear(100), cosine(100), linear(1, last=1e-4), cosine(2)])
def test_log_snr_is_the_logit_of_alpha_bar(schedule):
    assert schedule.log_snr[0] == math.inf
    assert_close(schedule.log_snr[1:], schedule.alpha_bar[1:].logit(), rtol=1e-10, atol=1e-10)


def test_noise_of_the_first_step_keeps_its_digits_in_float32():
    _, noise = linear(1000).scales(1, like=torch.zeros(1))
    assert noise.dtype == torch.float32
    assert noise == torch.tensor(0.01)  # sqrt(1 - alpha_bar_1) in float32 would be off by 8e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 8, 8)])
def test_scales_line_up_with_the_batch(shape, dtype):
    schedule, like = linear(50), torch.zeros(shape, dtype=dtype)
    t = torch.tensor([0, 7, 7, 50])
    for scale, table in zip(schedule.scales(t, like), (schedule.signal, schedule.noise)):
        assert scale.dtype == dtype and scale.shape == (4, *[1] * (len(shape) - 1))
        assert_close(scale.flatten(), table[t].to(dtype), rtol=0, atol=0)
    assert schedule.scales(7, like)[0].shape == ()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_at_reads_any_integer_type(dtype):
    signal, noise = linear(50).at(torch.tensor([0, 50], dtype=dtype))
    assert_close(signal.tolist(), [1.0, linear_by_hand(50)[-1] ** 0.5], rtol=1e-11, atol=0)
    assert noise[0] == 0


def test_a_schedule_need_not_preserve_variance():
    growing = Schedule(signal=[1, 1, 1], noise=[0, 2, 10])
    assert growing.beta.tolist() == [0, 0, 0]
    assert_close(growing.log_snr[2].item(), -2 * math.log(10))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Schedule([1, 0.5], [0, 0.5, 0.6]), "same length"),
        (lambda: Schedule([1], [0]), "same length"),
        (lambda: Schedule([[1, 0.5]], [[0, 0.5]]), "same length"),
        (lambda: Schedule([0.9, 0.5], [0, 0.5]), "signal.0. must be 1"),
        (lambda: Schedule([1, 0.5], [0.1, 0.5]), "noise.0. must be 0"),
        (lambda: Schedule([1, 0.5, 0.5], [0, 0.5, 0.5]), "must fall strictly"),
        (lambda: Schedule([1, 0.5], [0, 0]), "must add noise"),
        (lambda: Schedule([1, -0.5], [0, 1]), "not negative"),
        (lambda: Schedule([1, math.nan], [0, 1]), "finite"),
        (lambda: Schedule([1, 0.5], [0, math.inf]), "finite"),
        (lambda: Schedule.from_alpha_bar([1, 1.5]), r"in \[0, 1\]"),
        (lambda: Schedule.from_alpha_bar([1, math.nan]), r"in \[0, 1\]"),
        (lambda: Schedule.from_alpha_bar([1, 0.5, 0.6]), "must fall strictly"),
        (lambda: Schedule.from_beta([0.1, 0.0]), r"beta must lie in \(0, 1\]"),
        (lambda: Schedule.from_beta([0.1, 1.1]), r"beta must lie in \(0, 1\]"),
        (lambda: linear(0), "T must be at least 1, got 0"),
        (lambda: cosine(-3), "T must be at least 1, got -3"),
        (lambda: straight(0), "T must be at least 1, got 0"),
        (lambda: linear(10), "take a larger T or smaller betas"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "t, error, message",
    [
        (-1, ValueError, r"0\.\.50, got -1"),
        (51, ValueError, r"0\.\.50, got 51"),
        (torch.tensor([1, 99]), ValueError, r"0\.\.50, got 1\.\.99"),
        (3.0, TypeError, "integers in 0..50, got torch.float32"),
        (torch.ones(4), TypeError, "integers in 0..50, got torch.float32"),
        (torch.ones(4, dtype=torch.bool), TypeError, "got torch.bool"),
        (
            torch.ones(3, dtype=int),
            ValueError,
            r"one integer per image, shape \(4,\), got .*\(3,\)",
        ),
        (torch.ones(4, 1, dtype=int), ValueError, r"shape \(4,\), got shape \(4, 1\)"),
    ],
)
def test_impossible_times_are_refused(t, error, message):
    with pytest.raises(error, match=message):
        linear(50).scales(t, like=torch.zeros(4, 3))


def test_images_must_be_floating_point():
    with pytest.raises(TypeError, match="floating-point image batch in .*, got torch.uint8"):
        linear(50).scales(1, like=torch.zeros(4, 3, dtype=torch.uint8))
