"""Images as uint8 tensors (N, C, H, W) in memory, and the batches that a training run sees."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Images(NamedTuple):
    """pixels: (N, C, H, W) uint8; labels: (N,) int64, or None where there are none."""

    pixels: Tensor
    labels: Tensor | None


def load(source: str, split: str = "train", root: str = "data", size: int = 32) -> Images:
    """The images of a named data set, of an `.npz` file or of a folder.

    source: "digits" (scikit-learn's 1,797, 8 x 8 grey; "test" is every fifth), "mnist" (padded to
    32 x 32), "cifar10" (both downloaded to `root`), the path of an `.npz` holding `images`
    (N, H, W) or (N, H, W, C) uint8 and perhaps `labels` (N,), or the path of a folder of images,
    read as RGB, cut to their central square and resized to `size`. split: "train", "test" or "all",
    of the named ones. Raises ValueError or FileNotFoundError with one line that says what is wrong.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be train, test or all, got {split!r}")
    if source in NAMED:
        return NAMED[source](split, root)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"no data set or file {source!r}: expected {', '.join(NAMED)}, an .npz file "
            "or a folder of images"
        )
    return load_folder(path, size) if path.is_dir() else load_npz(path)


def load_digits(split: str, root: str) -> Images:
    """scikit-learn's digits: 8 x 8, 17 grey values scaled to 0..255. `root` is not used."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    test = torch.arange(len(pixels)) % 5 == 4
    keep = {"train": ~test, "test": test, "all": test | True}[split]
    return Images(pixels[keep], torch.from_numpy(digits.target).long()[keep])


def load_torchvision(name: str, split: str, root: str) -> Images:
    """MNIST or CIFAR-10 through torchvision, downloaded to `root` where they are not there yet."""
    from torchvision import datasets

    parts = {"train": [True], "test": [False], "all": [True, False]}[split]
    try:
        sets = [getattr(datasets, name)(root, train=train, download=True) for train in parts]
    except Exception as error:  # torchvision raises as many for a damaged file
        raise ValueError(
            f"{name} is not complete in {str(Path(root).resolve())!r} and could not be downloaded "
            f"({describe(error)}); check the network, or put the official files there"
        ) from error
    pixels = torch.cat([torch.as_tensor(d.data) for d in sets])
    labels = torch.cat([torch.as_tensor(d.targets) for d in sets])
    return Images(channels_first(pixels), labels)


def load_mnist(split: str, root: str) -> Images:
    """MNIST with a black border of 2 pixels, so that 32 can be halved three times."""
    pixels, labels = load_torchvision("MNIST", split, root)
    return Images(torch.nn.functional.pad(pixels, (2, 2, 2, 2)), labels)


NAMED = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": lambda split, root: load_torchvision("CIFAR10", split, root),
}


def load_npz(path: Path) -> Images:
    """An `.npz` with `images`, uint8 (N, H, W) or (N, H, W, 1 or 3), and perhaps `labels` (N,)."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file}
    except Exception as error:  # numpy raises half a dozen types for a damaged file
        raise ValueError(f"{path} is not a readable .npz file: {describe(error)}") from error
    images, labels = arrays.get("images"), arrays.get("labels")
    if images is None:
        raise ValueError(f"{path} holds no array named 'images'")
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or images.shape[3:] not in ((), (1,), (3,))
    ):
        raise ValueError(
            f"'images' in {path} must be uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), "
            f"got {images.dtype} of shape {images.shape}"
        )
    if not images.size:
        raise ValueError(f"{path} holds no images")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"'labels' in {path} must be whole numbers of shape ({len(images)},), "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    return Images(
        channels_first(torch.from_numpy(images)),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )


