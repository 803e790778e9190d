"""Losses against their formulas, the terms of the bound, and the gradients that they promise."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from minddpm.likelihood import vlb_terms
from minddpm.losses import ImportanceTimes, hybrid_loss, simple_loss, vlb_loss
from minddpm.nets import UNet
from minddpm.prediction import Denoiser
from minddpm.schedule import cosine, linear

LOSSES = [simple_loss, vlb_loss, hybrid_loss]
each_loss = pytest.mark.parametrize("loss", LOSSES)


def levels(*shape, seed=0, dtype=torch.float64):
    grey = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return grey.to(dtype) / 127.5 - 1


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Table(nn.Module):
    """A network whose answer is its parameter."""

    def __init__(self, answer):
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, xt, t):
        return self.answer


@pytest.mark.parametrize(
    "predicts, target",
    [
        ("eps", lambda x0, eps, a, b: eps),
        ("x0", lambda x0, eps, a, b: x0),
        ("v", lambda x0, eps, a, b: a * eps - b * x0),
    ],
)
def test_simple_loss_is_the_mean_squared_error_of_each_image(predicts, target):
    x0, eps, t = levels(4, 3, 4, 4), normal(4, 3, 4, 4), torch.tensor([1, 20, 70, 100])
    bar = cosine(100).alpha_bar[t].view(4, 1, 1, 1)
    a, b = bar.sqrt(), (1 - bar).sqrt()
    ours = simple_loss(Denoiser(lambda x, t: x.sin(), cosine(100), predicts), x0, t, eps)
    error = (a * x0 + b * eps).sin() - target(x0, eps, a, b)
    expected = torch.stack([sum(e**2 for e in row.flatten()) / 48 for row in error])
    assert_close(ours, expected, rtol=1e-12, atol=0)


def test_untrained_unet_has_loss_one():
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(), linear(1000))
    with torch.no_grad():
        loss = simple_loss(denoiser, levels(12, 3, 32, 32, dtype=torch.float32))
    assert_close(loss.mean().item(), 1.0, rtol=0.02, atol=0)


@each_loss
def test_times_are_uniform_over_1_to_T_and_noise_is_normal(loss):
    times, noisy, n = [], [], 6000
    denoiser = Denoiser(lambda x, t: times.append(t) or noisy.append(x) or 0 * x, cosine(5), "x0")
    torch.manual_seed(0)
    assert loss(Denoiser(denoiser.net, cosine(5), "x0"), torch.zeros(n, 1).double()).shape == (n,)
    counts = times[0].bincount(minlength=7)
    assert counts[0] == counts[6] == 0 and counts.sum() == n
    assert_close(counts[1:6] / n, torch.full((5,), 0.2), rtol=0, atol=4 * (0.16 / n) ** 0.5)
    eps = noisy[0].flatten() / (1 - cosine(5).alpha_bar[times[0]]).sqrt()
    assert abs(eps.mean()) < 4 / n**0.5 and abs(eps.var() - 1) < 4 * (2 / n) ** 0.5


@pytest.mark.parametrize("variance", ["small", "large"])
def test_vlb_loss_at_t_is_T_times_the_kl_divergence(variance):
    T, t = 50, 20
    bar, beta = linear(T).alpha_bar.tolist(), linear(T).beta.tolist()
    x0, eps = levels(3, 4), normal(3, 4)
    xt = bar[t] ** 0.5 * x0 + (1 - bar[t]) ** 0.5 * eps
    guess = xt.tanh()
    on_x0 = bar[t - 1] ** 0.5 * beta[t] / (1 - bar[t])
    on_xt = (1 - beta[t]) ** 0.5 * (1 - bar[t - 1]) / (1 - bar[t])
    small = beta[t] * (1 - bar[t - 1]) / (1 - bar[t])
    true = Normal(on_x0 * x0 + on_xt * xt, small**0.5)
    model = Normal(on_x0 * guess + on_xt * xt, {"small": small, "large": beta[t]}[variance] ** 0.5)
    denoiser = Denoiser(lambda x, t: x.tanh(), linear(T), "x0", variance)
    expected = T * kl_divergence(true, model).mean(1) / math.log(2)
    assert_close(vlb_loss(denoiser, x0, t, eps), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "variance, net",
    [
        ("small", lambda x, t: x.cos()),
        ("learned", lambda x, t: torch.cat([x.cos(), x.sin()], 1)),
    ],
)
def test_mean_of_vlb_loss_over_t_is_the_sum_of_the_terms(variance, net):
    T, x0 = 30, levels(2, 3, 4, 4)
    denoiser = Denoiser(net, cosine(T), "eps", variance)
    terms = vlb_terms(denoiser, x0, clip=False, generator=torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    noise = {t: torch.randn(x0.shape, generator=rng, dtype=x0.dtype) for t in range(T, 0, -1)}
    losses = torch.stack(
        [vlb_loss(denoiser, x0, torch.full((2,), t), noise[t]) for t in range(1, T + 1)]
    )
    assert_close(losses.T / T, terms[:, :T], rtol=1e-10, atol=1e-12)
    assert_close(losses.mean(0), terms[:, :T].sum(1), rtol=1e-10, atol=0)


def both_halves(loss, t, **options):
    """A learned-variance network's gradient, split into prediction and variance."""
    x0, eps = levels(2, 3, 4, 4), normal(2, 3, 4, 4)
    net = Table(normal(2, 6, 4, 4, seed=1))
    value = loss(Denoiser(net, linear(100), "eps", "learned"), x0, torch.tensor(t), eps, **options)
    value.sum().backward()
    return value.detach(), *net.answer.grad.chunk(2, dim=1)


