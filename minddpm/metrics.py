"""How far samples are from data, and whether they are copies of it; bits per dimension."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minddpm.data import Images, check_labels, replacing, to_model
from minddpm.likelihood import ode_bits, vlb_terms


def frechet(
    real: Tensor, fake: Tensor, features: nn.Module | int, batch: int = 250, device: str = "cpu"
) -> float:
    """The Fréchet distance of two sets of images, (N, C, H, W) uint8 each, in some features.

    features: a module (B, C, H, W) uint8 -> (B, D), used where it is; or 2048 for the numbers that
    the reference Inception pools before its last layer; it is downloaded and put on `device`: then
    it is the FID. To compare many sets with one, `extract` its features once and use
    `frechet_distance`.
    Raises ValueError with fewer than two images, or of different shapes.
    """
    check_pair(real, fake)
    net = inception(features, device) if isinstance(features, int) else features
    return frechet_distance(extract(real, net, batch), extract(fake, net, batch))


@torch.no_grad()
def extract(images: Tensor, net: nn.Module, batch: int = 250) -> Tensor:
    """The features (N, D), on the CPU, that a network finds in images (N, C, H, W) uint8."""
    device = next((p.device for p in net.parameters()), "cpu")
    return torch.cat([net(part.contiguous().to(device)).cpu() for part in images.split(batch)])


def inception(output: int | str = 2048, device: str = "cpu") -> nn.Module:
    """The reference Inception, downloaded, as a module (B, 1 or 3, H, W) uint8 -> (B, D).

    output: 2048, the features of the FID, or "logits_unbiased", those of the Inception score.
    Images are enlarged as TensorFlow 1 did it, as for the numbers in papers.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception-v3-compat", [str(output)]).to(device)
    net.register_forward_pre_hook(lambda _, args: three_channels(args[0]))
    net.register_forward_hook(lambda _, args, found: found[0])
    return net


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to features (N, D) and (M, D)."""
    check_features(x, y)
    x, y = x.double(), y.double()
    (mean, cov), (mean_y, cov_y) = ((z.mean(0), torch.atleast_2d(z.T.cov())) for z in (x, y))
    values, axes = torch.linalg.eigh(cov)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    overlap = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((mean - mean_y).square().sum() + cov.trace() + cov_y.trace() - 2 * overlap).item()


def frechet_extrapolated(
    x: Tensor, y: Tensor, points: int = 15, seed: int = 0
) -> tuple[float, float]:
    """(limit, slope) of the line through the distances of x (N, D) to n of y (M, D), in 1 / n.

    For n at even distances from M / 10 to M, each a fresh draw from y. Chong and Forsyth's
    FID-infinity: the limit removes the bias of y's finite number, not that of x's.
    """
    if points < 2:
        raise ValueError(f"a line needs 2 points or more, got {points}")
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(len(y) / 10, len(y), points).round().int().tolist()
    if sizes[0] < 2:
        raise ValueError(f"expected 20 features or more to extrapolate from, got {len(y)}")
    draws = [y[torch.randperm(len(y), generator=generator)[:n]] for n in sizes]
    values = [frechet_distance(x, draw) for draw in draws]
    slope, limit = np.polyfit(1 / np.array(sizes), values, 1)
    return float(limit), float(slope)


def nearest(x: Tensor, y: Tensor, k: int = 1, skip: int = 0, batch: int = 500) -> Tensor:
    """Distance of each x (N, D) to its k-th nearest y (M, D), (N,); skip=1 if y is x itself."""
    check_features(x, y, least=1)
    if not 1 <= k <= len(y) - skip:
        raise ValueError(f"k must lie in 1..{len(y) - skip}, the neighbours there are, got {k}")
    y = y.double()
    parts = (distances(part, y).kthvalue(k + skip, 1).values for part in x.double().split(batch))
    return torch.cat(list(parts))


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, batch: int = 500
) -> tuple[float, float]:
    """(precision, recall): shares of fake (M, D) in real's balls, of real (N, D) in fake's.

    The ball of a point reaches to its k-th nearest neighbour in its own set.
    """
    check_features(real, fake)
    found = []
    for centres, points in ((real, fake), (fake, real)):
        radius, c = nearest(centres, centres, k, skip=1, batch=batch), centres.double()
        inside = [(distances(p, c) <= radius).any(1) for p in points.double().split(batch)]
        found.append(torch.cat(inside).double().mean().item())
    return tuple(found)


def density_coverage(
    real: Tensor, fake: Tensor, k: int = 5, batch: int = 500
) -> tuple[float, float]:
    """(density, coverage): mean number of real's balls around a fake, over k; share of balls hit.

    real: (N, D), fake: (M, D). If both have one law, the expected density is 1 and the expected
    coverage 1 - (N - 1) ... (N - k) / ((N + M - 1) ... (N + M - k)), about 1 - 2**-k at N = M.
    """
    check_features(real, fake, least=1)
    radius, y, count, hit = nearest(real, real, k, skip=1, batch=batch), fake.double(), 0, []
    for part, r in zip(real.double().split(batch), radius.split(batch)):
        inside = distances(part, y) <= r[:, None]
        count += inside.sum().item()
        hit.append(inside.any(1))
    return count / (k * len(fake)), torch.cat(hit).double().mean().item()


def copying(train: Tensor, held_out: Tensor, fake: Tensor) -> tuple[float, float]:
    """(share, z): is fake (M, D) nearer to train (N, D) than held_out (H, D) is? A test for copies.

    share: how often, of one fake and one held-out point, the fake lies nearer to its nearest of
    train (ties count half). z: its distance from 1/2 in standard deviations, for M and H points of
    one law; far above 0 for copies, far below 0 for samples too far off.
    """
    ours, theirs = nearest(fake, train), nearest(held_out, train)
    ordered = theirs.sort().values
    further = len(theirs) - torch.searchsorted(ordered, ours, right=True)
    ties = torch.searchsorted(ordered, ours, right=True) - torch.searchsorted(ordered, ours)
    share = ((further + ties / 2).mean() / len(theirs)).item()
    m, h = len(ours), len(theirs)
    return share, (share - 0.5) / ((m + h + 1) / (12 * m * h)) ** 0.5


def check_kind(kind: str, train: Images, root: str, device: str) -> None:
    """Raises ValueError or OSError where `report` could not be made of these images, or here."""
    if kind == "classifier":
        untrained(train)
        Path(root).mkdir(parents=True, exist_ok=True)
        return
    try:
        inception(2048, device)
    except (ImportError, OSError) as error:
        raise ValueError(
            "an FID needs torch-fidelity (pip install torch-fidelity) and, once, its weights from "
            f"the network ({error}): take --features classifier to do without"
        ) from error


def report(kind: str, train: Images, fake: Tensor, root: str, device: str) -> list[str]:
    """What `minddpm evaluate` says of samples (N, C, H, W): the figures, and how they were made."""
    if kind == "inception":
        fid = frechet(train.pixels, fake, 2048, device=device)
        score, spread = inception_score(fake, device=device)
        return [
            f"FID {fid:.2f}, Inception score {score:.2f} +- {spread:.2f}",
            "(torch-fidelity's Inception; comparable only for 50,000 samples)",
        ]
    net = classifier(train, root, device)
    x, y = extract(train.pixels, net), extract(fake, net)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    floor = frechet_distance(*(x[half] for half in order.chunk(2)))
    return [
        f"Fréchet distance {frechet_distance(x, y):.4f} (real against real {floor:.4f})",
        f"(no FID: features of a small classifier, right on {accuracy(net, train):.1%} of these)",
    ]


def inception_score(fake: Tensor, batch: int = 250, device: str = "cpu") -> tuple[float, float]:
    """(mean, deviation) of the Inception score over ten parts; the Inception is downloaded."""
    return score_of(extract(fake, inception("logits_unbiased", device), batch))


def score_of(log_odds: Tensor, parts: int = 10, seed: int = 0) -> tuple[float, float]:
    """(mean, deviation) over parts of exp of the mutual information of image and class.

    log_odds: (N, classes), unnormalized, of N images that are dealt out to the parts at random.
    """
    order = torch.randperm(len(log_odds), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in log_odds[order].double().log_softmax(1).chunk(parts):
        marginal = part.exp().mean(0).clamp(min=1e-300).log()
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    spread = torch.stack(scores).std().item() if len(scores) > 1 else 0.0
    return torch.stack(scores).mean().item(), spread


def bits(
    denoiser, images: Tensor, grid: list[int] | None = None, batch: int = 50, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard error) of the bits per dimension of images (N, C, H, W) uint8, from above.

    By the bound, each of its T + 1 terms computed for every image, T network calls in all; or,
    given a grid from T to 1, by the probability-flow ODE on it, in two calls a step.
    """
    device, totals = next(denoiser.net.parameters()).device, []
    generator = torch.Generator("cpu" if grid else device).manual_seed(seed)
    for part in images.split(batch):
        x0 = to_model(part.to(device))
        if grid:
            totals.append(ode_bits(denoiser, x0, grid, generator=generator).cpu())
        else:
            totals.append(vlb_terms(denoiser, x0, generator=generator).sum(1).cpu())
    total = torch.cat(totals).double()
    return total.mean().item(), (total.std() / len(total) ** 0.5).item()