def load_folder(path: Path, size: int) -> Images:
    """Every image below a folder, by name: RGB, the central square, resized to size x size."""

    def fail(error: OSError) -> None:  # a folder that may not be read is not to be left out
        raise error

    every = (Path(d) / name for d, _, names in os.walk(path, onerror=fail) for name in names)
    suffixes = (f for f in every if f.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(f for f in suffixes if f.is_file() and not f.name.startswith("."))
    if not files:
        raise ValueError(f"no image below {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    pixels = []
    for file in files:
        try:
            pixels.append(torch.from_numpy(read_image(file, size)))
        except Exception as error:  # Pillow raises half a dozen types for a damaged file
            raise ValueError(
                f"{file} cannot be read as an image: {describe(error)}; mend or remove it"
            ) from error
    return Images(channels_first(torch.stack(pixels)), None)


def read_image(file: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8: upright as the camera says, the transparent white, cut square."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        if opened.mode[0] in "IF":  # Pillow would cut such values off at 255
            raise ValueError(f"its pixels are not 8-bit but {opened.mode}: convert it")
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))


def describe(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def channels_first(pixels: Tensor) -> Tensor:
    """(N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def to_model(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1], any shape (DDPM sec. 3.3)."""
    if pixels.dtype != torch.uint8:
        raise TypeError(f"expected uint8 pixels in 0..255, got {pixels.dtype}")
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to uint8 0..255 by the nearest level, any shape; what lies outside is clamped."""
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point pixels in [-1, 1], got {x.dtype}")
    if not x.isfinite().all():
        raise ValueError("an image holds NaN or infinity; the model or the sampler diverged")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Batches:
    """Random batches of images in [-1, 1]: `batches(k)` is a pure function of (seed, k).

    Each epoch is a fresh permutation without its incomplete last batch. pixels: (N, C, H, W) uint8,
    on the device where the batches are wanted. flip: mirror half of the images, left to right.
    """

    def __init__(self, pixels: Tensor, batch_size: int, seed: int = 0, flip: bool = False):
        if not 1 <= batch_size <= len(pixels):
            raise ValueError(
                f"batch_size must lie in 1..{len(pixels)} (the images at hand), got {batch_size}"
            )
        self.pixels, self.batch_size, self.seed, self.flip = pixels, batch_size, seed, flip
        self.epoch, self.order = -1, None

    def chosen(self, k: int) -> Tensor:
        """Which images batch k = 0, 1, ... holds, (batch_size,), on their device."""
        epoch, position = divmod(k, len(self.pixels) // self.batch_size)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, torch.from_numpy(rng.permutation(len(self.pixels)))
        start = position * self.batch_size
        return self.order[start : start + self.batch_size].to(self.pixels.device)

    def __call__(self, k: int) -> Tensor:
        """Batch k: (batch_size, C, H, W) float32."""
        x = to_model(self.pixels[self.chosen(k)])
        if self.flip:
            mirror = torch.from_numpy(np.random.default_rng([self.seed, k, 1]).random(len(x)) < 0.5)
            x = torch.where(mirror.to(x.device)[:, None, None, None], x.flip(3), x)
        return x

    def labels(self, k: int, labels: Tensor, drop: float, none: int) -> Tensor:
        """Of all the labels (N,), batch k's, (batch_size,); each is `none` with chance `drop`."""
        rng = np.random.default_rng([self.seed, k, 2])
        dropped = torch.from_numpy(rng.random(self.batch_size) < drop).to(labels.device)
        return torch.where(dropped, none, labels[self.chosen(k)])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place in the end: all of it, or nothing."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_labels(labels: Tensor | None, classes: int) -> None:
    """Raises ValueError unless there are labels, all in 0..classes - 1."""
    if labels is None:
        raise ValueError(f"a model with {classes} classes needs labels: these images have none")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(
            f"with {classes} classes the labels must lie in 0..{classes - 1}, "
            f"got {low}..{high}: number them from 0"
            + (f", or ask for {high + 1} --classes" if low >= 0 else "")
        )


def eight_gaussians(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points (n, 2) from eight round Gaussians on a circle of radius 1, each of deviation 0.1."""
    angle = torch.randint(8, (n,), generator=generator) * (2 * torch.pi / 8)
    centre = torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + 0.1 * torch.randn(n, 2, generator=generator)


def two_moons(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points (n, 2) on two interleaved half circles in [-1, 1], give or take noise of 0.05."""
    angle = torch.rand(n, generator=generator) * torch.pi
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], dim=1) / 1.5 + 0.05 * torch.randn(n, 2, generator=generator)
