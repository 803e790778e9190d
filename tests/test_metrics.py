"""Distances between sets of images, against closed forms and scipy; the evaluate command."""

import re
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torch.testing import assert_close

from minddpm import checkpoint, data, metrics
from minddpm.cli import main
from minddpm.likelihood import vlb_terms
from minddpm.oracle import finite
from minddpm.schedule import cosine


class Pixels(nn.Module):
    """The first six pixels of an image, as they are."""

    num_features = 6

    def forward(self, pixels):
        return pixels.flatten(1)[:, :6].float()


def images(n, seed=0, low=0, high=256, channels=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, channels, 8, 8), generator=generator, dtype=torch.uint8)


def test_frechet_is_the_formula():
    a, b = images(400), images(300, 1, 50, 200)
    x, y = (Pixels()(z).double().numpy() for z in (a, b))
    c, d = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert_close(metrics.frechet(a, b, Pixels(), batch=77), expected, rtol=1e-4, atol=1e-4)
    assert abs(metrics.frechet(a, a, Pixels())) < 1e-3
    assert metrics.frechet(a, b, Pixels()) > 100


def points(n, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def test_frechet_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = images(400), images(300, 1, 50, 200)
    metric = FrechetInceptionDistance(Pixels(), input_img_size=(1, 8, 8))
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert_close(metrics.frechet(a, b, Pixels()), metric.compute().item(), rtol=1e-4, atol=0)


def test_frechet_distance_of_one_feature_and_of_fewer_points_than_features():
    x, y = points(50, 1), 2 * points(40, 1, 1) + 3
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert_close(metrics.frechet_distance(x, y), expected.item())
    few, many = points(5, 20), points(8, 20, 1)
    there, back = metrics.frechet_distance(few, many), metrics.frechet_distance(many, few)
    assert_close(there, back, rtol=1e-6, atol=1e-6)
    assert there > 0 and abs(metrics.frechet_distance(few, few)) < 1e-5


def test_extrapolation_removes_the_bias():
    x = points(4000, 6)
    pools = [metrics.frechet_extrapolated(x, points(400, 6, s), seed=s) for s in range(1, 31)]
    limit, slope = np.mean(pools, 0)
    plain = np.mean([metrics.frechet_distance(x, points(400, 6, s)) for s in range(1, 31)])
    assert plain > 0.03 and abs(limit) < 0.008  # the rest is x's own bias, 16.5 / 4000
    assert abs(slope / 16.5 - 1) < 0.2  # D (D + 5) / 4
    with pytest.raises(ValueError, match="20 features or more"):
        metrics.frechet_extrapolated(x, points(9, 6))


def test_balls_by_brute_force():
    real, fake = points(60), points(45, seed=1) * 1.5
    for k in (1, 3):
        inside = {}
        for name, centres, others in (("real", real, fake), ("fake", fake, real)):
            radii = [sorted((c - d).norm().item() for d in centres)[k] for c in centres]
            inside[name] = np.array(
                [[(c - p).norm().item() <= r for c, r in zip(centres, radii)] for p in others]
            )
        expected = inside["real"].any(1).mean(), inside["fake"].any(1).mean()
        assert metrics.precision_recall(real, fake, k, batch=7) == pytest.approx(expected)
        expected = inside["real"].sum() / (k * 45), inside["real"].any(0).mean()
        assert metrics.density_coverage(real, fake, k, batch=7) == pytest.approx(expected)


def test_a_ball_has_its_edge():
    real, fake = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[4.0], [9]])
    assert metrics.precision_recall(real, fake, 1) == (
        0.5,
        1,
    )  # 4 lies on the edge of 3's ball; 4's own reaches from -1 to 9
    assert metrics.density_coverage(real, fake, 1) == (0.5, 0.25)


def test_density_and_coverage_of_one_law_are_as_predicted():
    n, m, k = 60, 40, 3
    pairs = [(points(n, 2, s), points(m, 2, 1000 + s)) for s in range(300)]
    density, coverage = np.mean([metrics.density_coverage(a, b, k) for a, b in pairs], 0)
    missed = np.prod([(n - j) / (n + m - j) for j in range(1, k + 1)])
    assert abs(density - 1) < 0.02 and abs(coverage - (1 - missed)) < 0.01


