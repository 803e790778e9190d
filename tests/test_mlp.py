"""The MLP against its layers written out."""

import math

import pytest
import torch
from torch.testing import assert_close

from minddpm.losses import simple_loss
from minddpm.nets import MLP
from minddpm.prediction import Denoiser
from minddpm.schedule import linear


def silu(x):
    return x / (1 + (-x).exp())


def test_mlp_is_its_layers_written_out():
    torch.manual_seed(0)
    net, x, t = MLP(width=8, layers=2).double(), torch.randn(5, 2).double(), torch.arange(1, 6)
    w = net.state_dict()
    angle = [[(time - 1) * 10_000 ** (-i / 3) for i in range(4)] for time in t.tolist()]
    table = [[*map(math.sin, row), *map(math.cos, row)] for row in angle]
    time = torch.tensor(table).double() @ w["time.weight"].T + w["time.bias"]
    h = x @ w["first.weight"].T + w["first.bias"]
    for i in range(2):
        h = h + silu(h + time) @ w[f"layers.{i}.weight"].T + w[f"layers.{i}.bias"]
    expected = silu(h) @ w["last.weight"].T + w["last.bias"]
    assert_close(net(x, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim, out_dim, expected", [(2, None, 2), (3, 6, 6), (64, None, 64)])
def test_shapes_and_parameters(dim, out_dim, expected):
    net = MLP(dim, width=16, layers=4, out_dim=out_dim)
    assert net(torch.zeros(7, dim), torch.ones(7, dtype=int)).shape == (7, expected)
    count = (dim * 16 + 16) + 5 * (16 * 16 + 16) + (16 * expected + expected)
    assert sum(p.numel() for p in net.parameters()) == count


def test_mlp_learns_a_point():
    torch.manual_seed(0)
    denoiser, x0 = (
        Denoiser(MLP(width=32), linear(50), "x0"),
        torch.tensor([[0.6, -0.3]]).repeat(64, 1),
    )
    adam = torch.optim.Adam(denoiser.parameters(), 3e-3)
    for _ in range(150):
        loss = simple_loss(denoiser, x0).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 0.01 < simple_loss(Denoiser(MLP(width=32), linear(50), "x0"), x0).mean()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MLP(width=3), "width must be even and at least 4, got 3"),
        (lambda: MLP(width=129), "width must be even and at least 4, got 129"),
        (lambda: MLP()(torch.zeros(4, 3), torch.ones(4)), r"\(B, 2\), got \(4, 3\)"),
        (lambda: MLP()(torch.zeros(2), torch.ones(2)), r"\(B, 2\), got \(2,\)"),
        (lambda: MLP()(torch.zeros(4, 2), torch.ones(3)), r"shape \(4,\), .* got \(3,\)"),
        (lambda: MLP()(torch.zeros(4, 2), 3), r"shape \(4,\), .* got \(\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