class Classifier(nn.Module):
    """A small network (B, C, H, W) uint8 -> (B, 256) features; `classify` gives log odds.

    It measures progress where the Inception cannot be downloaded; a distance in its features is
    not an FID, and compares only with distances in the same weights' features.
    """

    num_features = 256

    def __init__(self, channels: int = 3, classes: int = 10):
        super().__init__()
        widths = [channels, 64, 64, 128, 128, 256, 256]
        layers = []
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)]
            layers += [nn.ReLU()] + [nn.MaxPool2d(2)] * (i in (1, 3))
        self.body, self.head = nn.Sequential(*layers), nn.Linear(256, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(to_model(pixels)).mean((2, 3))

    def classify(self, pixels: Tensor) -> Tensor:
        """The unnormalized log odds of the classes, (B, classes)."""
        return self.head(self(pixels))


def train_classifier(
    images: Images, steps: int = 4000, batch: int = 256, device: str = "cpu", seed: int = 0
) -> Classifier:
    """A Classifier fitted to labelled images, shifted and (in colour) mirrored at random."""
    torch.manual_seed(seed)
    net = untrained(images).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    pixels, labels = images.pixels.to(device), images.labels.to(device)
    rng, size = np.random.default_rng(seed), images.pixels.shape[3]
    edge, colour = size // 8, images.pixels.shape[1] == 3
    for _ in range(steps):
        chosen = torch.from_numpy(rng.integers(len(pixels), size=batch)).to(device)
        top, left = rng.integers(2 * edge + 1, size=2)
        x = F.pad(pixels[chosen], (edge,) * 4)[..., top : top + size, left : left + size]
        x = x.flip(3) if colour and rng.random() < 0.5 else x
        loss = F.cross_entropy(net.classify(x), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.eval().requires_grad_(False)


def untrained(images: Images) -> Classifier:
    """A Classifier of the shape that labelled images ask for."""
    if images.labels is None:
        raise ValueError("a classifier needs labels: these images have none")
    check_labels(images.labels, classes := images.labels.max().item() + 1)
    return Classifier(images.pixels.shape[1], classes)


def classifier(images: Images, root: str, device: str, **options) -> Classifier:
    """The classifier of these images, from `root` where it was trained on them before."""
    net = untrained(images)
    content = hashlib.blake2b(images.pixels.contiguous().numpy(), digest_size=8)
    content.update(images.labels.contiguous().numpy())
    file = Path(root) / f"classifier-{content.hexdigest()}.safetensors"
    if not file.exists():
        net = train_classifier(images, device=device, **options)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            save_file({k: x.cpu().contiguous() for k, x in net.state_dict().items()}, part)
    net.load_state_dict(load_file(file))
    return net.eval().requires_grad_(False).to(device)


@torch.no_grad()
def accuracy(net: Classifier, images: Images, batch: int = 500) -> float:
    """The share of the images whose class the network names."""
    device = net.head.weight.device
    parts = zip(images.pixels.split(batch), images.labels.split(batch))
    hits = [(net.classify(x.to(device)).argmax(1).cpu() == y).sum() for x, y in parts]
    return sum(hits).item() / len(images.pixels)


def three_channels(pixels: Tensor) -> Tensor:
    """Grey images as colour images, which are left as they are."""
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (N, M), exact where points coincide."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def check_features(x: Tensor, y: Tensor, least: int = 2) -> None:
    """Raises ValueError unless both are features (N, D) of so many points or more, of one D."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(
            f"expected features (N, D) and (M, D) of {least} or more points each, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features hold NaN or infinity: look at the images, or at the network")


def check_pair(real: Tensor, fake: Tensor) -> None:
    """Raises ValueError unless both are (N, C, H, W) uint8, of one size, with N >= 2."""
    for images in (real, fake):
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2:
            raise ValueError(
                "expected two or more images (N, C, H, W) uint8, got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            f"images of shapes {tuple(real.shape[1:])} and {tuple(fake.shape[1:])} do not compare"
        )
