"""How far samples are from data: Fréchet distances, the Inception score, bits per dimension."""

import itertools
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minddpm.data import Images, to_model
from minddpm.likelihood import ode_bits, vlb_terms


def frechet(real: Tensor, fake: Tensor, features: nn.Module | int, batch: int = 250) -> float:
    """The Fréchet distance of two sets of images, (N, C, H, W) uint8 each, in some features.

    features: a module (B, C, H, W) uint8 -> (B, D), on the device where the work is to be done, or
    2048 for the last layer of the reference Inception, which is downloaded: then it is the FID.
    Raises ValueError with fewer than two images, or of different shapes.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_pair(real, fake)
    metric = FrechetInceptionDistance(features, input_img_size=tuple(real.shape[1:]))
    device = next((p.device for p in metric.inception.parameters()), torch.device("cpu"))
    metric = metric.to(best_device(device) if features == 2048 else device)
    as_read = three_channels if features == 2048 else torch.Tensor.contiguous
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(batch):
            metric.update(as_read(part).to(metric.device), real=is_real)
    return metric.compute().item()


def report(kind: str, train: Images, fake: Tensor, name: str, root: str, device: str) -> list[str]:
    """What `minddpm evaluate` says of samples (N, C, H, W): the figures, and how they were made."""
    if kind == "inception":
        fid, (score, spread) = frechet(train.pixels, fake, 2048), inception_score(fake)
        return [
            f"FID {fid:.2f}, Inception score {score:.2f} +- {spread:.2f}",
            "(torchmetrics, torch-fidelity's Inception; comparable only for 50,000 samples)",
        ]
    net = classifier(name, train, root, device)
    halves = torch.randperm(len(train.pixels), generator=torch.Generator().manual_seed(0)).chunk(2)
    floor = frechet(*(train.pixels[half] for half in halves), net)
    return [
        f"Fréchet distance {frechet(train.pixels, fake, net):.4f} (real against real {floor:.4f})",
        f"(no FID: features of a small classifier, right on {accuracy(net, train):.1%} of these)",
    ]


def inception_score(fake: Tensor, batch: int = 250) -> tuple[float, float]:
    """(mean, deviation) of the Inception score over ten parts; the Inception is downloaded."""
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore().to(best_device(torch.device("cpu")))
    for part in fake.split(batch):
        metric.update(three_channels(part).to(metric.device))
    return tuple(x.item() for x in metric.compute())


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
    """A small network (B, C, H, W) uint8 -> (B, 256) features; `classify` gives 10 log odds.

    It measures progress where the Inception cannot be downloaded; a distance in its features is
    not an FID, and compares only with distances in the same weights' features.
    """

    num_features = 256

    def __init__(self, channels: int = 3):
        super().__init__()
        widths = [channels, 64, 64, 128, 128, 256, 256]
        layers = []
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)]
            layers += [nn.ReLU()] + [nn.MaxPool2d(2)] * (i in (1, 3))
        self.body, self.head = nn.Sequential(*layers), nn.Linear(256, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(to_model(pixels)).mean((2, 3))

    def classify(self, pixels: Tensor) -> Tensor:
        """The unnormalized log odds of the ten classes, (B, 10)."""
        return self.head(self(pixels))


def train_classifier(
    images: Images, steps: int = 4000, batch: int = 256, device: str = "cpu", seed: int = 0
) -> Classifier:
    """A Classifier fitted to labelled images, shifted and (in colour) mirrored at random."""
    if images.labels is None:
        raise ValueError("a classifier needs labels: these images have none")
    torch.manual_seed(seed)
    net = Classifier(images.pixels.shape[1]).to(device)
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


def classifier(name: str, images: Images, root: str, device: str, **options) -> Classifier:
    """The classifier of a data set, from `root` where it was trained before."""
    file = Path(root) / f"classifier-{name}.safetensors"
    if not file.exists():
        net = train_classifier(images, device=device, **options)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: x.cpu().contiguous() for k, x in net.state_dict().items()}, file)
    net = Classifier(images.pixels.shape[1])
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


def best_device(otherwise: torch.device) -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda") if torch.cuda.is_available() else otherwise


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