def test_copies_are_found_and_fresh_points_are_not():
    from scipy.stats import mannwhitneyu

    train, held_out, fresh = points(300), points(80, seed=1), points(120, seed=2)
    share, z = metrics.copying(train, held_out, fresh)
    ours, theirs = (metrics.nearest(x, train) for x in (fresh, held_out))
    u = mannwhitneyu(theirs, ours)
    assert_close(share, u.statistic / (80 * 120))
    assert_close(z, (share - 0.5) / (201 / (12 * 80 * 120)) ** 0.5)
    assert abs(z) < 2
    share, z = metrics.copying(train, held_out, train[:120])
    assert share == 1 and z > 10
    assert metrics.copying(train, held_out, held_out) == (0.5, 0)
    assert metrics.copying(train, held_out, 9 + fresh)[1] < -10


def test_nearest_by_brute_force():
    x, y = points(20), points(30, seed=1)
    table = torch.cdist(x, y).sort(1).values
    for k in (1, 4):
        assert_close(metrics.nearest(x, y, k, batch=6), table[:, k - 1])
    assert_close(metrics.nearest(y, y, 2, skip=1), torch.cdist(y, y).sort(1).values[:, 2])
    with pytest.raises(ValueError, match=r"k must lie in 1..29"):
        metrics.nearest(y, y, 30, skip=1)
    with pytest.raises(ValueError, match=r"got shapes \(20, 3\) and \(30, 2\)"):
        metrics.nearest(x, y[:, :2])


def test_score_is_that_of_torchmetrics_and_at_most_the_number_of_classes():
    from torchmetrics.image.inception import InceptionScore

    log_odds = 3 * points(200, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = InceptionScore(nn.Identity(), splits=1)
        metric.update(log_odds)
        theirs = metric.compute()[0].item()
    assert_close(metrics.score_of(log_odds, 1)[0], theirs, rtol=1e-6, atol=0)
    sure = 1e4 * torch.eye(10).repeat(100, 1)
    mean, spread = metrics.score_of(sure, 2)
    assert 9.7 < mean <= 10 and spread < 0.2
    assert_close(metrics.score_of(sure[:1].repeat(50, 1))[0], 1.0)


def test_grey_images_are_measured_as_colour_images():
    grey = images(50)
    colour = grey.expand(-1, 3, -1, -1)
    a = metrics.frechet(grey, images(50, 1), Pixels())
    b = metrics.frechet(colour, images(50, 1).expand(-1, 3, -1, -1), Pixels())
    assert a == b


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (images(5), images(1), r"two or more images .* got torch.uint8 of shape \(1, 1, 8, 8\)"),
        (images(5), images(5).float(), "uint8, got torch.float32"),
        (images(5), images(5, channels=3), r"shapes \(1, 8, 8\) and \(3, 8, 8\) do not compare"),
    ],
)
def test_sets_that_do_not_compare_are_refused(real, fake, message):
    with pytest.raises(ValueError, match=message):
        metrics.frechet(real, fake, Pixels())


def test_bits_are_the_sum_of_the_bound_and_their_error_is_its_deviation():
    digits = data.load("digits")
    denoiser = finite(data.to_model(digits.pixels)).denoiser(cosine(20), "eps", "large")
    denoiser.net = Callable(denoiser.net)
    mean, error = metrics.bits(denoiser, digits.pixels[:40], batch=40, seed=3)
    x0 = data.to_model(digits.pixels[:40])
    total = vlb_terms(denoiser, x0, generator=torch.Generator().manual_seed(3)).sum(1)
    assert_close(mean, total.mean().item(), rtol=1e-6, atol=0)
    assert_close(error, (total.std() / 40**0.5).item(), rtol=1e-5, atol=0)
    again, _ = metrics.bits(denoiser, digits.pixels[:40], batch=7)
    assert abs(again - mean) < 4 * error


