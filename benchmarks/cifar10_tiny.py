"""Measure the CIFAR-10 model that comes with minddpm: distances, names, bits.

    python benchmarks/cifar10_tiny.py TRAIN TEST

TRAIN, TEST: .npz files with `images` (N, 32, 32, 3) uint8 and `labels` (N,). The features are those
of a small classifier that is trained here (400 updates of 128 images); no distance is an FID. Takes
about half an hour on two CPU cores.
"""

import argparse
import time

import torch

from minddpm import checkpoint, data, generate, metrics
from minddpm.samplers import GRIDS, STEPS, log_snr_grid

SAMPLES, BITS = 2500, 100


def main() -> None:
    """Print each figure as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="the training images, an .npz file")
    parser.add_argument("test", help="held-out images, an .npz file")
    args = parser.parse_args()
    train, test = data.load(args.train), data.load(args.test)
    denoiser, began = checkpoint.load("cifar10-tiny"), time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    judge = metrics.classifier(train, ".", "cpu", steps=400, batch=128)
    right = metrics.accuracy(judge, test)
    say(f"the classifier names {right:.1%} of {len(test.pixels)} test images")
    real = metrics.extract(train.pixels, judge)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    floor = metrics.frechet_distance(real[order[:SAMPLES]], real[order[SAMPLES:]])
    say(f"{SAMPLES} real images from all others: {floor:.3f}")

    grid = GRIDS["uniform"](denoiser.schedule, 15)
    labels = [10 * i // SAMPLES for i in range(SAMPLES)]
    for name, how in [
        ("no class", {}),
        ("classes, scale 1", {"labels": labels}),
        ("classes, scale 3", {"labels": labels, "scale": 3.0}),
    ]:
        fake = generate.samples(
            denoiser, SAMPLES, grid, STEPS["dpm-solver"], precision="bf16", **how
        )
        distance = metrics.frechet_distance(real, metrics.extract(fake, judge))
        named = ""
        if how:
            share = metrics.accuracy(judge, data.Images(fake, torch.tensor(labels)))
            named = f", named as asked {share:.1%}"
        say(f"{SAMPLES} samples, {name}: distance {distance:.3f}{named}")

    flow = log_snr_grid(denoiser.schedule, 100)[:-1]
    for name, times in [("probability flow", flow), ("variational bound", None)]:
        mean, error = metrics.bits(denoiser, test.pixels[:BITS], times)
        say(f"{mean:.3f} +- {error:.3f} bits per dimension by the {name}, {BITS} test images")


if __name__ == "__main__":
    main()
