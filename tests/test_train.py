"""The training loop equals loops written out by hand; nothing in it is about diffusion."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from minddpm.config import TrainConfig
from minddpm.losses import simple_loss
from minddpm.nets import MLP
from minddpm.prediction import Denoiser
from minddpm.schedule import cosine
from minddpm.train import TrainState, learning_rate, train


def config(**changed):
    plain = {"steps": 10, "warmup": 0, "learning_rate": 0.1, "grad_clip": math.inf}
    return TrainConfig(**{**plain, "ema_decay": 0.9, **changed})


def line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def points(k):
    """Batch k of a linear regression: (inputs (8, 3), answers (8, 1))."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(k))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3


def fit(net):
    """The loss of that regression, (8,)."""
    return lambda batch: (net(batch[0]) - batch[1]).square().flatten(1).mean(1)


def run(state, loss=fit, batch=points):
    return list(train(state, loss(state.net), batch))


# The learning rate


def test_learning_rate_rises_stays_and_falls():
    c = config(steps=10, warmup=4, cooldown=5, learning_rate=1.0)
    rates = [learning_rate(c, step) for step in range(1, 11)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]


def test_learning_rate_without_warmup_and_cooldown_is_constant():
    c = config(steps=3, learning_rate=0.7)
    assert [learning_rate(c, step) for step in (1, 2, 3)] == [0.7] * 3


def test_the_rate_recorded_is_the_rate_used():
    """Adam's first update moves each weight by the learning rate (its bias corrections cancel)."""
    c = config(steps=1, warmup=4, learning_rate=0.1)
    net = line()
    before = net.weight.clone()
    (record,) = run(TrainState(net, c))
    assert record.learning_rate == 0.025
    assert_close((net.weight - before).abs(), torch.full((1, 3), 0.025), rtol=1e-5, atol=0)


# An update


def test_updates_equal_torchs_own_adam():
    c = config(steps=20, warmup=5, cooldown=5, learning_rate=0.05, grad_clip=0.5)
    state, net = TrainState(line(), c), line()
    records = run(state)
    adam = torch.optim.Adam(net.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    for k, record in enumerate(records):
        x, y = points(k)
        loss = nn.functional.mse_loss(net(x), y)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g * min(1, 0.5 / norm.item())
        adam.param_groups[0]["lr"] = 0.05 * min(1, (k + 1) / 5, (20 - k) / 5)
        adam.step()
        assert record.step == k + 1
        assert_close(record.loss, loss.detach(), rtol=1e-4, atol=1e-6)
        assert_close(record.grad_norm, norm, rtol=1e-4, atol=1e-6)
    for mine, truth in zip(state.net.parameters(), net.parameters(), strict=True):
        assert_close(mine, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("clip", "length"), [(0.5, 0.5), (100.0, 5.0), (math.inf, 5.0)])
def test_a_gradient_is_clipped_to_length(clip, length):
    """The loss 3 a + 4 b has the gradient (3, 4), of norm 5."""
    net = nn.Linear(2, 1, bias=False)
    state = TrainState(net, config(steps=1, grad_clip=clip))
    (record,) = run(state, lambda net: net, lambda k: torch.tensor([[3.0, 4.0]]))
    assert_close(record.grad_norm, torch.tensor(5.0), rtol=1e-6, atol=0)
    expected = torch.tensor([[3.0, 4.0]]) * length / 5
    assert_close(net.weight.grad, expected, rtol=1e-5, atol=0)  # clipping adds 1e-6 to the norm


def test_the_mean_over_the_batch_is_minimized():
    net = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[1.0], [2.0], [6.0]])
    (record,) = run(TrainState(net, config(steps=1)), lambda net: net, lambda k: x)
    assert_close(record.grad_norm, torch.tensor(3.0))


# Mixed precision


def test_fp16_clips_and_reports_the_true_gradient():
    """The gradient, (3, 4) / 640, comes 65,536 times as long; clipping must not see that."""
    net = nn.Linear(2, 1, bias=False)
    state = TrainState(net, config(steps=1, grad_clip=0.5 / 640, precision="fp16"))
    assert state.scaler.get_scale() == 65536
    x = torch.tensor([[3.0, 4.0]])
    (record,) = run(state, lambda net: lambda x: net(x).float() / 640, lambda k: x)
    assert_close(640 * record.grad_norm, torch.tensor(5.0), rtol=2e-3, atol=0)
    assert_close(640 * net.weight.grad, torch.tensor([[0.3, 0.4]]), rtol=3e-3, atol=0)