class Callable(nn.Module):
    """A function as a module with a weight, as a network has."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return self.function(x, t)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    digits = data.load("digits")
    metrics.classifier(digits, str(root), "cpu", steps=150, batch=64)
    return root


def test_classifier_learns_and_is_kept(judge):
    digits, test = data.load("digits"), data.load("digits", "test")
    net = metrics.classifier(digits, str(judge), "cpu")  # from its file, not trained
    assert metrics.accuracy(net, test) > 0.8
    assert net(digits.pixels[:3]).shape == (3, 256) and not net.training
    with pytest.raises(ValueError, match="needs labels"):
        metrics.train_classifier(data.Images(digits.pixels, None))
    # Other images, or other labels, are another classifier's.
    few = data.Images(digits.pixels[::2], digits.labels[::2] + 5)
    for other in (few, data.Images(few.pixels, few.labels - 5)):
        metrics.classifier(other, str(judge), "cpu", steps=2, batch=8)
    assert metrics.classifier(few, str(judge), "cpu").classify(digits.pixels[:3]).shape == (3, 15)
    assert len(list(judge.iterdir())) == 3


def test_its_distance_tells_digits_from_noise_and_from_one_digit(judge):
    digits = data.load("digits")
    net = metrics.classifier(digits, str(judge), "cpu")
    one, other = digits.pixels[::2], digits.pixels[1::2]
    floor = metrics.frechet(one, other, net)
    noise = metrics.frechet(one, images(800, high=256), net)
    zeros = metrics.frechet(one, digits.pixels[digits.labels == 0], net)
    assert noise > 20 * floor and zeros > 20 * floor


def test_evaluate_prints_figures_and_protocol(judge, capsys):
    common = ["evaluate", "digits", "--data", "digits", "--device", "cpu", "--root", str(judge)]
    main([*common, "-n", "200", "--features", "classifier", "--steps", "10", "--eta", "0.5"])
    said = capsys.readouterr().out
    assert "200 samples of digits (ddim, 10 steps, uniform grid, eta 0.5, seed 0)" in said
    assert "against the 1,438 training images of digits:" in said
    distance, floor = map(
        float, re.search(r"Fréchet distance ([\d.]+) \(real against real ([\d.]+)\)", said).groups()
    )
    assert 0 < floor < distance


def test_evaluate_prints_an_fid_where_the_inception_is_there(judge, capsys, monkeypatch):
    """The Inception itself is a download; here another network stands in its place."""
    asked = []

    def stand_in(output, device):
        asked.append((output, device))
        return Pixels()

    monkeypatch.setattr(metrics, "inception", stand_in)
    # No GPU may be asked for where the user said cpu.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    main(["evaluate", "digits", "--data", "digits", "-n", "50", "--steps", "5", "--device", "cpu"])
    said = capsys.readouterr().out
    assert re.search(r"FID \d+\.\d\d, Inception score \d+\.\d\d \+- \d+\.\d\d", said)
    assert asked == [(2048, "cpu"), (2048, "cpu"), ("logits_unbiased", "cpu")]


def test_inception_is_torch_fidelitys_for_grey_and_colour_images(monkeypatch):
    """With random weights, since the real ones are a download."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *args: None)
        net = metrics.inception(2048)
        theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False)
        theirs.__dict__["_modules"] = net._modules  # the same random weights
    grey = images(2)
    found = metrics.extract(grey, net)
    assert found.shape == (2, 2048) and not net.training
    assert torch.equal(found, metrics.extract(grey.expand(-1, 3, -1, -1), net))
    assert_close(found, theirs(grey.expand(-1, 3, -1, -1)))


