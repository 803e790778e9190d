"""Samples by the thousand, and the files to keep them in."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minddpm import processes, viz
from minddpm.data import replacing, to_uint8
from minddpm.guidance import guide
from minddpm.prediction import Denoiser
from minddpm.samplers import sample, sample_path
from minddpm.train import PRECISIONS, pick_precision, stream

SUFFIXES = (".png", ".gif", ".webp", ".npz")


def start(denoiser: Denoiser, n: int, seed: int, i: int) -> tuple[Tensor, torch.Generator]:
    """Batch i of the noise that `seed` stands for, (n, C, H, W), and the generator it came from."""
    device = next(denoiser.net.parameters()).device
    generator = torch.Generator(device).manual_seed(stream(seed, i))
    return torch.randn(n, *denoiser.net.shape, generator=generator, device=device), generator


def batches(
    denoiser, n, grid, step, *, seed=0, batch=256, precision="fp32", labels=None, scale=1.0, **more
) -> Iterator[Tensor]:
    """This process's share of n samples, batch by batch: (B, C, H, W) uint8 on the CPU.

    Batch i depends on the seed, the batch size and i alone: however many processes work, the
    samples are the same. precision: of the network's products, fp32, bf16, fp16, or auto for the
    best that the device has. labels: classes (n,) to draw; scale: of guidance towards them.
    more: options of the step.
    """
    rank, world = processes.place()
    sizes = [min(batch, n - first) for first in range(0, n, batch)]
    mine = range(rank, len(sizes), world)
    silent = {"disable": True} if rank or len(mine) < 2 else {}
    for i in tqdm(mine, unit="batch", **silent):
        x, generator = start(denoiser, sizes[i], seed, i)
        asked = None if labels is None else labels[i * batch :][: sizes[i]]
        with arithmetic(x.device.type, precision):
            given = guide(denoiser, asked, scale)
            x = sample(given, x, grid, step, generator=generator, **more)
        yield to_uint8(x).cpu()


def arithmetic(device: str, precision: str) -> torch.autocast:
    """Within it a network multiplies in that number format; what it is given and x stay fp32."""
    dtype = PRECISIONS[pick_precision(precision, device == "cuda")]
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def samples(denoiser: Denoiser, n: int, grid: list[int], step, **options) -> Tensor | None:
    """n samples (n, C, H, W) uint8 on the CPU, in the order of their batches; None but at rank 0.

    options: those of `batches` and of the step.
    """
    shares = processes.gather(list(batches(denoiser, n, grid, step, **options)))
    if not shares:
        return None
    world = len(shares)
    ordered = [shares[i % world][i // world] for i in range(sum(map(len, shares)))]
    return torch.cat(ordered)


def path(
    denoiser, n, grid, step, frames, *, seed=0, precision="fp32", labels=None, scale=1.0, **options
) -> tuple[list[int], Tensor]:
    """`frames` stops of the way of n samples: (their times, x_t (frames, n, C, H, W) uint8).

    The options are those of `batches`.
    """
    if not 2 <= frames <= len(grid):
        raise ValueError(f"frames must lie in 2..{len(grid)} (the stops of the path), got {frames}")
    x, generator = start(denoiser, n, seed, 0)
    with arithmetic(x.device.type, precision):
        given = guide(denoiser, labels, scale)
        stops = sample_path(given, x, grid, step, generator=generator, **options)
        pictures = [(grid[0], x), *((stop.t, stop.x) for stop in stops)]
    chosen = [pictures[round(i)] for i in np.linspace(0, len(grid) - 1, frames)]
    return [t for t, _ in chosen], torch.stack([to_uint8(x).cpu() for _, x in chosen])


def write(out: Path, pixels: Tensor) -> None:
    """Images (N, C, H, W) uint8 as a .png sheet or an .npz of `images` (N, H, W, C); or, of stops
    (K, N, C, H, W), a .png with a row an image, a .gif or a .webp that moves. All or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part, part.open("wb") as file:
        if out.suffix.lower() == ".npz":
            np.savez_compressed(file, images=pixels.permute(0, 2, 3, 1).numpy())
        else:
            file.write(picture(pixels, out.suffix.lower()))


def picture(pixels: Tensor, suffix: str) -> bytes:
    """The file of that suffix that shows the images, or the stops."""
    if pixels.ndim == 4:
        return viz.sheet(pixels)
    if suffix == ".png":
        return viz.sheet(pixels.transpose(0, 1).flatten(0, 1), columns=len(pixels))
    return animation([viz.sheet(frame) for frame in pixels], suffix[1:])


def animation(frames: list[bytes], kind: str) -> bytes:
    """PNG files as one that moves, over and over, and rests at its end: gif or webp."""
    from PIL import Image

    first, *rest = (Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames)
    pause = [80] * len(rest) + [2000]  # milliseconds
    file = io.BytesIO()
    options = dict(save_all=True, append_images=rest, duration=pause, loop=0, quality=90)
    try:
        first.save(file, kind, **options)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"a .{kind} cannot be {first.size} pixels large: draw fewer") from error
    return file.getvalue()