def test_fp16_skips_an_update_that_overflows_and_lowers_the_scale():
    net = nn.Linear(1, 1, bias=False)
    state = TrainState(net, config(steps=2, precision="fp16"))
    before = net.weight.detach().clone()
    updates = train(state, net, lambda k: torch.tensor([[60000.0 if k == 0 else 1.0]]))
    record = next(updates)  # 60000 * 65536 is beyond fp16
    assert not record.grad_norm.isfinite()
    assert_close(net.weight.detach(), before, rtol=0, atol=0)
    assert state.scaler.get_scale() == 32768
    next(updates)
    assert (net.weight.detach() - before).abs() > 0.05
    assert net.weight.isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_is_that_of_the_arithmetic_and_weights_stay_fp32(precision):
    dtypes = []

    def loss(net):
        def seen(batch):
            dtypes.append(net(batch[0]).dtype)
            return fit(net)(batch)

        return seen

    state = TrainState(line(), config(steps=100, learning_rate=0.05, precision=precision))
    records = run(state, loss)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(dtypes) == {dtype}
    assert {p.dtype for p in state.net.parameters()} == {torch.float32}
    assert records[-1].loss < 0.05 * records[0].loss


# The moving average


def test_the_average_is_the_recursion():
    state = TrainState(line(), config(steps=8, ema_decay=0.75))
    by_hand = None
    for _ in train(state, fit(state.net), points):
        weight = state.net.weight.detach().double()
        by_hand = weight if by_hand is None else 0.75 * by_hand + 0.25 * weight
        assert_close(state.ema.module.weight.double(), by_hand, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in state.ema.parameters())


def test_buffers_are_copied_not_averaged():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    state = TrainState(net, config(steps=5))
    run(state)
    counted, mean = net[1].num_batches_tracked, net[1].running_mean
    assert counted == 5
    assert state.ema.module[1].num_batches_tracked.dtype == torch.int64
    assert_close(state.ema.module[1].num_batches_tracked, counted)
    assert_close(state.ema.module[1].running_mean, mean, rtol=0, atol=0)


# Step k is a function of (seed, k)


def noisy(net):
    """Dropout on the inputs, and noise on the answers: both from torch's global generator."""

    def loss(batch):
        x = nn.functional.dropout(batch[0], 0.5, training=net.training)
        return (net(x) - batch[1] - torch.randn(8, 1)).square().flatten(1).mean(1)

    return loss


@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_taken_up_again_repeats_the_whole_run(stop):
    whole = TrainState(line(), config(steps=10))
    losses = [record.loss for record in run(whole, noisy)]
    part = TrainState(line(), config(steps=10))
    for record in train(part, noisy(part.net), points):
        torch.randn(record.step)  # what the caller draws in between changes nothing
        if record.step == stop:
            break
    torch.manual_seed(123)
    part.net.eval()  # as a caller may who draws samples on the way
    again = run(part, noisy)
    assert [record.step for record in again] == list(range(stop + 1, 11))
    assert_close([record.loss for record in again], losses[stop:], rtol=0, atol=0)
    assert_close(part.net.weight, whole.net.weight, rtol=0, atol=0)
    assert_close(part.ema.module.weight, whole.ema.module.weight, rtol=0, atol=0)


def test_each_step_and_seed_draws_anew():
    draws = {}
    for seed in (0, 1):
        net, drawn = line(), []

        def loss(batch, net=net, drawn=drawn):
            drawn.append(torch.rand(()).item())
            return net(batch[0])

        list(train(TrainState(net, config(steps=4, seed=seed)), loss, points))
        draws[seed] = drawn
    assert len({*draws[0], *draws[1]}) == 8


def test_dropout_is_back_on_after_the_caller_evaluates():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    state = TrainState(net, config(steps=3))
    modes = []

    def loss(batch):
        modes.append(net.training)
        return fit(net)(batch)

    for _ in train(state, loss, points):
        net.eval()
    assert modes == [True, True, True]


def test_train_is_lazy_and_a_finished_state_is_left_alone():
    state = TrainState(line(), config(steps=2))
    before = copy.deepcopy(state.net.state_dict())
    updates = train(state, fit(state.net), points)
    assert state.step == 0
    assert_close(dict(state.net.state_dict()), dict(before), rtol=0, atol=0)
    assert [record.step for record in updates] == [1, 2]
    assert run(state) == []


def test_any_object_with_the_fields_is_a_config():
    fields = config(steps=1)
    loose = SimpleNamespace(**{name: getattr(fields, name) for name in fields.__dict__})
    assert len(run(TrainState(line(), loose))) == 1


# It works


def test_linear_regression_finds_the_line():
    state = TrainState(line(), config(steps=300, learning_rate=0.1, cooldown=150))
    run(state)
    # Noiseless data: only Adam's last, shrinking steps are left
    assert_close(state.net.weight, torch.tensor([[1.0, -2.0, 0.5]]), rtol=0, atol=2e-3)
    assert_close(state.net.bias, torch.tensor([0.3]), rtol=0, atol=2e-3)


def test_the_loss_falls_on_a_toy():
    """A single point: what noised it can be read off x_t exactly, so that the best loss is 0."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP(width=64), cosine(100), "v")
    state = TrainState(denoiser.net, config(steps=100, learning_rate=3e-3))
    point = torch.tensor([[1.0, -1.0]]).expand(128, 2)
    losses = [r.loss for r in train(state, lambda x: simple_loss(denoiser, x), lambda k: point)]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
