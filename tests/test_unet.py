"""The U-Net, layer by layer, and as a whole against the published network in diffusers."""

import math

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.testing import assert_close

from minddpm.nets import UNet
from minddpm.nets.unet import Attention, Block, Downsample, ResBlock, Upsample, time_embedding

SMALL = dict(size=8, width=32, multipliers=(1, 2), blocks=1, attention=(4,))


def count(module):
    return sum(p.numel() for p in module.parameters())


def meta(**config):
    with torch.device("meta"):
        return UNet(**config)


def conv(c_in, c_out, kernel=3):
    return kernel**2 * c_in * c_out + c_out


def res(c_in, c_out, c_time=512):
    shortcut = 0 if c_in == c_out else conv(c_in, c_out, 1)
    return (
        2 * c_in
        + conv(c_in, c_out)
        + conv(c_time, c_out, 1)
        + 2 * c_out
        + conv(c_out, c_out)
        + shortcut
    )


def attention(c):
    return 2 * c + 4 * conv(c, c, 1)


# (kind, channels in, channels out, attention after it): DDPM's CIFAR-10 network, from its code.
DOWN = [
    *[("res", 128, 128, False), ("res", 128, 128, False), ("down", 128, 128, False)],
    *[("res", 128, 256, True), ("res", 256, 256, True), ("down", 256, 256, False)],
    *[("res", 256, 256, False), ("res", 256, 256, False), ("down", 256, 256, False)],
    *[("res", 256, 256, False), ("res", 256, 256, False)],
]
MIDDLE = [("res", 256, 256, True), ("res", 256, 256, False)]
UP = [
    *[("res", 512, 256, False)] * 3,
    ("up", 256, 256, False),
    *[("res", 512, 256, False)] * 3,
    ("up", 256, 256, False),
    *[("res", 512, 256, True), ("res", 512, 256, True), ("res", 384, 256, True)],
    ("up", 256, 256, False),
    *[("res", 384, 128, False), ("res", 256, 128, False), ("res", 256, 128, False)],
]


def test_every_layer_of_the_default_network():
    net = meta()
    for layers, expected in [(net.down, DOWN), (net.middle, MIDDLE), (net.up, UP)]:
        assert len(layers) == len(expected)
        for layer, (kind, c_in, c_out, attends) in zip(layers, expected):
            assert type(layer) is {"res": Block, "down": Downsample, "up": Upsample}[kind]
            size = res(c_in, c_out) if kind == "res" else conv(c_in, c_out)
            assert count(layer) == size + attends * attention(c_out)
            assert isinstance(getattr(layer, "attention", None), Attention) is attends
    assert count(net.embed) == conv(128, 512, 1) + conv(512, 512, 1)
    assert (count(net.first), count(net.last)) == (conv(3, 128), 256 + conv(128, 3))


def test_default_network_has_the_published_number_of_parameters():
    assert count(meta()) == 35_746_307
    # Attention once per level on the way up, as in another repository, would lack two of them:
    assert count(meta()) - 2 * attention(256) == 35_218_947


def test_256_pixel_network_of_the_paper_has_114_million_parameters():
    assert round(count(meta(size=256, multipliers=(1, 1, 2, 2, 4, 4))) / 1e6) == 114