@pytest.mark.parametrize("t", [[1, 50], [2, 100]])
def test_hybrid_loss_lets_the_bound_teach_the_variance_alone(t):
    simple, mean_by_simple, variance_by_simple = both_halves(simple_loss, t)
    bound, mean_by_bound, variance_by_bound = both_halves(vlb_loss, t)
    hybrid, mean, variance = both_halves(hybrid_loss, t, weight=0.25)
    assert_close(hybrid, simple + 0.25 * bound, rtol=1e-12, atol=0)
    assert_close(mean, mean_by_simple, rtol=1e-12, atol=0)
    assert_close(variance, 0.25 * variance_by_bound, rtol=1e-12, atol=0)
    assert (variance_by_simple == 0).all() and (variance != 0).any(dim=(1, 2, 3)).all()
    assert (mean_by_bound != 0).any()


def test_hybrid_weight_is_a_thousandth_unless_given():
    value, *_ = both_halves(hybrid_loss, [5, 60])
    assert_close(value, both_halves(hybrid_loss, [5, 60], weight=0.001)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_every_time(dtype):
    T, t = 1000, torch.arange(1, 1001)
    for answer in (torch.zeros(T, 2, 8), 3 * torch.randn(T, 2, 8, generator=torch.manual_seed(0))):
        net = Table(answer.to(dtype))
        loss = hybrid_loss(
            Denoiser(net, linear(T), variance="learned"), levels(T, 1, 8, dtype=dtype), t
        )
        loss.sum().backward()
        assert loss.isfinite().all() and net.answer.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_and_images_give_a_float32_loss(dtype):
    eps, t = normal(4, 1000).to(dtype), torch.tensor([1, 5, 50, 100])
    zero = Denoiser(lambda x, t: (0 * x).to(dtype), linear(100))
    for x0 in (torch.zeros(4, 1000, dtype=dtype), torch.zeros(4, 1000)):
        loss = simple_loss(zero, x0, t, eps.to(x0.dtype))
        assert loss.dtype == torch.float32
        assert_close(loss, eps.double().square().mean(1).float(), rtol=1e-6, atol=0)


@each_loss
def test_an_empty_batch_has_no_losses(loss):
    assert loss(Denoiser(lambda x, t: x, linear(50)), torch.zeros(0, 3, 4, 4)).shape == (0,)


@each_loss
@pytest.mark.parametrize(
    "t, eps, error, message",
    [
        (0, None, ValueError, "t = 0 is the clean image"),
        (51, None, ValueError, r"t must lie in 0\.\.50"),
        (2.0, None, TypeError, "integers"),
        (torch.ones(3).int(), None, ValueError, "one integer per image"),
        (None, torch.zeros(1, 3), ValueError, r"equal shapes, got x0 \(4, 3\), eps \(1, 3\)"),
    ],
)
def test_bad_input_is_named(loss, t, eps, error, message):
    with pytest.raises(error, match=message):
        loss(Denoiser(lambda x, t: x, linear(50)), torch.zeros(4, 3), t, eps)


@each_loss
def test_images_must_be_scaled(loss):
    with pytest.raises(TypeError, match="floating-point image batch in .*, got torch.uint8"):
        loss(Denoiser(lambda x, t: x, linear(50)), torch.zeros(4, 3, dtype=torch.uint8))


def warm(T=8, length=10, uniform=1e-3):
    """A full history: at time t the losses have root mean square t, and signs that differ."""
    times = ImportanceTimes(T, length, uniform)
    for k in range(length):
        t = torch.arange(1, T + 1)
        times.update(t, t * (-1.0) ** k)
    return times


def test_importance_times_are_uniform_until_every_time_has_ten_losses():
    times = warm()
    assert_close(times.probabilities().sum().item(), 1.0, rtol=0, atol=1e-12)
    assert times.probabilities()[7] > 7 * times.probabilities()[0]
    times.history[3, 0] = torch.nan  # nine of them
    assert_close(times.probabilities(), torch.full((8,), 1 / 8).double())
    assert_close(times.draw(50)[1], torch.ones(50))


@pytest.mark.parametrize("uniform", [1e-3, 0.2])
def test_importance_times_follow_the_root_mean_square(uniform):
    """The mean of the losses is 0 and that of their sizes differs from the root: all three tell."""
    times = warm(uniform=uniform)
    times.update(torch.tensor([8] * 5), torch.zeros(5))  # five old ones are gone, five are zeros
    root = torch.arange(1, 9).double()
    root[7] = (5 * 64 / 10) ** 0.5
    expected = (1 - uniform) * root / root.sum() + uniform / 8
    assert_close(times.probabilities(), expected, rtol=1e-12, atol=0)


def test_importance_times_forget_the_oldest_and_take_a_time_that_comes_twice():
    times = ImportanceTimes(3, length=2)
    times.update(torch.tensor([2, 2, 2, 1]), torch.tensor([7.0, 8.0, 9.0, 1.0]))
    assert times.history[1].tolist() == [8.0, 9.0]
    assert times.history[0, 1] == 1 and times.history[0, 0].isnan()
    assert times.history[2].isnan().all()


def test_importance_weights_leave_the_mean_and_shrink_the_variance():
    """Against the exact mean and variance of L_t / (T p_t) where L_t is t, without scatter."""
    times, n, generator = warm(), 40_000, torch.Generator().manual_seed(0)
    t, weight = times.draw(n, generator)
    assert t.min() == 1 and t.max() == 8 and t.dtype == torch.int64
    share = t.bincount(minlength=9)[1:] / n
    assert_close(share.double(), times.probabilities(), rtol=0, atol=0.01)
    p, L = times.probabilities(), torch.arange(1, 9).double()
    var = ((L / (8 * p)) ** 2 * p).sum() - L.mean() ** 2
    estimate = weight.double() * t
    assert_close(estimate.mean(), L.mean(), rtol=0, atol=4 * (var / n).sqrt().item() + 1e-6)
    assert_close(estimate.var(), var, rtol=0.1, atol=1e-9)
    assert var < 1e-3 * L.var()


def test_no_probabilities_have_a_smaller_variance():
    times = warm(uniform=1e-9)
    second = times.history.square().mean(1)
    best = (second / times.probabilities()).sum()
    assert_close(best, second.sqrt().sum() ** 2, rtol=1e-6, atol=0)
    for seed in range(20):
        tilt = torch.exp(0.3 * normal(8, seed=seed))
        other = tilt * times.probabilities()
        assert (second / (other / other.sum())).sum() > best


def test_importance_times_work_on_the_bound_of_a_network():
    T, x0 = 20, levels(4000, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: x.tanh(), cosine(T), "x0", "small")
    times = ImportanceTimes(T)
    torch.manual_seed(0)
    for _ in range(10):
        t = torch.arange(1, T + 1)
        times.update(t, vlb_loss(denoiser, x0[:T], t))
    plain = vlb_loss(denoiser, x0)
    t, weight = times.draw(len(x0))
    weighted = weight * vlb_loss(denoiser, x0, t)
    error = (plain.var() + weighted.var()).sqrt().item() / len(x0) ** 0.5
    assert_close(weighted.mean(), plain.mean(), rtol=0, atol=4 * error)
    assert weighted.std() < plain.std() / 2


@pytest.mark.parametrize("arguments", [(0,), (5, 0), (5, 10, 0.0), (5, 10, 1.5)])
def test_importance_times_name_bad_input(arguments):
    with pytest.raises(ValueError, match="T and length must be 1 or more and uniform in"):
        ImportanceTimes(*arguments)


def test_importance_times_refuse_a_loss_that_is_no_number():
    with pytest.raises(ValueError, match="a loss is NaN or infinite"):
        ImportanceTimes(2).update(torch.tensor([1]), torch.tensor([torch.nan]))


@pytest.mark.parametrize(("t", "loss"), [([0], [7.0]), ([4], [7.0]), ([1, 2], [7.0])])
def test_losses_of_impossible_times_are_refused(t, loss):
    times = ImportanceTimes(3, 1)
    with pytest.raises(ValueError, match=r"one loss for each t in 1\.\.3"):
        times.update(torch.tensor(t), torch.tensor(loss))
    assert times.history.isnan().all()