def test_evaluate_bounds_the_bits_of_held_out_images(capsys, monkeypatch):
    asked = []

    def bits(denoiser, test, grid):
        asked.append(grid)
        return 4.321, len(test) / 1000

    monkeypatch.setattr(metrics, "bits", bits)
    main(["evaluate", "digits", "--data", "digits", "-n", "0", "--bits", "30", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "at most, of 30 test images of digits:\n4.321" in said
    assert "4.321 +- 0.030 by the variational bound\n4.321 +- 0.030 by the probability" in said
    assert asked[0] is None and (asked[1][0], asked[1][-1], len(asked[1])) == (1000, 1, 100)


def test_evaluate_says_what_the_model_has_seen_and_leaves_out_a_flow_without_beginning(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(metrics, "bits", lambda denoiser, test, grid: (4.0, 0.1))
    flags = "--width 8 --multipliers 1 --blocks 1 --attention --T 10 --batch-size 8 --device cpu"
    flags += " --warmup 0 --cooldown 0 --schedule straight --predicts velocity --steps 2"
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", images=data.load("digits").pixels[:9, 0].numpy())
    cases = [("digits", "all", True), ("digits", "train", False), ("a.npz", "train", True)]
    for source, split, seen in cases:
        out = f"{source}-{split}"
        train = ["train", "digits", "--out", out, "--data", source, "--split", split]
        main([*train, *flags.split()])
        capsys.readouterr()
        named = source if source == "digits" else "./a.npz"
        main(["evaluate", out, "--data", named, "-n", "0", "--bits", "4", "--device", "cpu"])
        said = capsys.readouterr().out
        assert ("the model was trained on them" in said) == seen
        assert "by the variational bound" in said and "probability flow" not in said


def test_bits_by_the_flow_are_those_of_its_density():
    from minddpm.likelihood import ode_bits

    digits = data.load("digits", "test").pixels[:6]
    denoiser, grid = checkpoint.load("digits"), [1000, 800, 400, 100, 10, 1]
    mean, _ = metrics.bits(denoiser, digits, grid, batch=6, seed=2)
    rng = torch.Generator().manual_seed(2)
    assert_close(mean, ode_bits(denoiser, data.to_model(digits), grid, generator=rng).mean().item())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-n 0", "ask for two or more samples"),
        ("-n 1", "ask for two or more samples"),
        ("-n 5 --bits -1", "ask for two or more samples"),
        ("-n 5 --steps 0", "the number of steps must lie in 1..T"),
        ("-n 0 --bits 1", "bits of two or more images"),
        ("-n 5 --data nothing", "no data set or file 'nothing'"),
        ("-n 0 --bits 2 --data one.npz", "bits need two images or more, and one.npz holds 1"),
        ("-n 5 --features classifier --root one.npz", "one.npz"),
        ("-n 5 --data wide.npz", r"of shape \(1, 8, 8\), and those of wide.npz have \(1, 4, 4\)"),
        ("-n 5 --data bare.npz --features classifier", "a classifier needs labels"),
        ("-n 5 --data odd.npz --features classifier", "the labels must lie in 0"),
        ("-n 5 --data bare.npz", "an FID needs torch-fidelity .*: take --features classifier"),
    ],
)
def test_evaluation_that_cannot_be_gets_one_line_before_the_work(
    flags, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minddpm.generate.samples", lambda *args, **options: 1 / 0)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    np.savez("wide.npz", images=np.zeros((4, 4, 4), np.uint8))
    np.savez("one.npz", images=np.zeros((1, 8, 8), np.uint8))
    np.savez("bare.npz", images=np.zeros((4, 8, 8), np.uint8))
    np.savez("odd.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) - 1)
    command = ["evaluate", "digits", "--data", "digits", "--device", "cpu", *flags.split()]
    with pytest.raises(SystemExit, match=message) as caught:
        main(command)
    assert "\n" not in str(caught.value)


def test_shipped_digits_are_nearer_to_digits_than_half_trained_ones_would_be(judge):
    """The distance falls as samples get better: 2 steps, 5 steps, 50 steps."""
    from minddpm import generate
    from minddpm.samplers import ddim, uniform_grid

    digits, denoiser = data.load("digits"), checkpoint.load("digits")
    net = metrics.classifier(digits, str(judge), "cpu")
    fakes = [generate.samples(denoiser, 400, uniform_grid(1000, k), ddim) for k in (1, 3, 25)]
    distances = [metrics.frechet(digits.pixels, fake, net) for fake in fakes]
    assert distances[0] > 2 * distances[1] > 2 * distances[2]


def test_features_that_cannot_be_compared_get_one_line():
    real = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    broken = torch.where(torch.arange(20)[:, None] < 9, torch.nan, real)
    for measure in (metrics.precision_recall, metrics.density_coverage, metrics.frechet_distance):
        with pytest.raises(ValueError, match="features hold NaN or infinity"):
            measure(real, broken)
        for other in (real[:0], real[:, :2], real[:, 0]):
            with pytest.raises(ValueError, match="expected features"):
                measure(real, other)
    with pytest.raises(ValueError, match="a line needs 2 points"):
        metrics.frechet_extrapolated(real, real, points=1)