def published():
    """The network of google/ddpm-cifar10-32."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()


def theirs_by_our_name(net):
    """{our layer's prefix: their module}."""
    pairs = {
        "embed.0": net.time_embedding.linear_1,
        "embed.2": net.time_embedding.linear_2,
        "first": net.conv_in,
        "last.0": net.conv_norm_out,
        "last.2": net.conv_out,
    }

    def add(prefix, block, attend=None):
        names = dict(
            norm1="norm1", conv1="conv1", time="time_emb_proj", norm2="norm2", conv2="conv2"
        )
        names |= dict(shortcut="conv_shortcut")
        pairs.update({f"{prefix}.res.{a}": getattr(block, b) for a, b in names.items()})
        if attend is not None:
            names = dict(norm="group_norm", query="to_q", key="to_k", value="to_v")
            pairs.update({f"{prefix}.attention.{a}": getattr(attend, b) for a, b in names.items()})
            pairs[f"{prefix}.attention.out"] = attend.to_out[0]

    for side, blocks in (("down", net.down_blocks), ("up", net.up_blocks)):
        i = 0
        for block in blocks:
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attend in zip(block.resnets, attentions):
                add(f"{side}.{i}", resnet, attend)
                i += 1
            for scaler in getattr(block, f"{side}samplers") or []:
                pairs[f"{side}.{i}.conv"] = scaler.conv
                i += 1
    add("middle.0", net.mid_block.resnets[0], net.mid_block.attentions[0])
    add("middle.1", net.mid_block.resnets[1])
    return {ours: module for ours, module in pairs.items() if module is not None}


def test_whole_network_computes_what_the_published_one_does():
    torch.manual_seed(0)
    theirs, ours = published(), UNet().eval()
    pairs, state = theirs_by_our_name(theirs), ours.state_dict()
    used = set()
    for prefix, module in pairs.items():
        for kind in ("weight", "bias"):
            weight = getattr(module, kind).detach()
            weight += 0.1 * torch.rand_like(weight).sub(0.5) * weight.std().nan_to_num(1).clamp(0.1)
            state[f"{prefix}.{kind}"] = weight.view(state[f"{prefix}.{kind}"].shape)
            used.add(f"{prefix}.{kind}")
    assert used == set(state)
    assert count(theirs) == count(ours)
    ours.load_state_dict(state)
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([1, 300, 1000])
    with torch.no_grad():
        expected = theirs(x, t - 1).sample
        assert expected.std() > 0.1
        assert_close(ours(x, t), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours(x, t - 1), expected, rtol=1e-3, atol=1e-3)


def test_classes_change_nothing_but_what_their_embedding_adds():
    nets = []
    for classes in (0, 10):
        torch.manual_seed(3)
        nets.append(UNet(**SMALL, classes=classes).eval())
    without, with_ = nets
    assert (without.classes, with_.classes) == (0, 10)
    states = without.state_dict(), with_.state_dict()
    assert states[1].keys() - states[0].keys() == {"labels.weight"}
    assert states[1].pop("labels.weight").shape == (11, 128)
    for name, x in states[0].items():
        assert torch.equal(states[1][name], x)
    nn.init.dirac_(without.last[2].weight)
    with_.load_state_dict(without.state_dict(), strict=False)
    for p in [*without.down.parameters()]:
        nn.init.constant_(p, 0.01)
    with_.load_state_dict(without.state_dict(), strict=False)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([1, 20, 300, 1000])
    labels = torch.tensor([0, 9, 10, 4])
    assert not torch.allclose(with_(x, t, labels), without(x, t))
    assert torch.equal(with_(x, t), with_(x, t, torch.full((4,), 10)))
    nn.init.zeros_(with_.labels.weight)
    assert torch.equal(with_(x, t, labels), without(x, t))


def test_network_with_classes_computes_what_the_published_kind_does():
    torch.manual_seed(0)
    kind = dict(sample_size=8, block_out_channels=(128, 128), layers_per_block=1)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    same = dict(attention_head_dim=None, norm_eps=1e-6, downsample_padding=0, freq_shift=1)
    theirs = UNet2DModel(
        **kind, **same, down_block_types=down, up_block_types=up, flip_sin_to_cos=False,
        num_class_embeds=6,
    ).eval()  # fmt: skip
    ours = UNet(size=8, multipliers=(1, 1), blocks=1, attention=(4,), classes=5).eval()
    pairs = theirs_by_our_name(theirs) | {"labels": theirs.class_embedding}
    state = ours.state_dict()
    for prefix, module in pairs.items():
        for name, weight in module.named_parameters(recurse=False):
            state[f"{prefix}.{name}"] = weight.detach().view(state[f"{prefix}.{name}"].shape)
    ours.load_state_dict(state)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([1, 300, 1000])
    with torch.no_grad():
        for labels in (torch.tensor([0, 4, 2]), torch.tensor([5, 5, 5])):
            expected = theirs(x, t - 1, labels).sample
            assert_close(ours(x, t, labels), expected, rtol=1e-5, atol=1e-5)
        assert_close(ours(x, t), expected, rtol=1e-5, atol=1e-5)  # 5 is "no class"
        assert not torch.allclose(ours(x, t, labels - 1), expected, rtol=1e-3, atol=1e-3)


def test_time_embedding_is_sines_then_cosines():
    dim, t = 12, [0, 1, 37, 999]
    frequency = [10_000 ** (-i / 5) for i in range(6)]  # half - 1 = 5 steps from 1 to 1e-4
    table = [[f(x * w) for f in (math.sin, math.cos) for w in frequency] for x in t]
    assert_close(time_embedding(torch.tensor(t), dim), torch.tensor(table), rtol=1e-4, atol=1e-4)


def test_untrained_network_and_its_branches_answer_zero():
    torch.manual_seed(0)
    net = UNet(**SMALL)
    x, time = torch.randn(2, 32, 4, 4), torch.randn(2, 128)
    assert (net(torch.randn(2, 3, 8, 8), torch.tensor([1, 9])) == 0).all()
    for block in net.modules():
        if isinstance(block, Attention):
            h = torch.randn(2, block.norm.num_channels, 4, 4)
            assert torch.equal(block(h), h)
    block = ResBlock(32, 32, 128, 0.1)
    assert torch.equal(block(x, time), x)
    zero = [
        name for name, p in net.named_parameters() if name.endswith("weight") and (p == 0).all()
    ]
    assert all(name.split(".")[-2] in ("conv2", "out", "2") for name in zero)


def test_other_layers_are_glorot_uniform():
    torch.manual_seed(0)
    net = UNet()
    for layer in (
        net.first,
        net.embed[0],
        net.down[3].res.conv1,
        net.down[3].res.shortcut,
        net.up[3].conv,
    ):
        fan_out, fan_in = layer.weight.shape[:2]
        area = math.prod(layer.weight.shape[2:])
        bound = math.sqrt(6 / ((fan_in + fan_out) * area))
        assert_close(layer.weight.abs().max().item(), bound, rtol=0.01, atol=0)
        assert_close(layer.weight.std().item(), bound / 3**0.5, rtol=0.03, atol=0)
        assert (layer.bias == 0).all()


def test_downsampling_pads_on_the_right_and_at_the_bottom():
    torch.manual_seed(0)
    layer, x = Downsample(2), torch.randn(1, 2, 6, 6)
    out, w = layer(x, None), layer.conv.weight
    for i in range(3):
        for j in range(3):
            window = torch.zeros(2, 3, 3)
            part = x[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            window[:, : part.shape[1], : part.shape[2]] = part
            assert_close(out[0, :, i, j], (w * window).sum((1, 2, 3)), rtol=1e-5, atol=1e-5)


def test_upsampling_repeats_pixels():
    layer, x = Upsample(2), torch.randn(1, 2, 3, 3)
    nn.init.dirac_(layer.conv.weight)
    assert torch.equal(layer(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("channels", [4, 8, 32, 64, 96, 128, 256, 384])
def test_the_time_that_a_block_adds_survives_its_norm(channels):
    """A group of one channel would take it away again, whatever it is."""
    torch.manual_seed(0)
    block, x = ResBlock(channels, channels, 16, 0.0), torch.randn(2, channels, 4, 4)
    groups = block.norm2.num_groups
    assert channels % groups == 0 and channels // groups >= 4
    assert groups == 32 or channels % 128
    nn.init.xavier_uniform_(block.conv2.weight)
    early, late = (block(x, k * torch.ones(2, 16)) for k in (1.0, -1.0))
    assert (early - late).abs().max() > 0.01


def test_attention_is_softmax_over_all_pixels():
    torch.manual_seed(0)
    layer, x = Attention(128), torch.randn(2, 128, 3, 3)
    nn.init.xavier_uniform_(layer.out.weight)
    h = nn.functional.group_norm(x, 32, eps=1e-6).flatten(2)
    q, k, v = (
        torch.einsum("oc,bcn->bon", f.weight[..., 0, 0], h)
        for f in (layer.query, layer.key, layer.value)
    )
    weights = (torch.einsum("bcn,bcm->bnm", q, k) / 128**0.5).softmax(2)
    mixed = torch.einsum("bnm,bcm->bcn", weights, v)
    expected = x + torch.einsum("oc,bcn->bon", layer.out.weight[..., 0, 0], mixed).view(x.shape)
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_acts_before_the_last_convolution_in_training_only():
    torch.manual_seed(0)
    block, x, time = ResBlock(32, 32, 16, dropout=1.0), torch.randn(2, 32, 4, 4), torch.zeros(2, 16)
    nn.init.dirac_(block.conv2.weight)
    nn.init.constant_(block.conv2.bias, 0.5)
    assert_close(block(x, time), x + 0.5, rtol=0, atol=0)
    assert not torch.allclose(block.eval()(x, time), x + 0.5)
    assert meta(dropout=0.3).up[0].res.dropout.p == 0.3 and meta().middle[0].res.dropout.p == 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_network_keeps_type_shape_and_layout(dtype):
    net = UNet(**SMALL, channels=1, out_channels=2).to(dtype).eval()
    nn.init.dirac_(net.last[2].weight)
    x, t = torch.randn(4, 8, 8, 1, dtype=dtype).permute(0, 3, 1, 2), torch.tensor([1, 2, 3, 1000])
    answer = net(x, t)
    assert (answer.shape, answer.dtype) == ((4, 2, 8, 8), dtype)
    assert_close(net(x.contiguous(), t), answer)
    assert net(x[:0], t[:0]).shape == (0, 2, 8, 8)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    loose = dict(rtol=0.1, atol=0.1) if dtype is torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
    assert_close(alone, answer, **loose)


def test_every_parameter_of_a_trained_network_receives_a_gradient():
    torch.manual_seed(0)
    net = UNet(**SMALL | dict(width=64))
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    net(torch.randn(2, 3, 8, 8), torch.tensor([3, 700])).square().mean().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or (p.grad == 0).all()]
    # A softmax over keys does not see a shift of all of them; in floating point it nearly does not.
    assert [name for name in without if not name.endswith("key.bias")] == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: UNet(size=20), "4 resolutions need a size divisible by 8, got 20"),
        (lambda: UNet(width=30), "width must be a multiple of 4, got 30"),
        (
            lambda: UNet(**SMALL)(torch.zeros(2, 1, 8, 8), torch.ones(2)),
            r"\(B, 3, 8, 8\), got \(2, 1",
        ),
        (lambda: UNet(**SMALL)(torch.zeros(2, 3, 16, 16), torch.ones(2)), r"got \(2, 3, 16, 16\)"),
        (lambda: UNet(**SMALL)(torch.zeros(3, 8, 8), torch.ones(3)), r"got \(3, 8, 8\)"),
        (
            lambda: UNet(**SMALL)(torch.zeros(2, 3, 8, 8), torch.ones(3)),
            r"shape \(2,\), .* got \(3,\)",
        ),
        (lambda: UNet(**SMALL)(torch.zeros(2, 3, 8, 8), torch.ones(2, 1)), r"got \(2, 1\)"),
        (lambda: UNet(**SMALL)(torch.zeros(2, 3, 8, 8), 5), r"shape \(2,\), .* got \(\)"),
        (
            lambda: UNet(**SMALL)(torch.zeros(2, 3, 8, 8), torch.ones(2), torch.zeros(2)),
            "built without classes: it takes no labels",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
