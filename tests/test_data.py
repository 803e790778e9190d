"""Data sets read from disk equal what was written there; batches are permutations."""

import gzip
import hashlib
import math
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close

from minddpm import data

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_digits_are_those_of_scikit_learn_on_a_scale_to_255():
    truth = load_digits()
    digits = data.load("digits", "all")
    assert digits.pixels.dtype == torch.uint8
    assert digits.pixels.shape == (1797, 1, 8, 8)
    exact = truth.images[:, None] * 255 / 16
    assert np.abs(digits.pixels.numpy() - exact).max() <= 0.5  # the nearest level
    assert set(digits.pixels.unique().tolist()) == {round(v * 255 / 16) for v in range(17)}
    assert (digits.labels.numpy() == truth.target).all()


def test_digits_splits_are_disjoint_and_complete():
    train, test, every = (data.load("digits", split) for split in ("train", "test", "all"))
    assert_close(test.pixels, every.pixels[4::5], rtol=0, atol=0)
    assert_close(test.labels, every.labels[4::5], rtol=0, atol=0)
    rest = [i for i in range(1797) if i % 5 != 4]
    assert_close(train.pixels, every.pixels[rest], rtol=0, atol=0)
    assert_close(train.labels, every.labels[rest], rtol=0, atol=0)


@pytest.fixture
def mnist(tmp_path):
    """A folder with 5 training and 3 test images in MNIST's own format, and what they hold."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    truth = {}
    for name, n in (("train", 5), ("t10k", 3)):
        images, labels = pixels(n, 28, 28), np.arange(n, dtype=np.uint8)
        header = struct.pack(">iiii", 0x803, n, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">ii", 0x801, n)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        truth[name] = images, labels
    return tmp_path, truth


@pytest.mark.parametrize(
    ("split", "parts"), [("train", ["train"]), ("test", ["t10k"]), ("all", ["train", "t10k"])]
)
def test_mnist_is_read_and_padded(mnist, split, parts):
    root, truth = mnist
    got = data.load("mnist", split, str(root))
    images = np.concatenate([truth[part][0] for part in parts])
    assert got.pixels.shape == (len(images), 1, 32, 32)
    assert (got.pixels[:, 0, 2:30, 2:30].numpy() == images).all()
    assert got.pixels.sum() == images.sum(dtype=np.int64)  # the border is black
    assert got.labels.dtype == torch.int64
    assert got.labels.tolist() == np.concatenate([truth[part][1] for part in parts]).tolist()


def test_a_truncated_mnist_file_gets_one_line(mnist):
    root, _ = mnist
    file = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="MNIST is not complete in") as caught:
        data.load("mnist", "train", str(root))
    assert "\n" not in str(caught.value)


def test_cifar10_is_read(tmp_path, monkeypatch):
    """Five training batches and one test batch of two images each, in the official layout."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rows = {}

    def write(name, entry):
        content = pickle.dumps(entry)
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def batch(name, label):
        rows[name] = pixels(2, 3072)
        return write(name, {"data": rows[name], "labels": [label, 9 - label]})

    names = [f"data_batch_{i}" for i in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", [batch(n, i) for i, n in enumerate(names)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 7)])
    filename, md5 = write("batches.meta", {"label_names": list("0123456789")})
    meta = {"filename": filename, "key": "label_names", "md5": md5}
    monkeypatch.setattr(CIFAR10, "meta", meta)

    train, test = (data.load("cifar10", split, str(tmp_path)) for split in ("train", "test"))
    # A row of the official file is 1,024 red values, then green, then blue, each row by row.
    truth = np.concatenate([rows[name] for name in names]).reshape(10, 3, 32, 32)
    assert train.pixels.dtype == torch.uint8
    assert (train.pixels.numpy() == truth).all()
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert (test.pixels.numpy() == rows["test_batch"].reshape(2, 3, 32, 32)).all()
    every = data.load("cifar10", "all", str(tmp_path))
    assert_close(every.pixels, torch.cat([train.pixels, test.pixels]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_no_network_gets_one_line(name, tmp_path, monkeypatch, capsys):
    import urllib.request

    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route to host\nat all")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(ValueError, match="could not be downloaded .*check the network") as caught:
        data.load(name, "train", str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "nothing") in str(caught.value)


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("digits", "valid", "split must be train, test or all, got 'valid'"),
        ("cifar100", "train", "no data set or file 'cifar100': expected digits, mnist, cifar10"),
    ],
)
def test_unknown_names_get_one_line(source, split, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load(source, split)


# Folders of images


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path, **options)


def test_a_folder_is_read_by_name_whatever_the_form(tmp_path):
    rgb = pixels(8, 8, 3)
    grey = pixels(8, 8)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "c.gif")
    save(tmp_path / "a.png", rgb)
    save(tmp_path / "b" / "deep" / "x.BMP", grey)
    save(tmp_path / "d.tiff", rgb)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_text("what a Mac leaves behind")
    (tmp_path / "folder.png").mkdir()
    got = data.load(str(tmp_path), size=8)
    assert got.labels is None
    assert got.pixels.dtype == torch.uint8
    truth = [rgb, np.repeat(grey[..., None], 3, 2), np.broadcast_to([10, 20, 30], (8, 8, 3)), rgb]
    assert (got.pixels.numpy() == np.stack(truth).transpose(0, 3, 1, 2)).all()


def test_transparent_parts_are_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = [200, 100, 0, 255]
    save(tmp_path / "a.png", rgba)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "b.png", transparency=0)
    a, b = data.load(str(tmp_path), size=4).pixels
    assert (a[:, :2] == torch.tensor([200, 100, 0])[:, None, None]).all()
    assert (a[:, 2:] == 255).all()
    assert (b == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path, orientation):
    """Orientation 6 says: turn the stored picture by 90 degrees clockwise; and so on (EXIF 2.3)."""
    upright = pixels(8, 8, 3)
    stored = {  # what the camera stored, by the place of the visual top and left
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    save(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    got = data.load(str(tmp_path), size=8).pixels[0]
    assert (got.permute(1, 2, 0).numpy() == upright).all()


@pytest.mark.parametrize("shape", [(16, 32, 3), (32, 16, 3), (16, 16, 3)])
def test_the_central_square_is_cut_and_resized(tmp_path, shape):
    """The square is red, what is beside it blue: red is left, but for the filter at the rim."""
    array = np.zeros(shape, np.uint8)
    array[..., 2] = 255
    top, left = (shape[0] - 16) // 2, (shape[1] - 16) // 2
    array[top : top + 16, left : left + 16] = [255, 0, 0]
    save(tmp_path / "a.png", array)
    for size, rim in ((16, 0), (8, 3), (32, 6)):  # Lanczos reaches 3 pixels of the coarser side
        got = data.load(str(tmp_path), size=size).pixels
        assert got.shape == (1, 3, size, size)
        inner = got[..., rim : size - rim, rim : size - rim]
        assert (inner == torch.tensor([255, 0, 0])[:, None, None]).all()
        assert (got[:, 0] > got[:, 2]).all()


def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def refuse(path, real=os.scandir):
        if Path(path).name == "closed":
            raise PermissionError(f"Permission denied: {path}")
        return real(path)

    assert len(data.load(str(tmp_path), size=8).pixels) == 1
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        data.load(str(tmp_path), size=8)


def test_a_folder_without_images_gets_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no image below .* \(looked for .bmp"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "16-bit"])
def test_a_damaged_image_is_named(tmp_path, damage):
    save(tmp_path / "a.png", pixels(8, 8, 3))
    file = tmp_path / "b.png"
    if damage == "16-bit":
        save(file, (np.arange(64) * 1000).astype(np.uint16).reshape(8, 8))
    else:
        save(file, pixels(64, 64, 3))
        whole = file.read_bytes()
        file.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[:5000]}[damage])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image: .*mend or") as caught:
        data.load(str(tmp_path), size=8)
    assert "\n" not in str(caught.value)


# Array files


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1), (5, 6, 7, 3)])
@pytest.mark.parametrize("labels", [None, np.uint8, np.int32])
def test_npz_of_each_shape(tmp_path, shape, labels):
    images = pixels(*shape)
    arrays = {} if labels is None else {"labels": np.arange(5).astype(labels)}
    np.savez(tmp_path / "a.npz", images=images, other=np.zeros(3), **arrays)
    got = data.load(str(tmp_path / "a.npz"))
    truth = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    assert got.pixels.dtype == torch.uint8
    assert got.pixels.is_contiguous()
    assert (got.pixels.numpy() == truth).all()
    if labels is None:
        assert got.labels is None
    else:
        assert_close(got.labels, torch.arange(5), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "no array named 'images'"),
        ({"images": np.zeros((2, 4, 4))}, r"must be uint8 .*got float64 of shape \(2, 4, 4\)"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, r"got uint8 of shape \(2, 3, 4, 4\)"),
        ({"images": np.zeros((4, 4), np.uint8)}, "must be uint8 of shape"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "holds no images"),
        ({"images": np.zeros((2, 0, 4), np.uint8)}, "holds no images"),
        ({"images": np.array([None, 1])}, "is not a readable .npz file: .*allow_pickle"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)},
            r"must be whole numbers of shape \(2,\), got int64 of shape \(3,\)",
        ),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0.5, 1])},
            "must be whole numbers .*got float64",
        ),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array(["cat", "dog"])},
            "must be whole numbers .*got <U3",
        ),
    ],
)
def test_a_wrong_npz_gets_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        data.load(str(tmp_path / "a.npz"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "npy", "gzip"])
def test_a_corrupt_npz_gets_one_line(tmp_path, damage):
    file = tmp_path / "a.npz"
    np.savez_compressed(file, images=pixels(5, 6, 7))
    whole = file.read_bytes()
    if damage == "npy":
        np.save(tmp_path / "a.npy", pixels(5, 6, 7))
        whole = (tmp_path / "a.npy").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    content = {"empty": b"", "text": b"hello", "truncated": whole[:middle], "npy": whole}
    content |= {"flipped": flipped, "gzip": gzip.compress(whole)}
    file.write_bytes(content[damage])
    with pytest.raises(ValueError, match="is not a readable .npz file") as caught:
        data.load(str(file))
    assert "\n" not in str(caught.value)


# The scale of the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_256_levels_survive_the_round_trip(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    x = data.to_model(levels)
    assert x.dtype == torch.float32
    assert_close(x.double(), levels.double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert_close(data.to_uint8(x.to(dtype)), levels, rtol=0, atol=0)


def test_to_uint8_takes_the_nearest_level_and_clamps():
    x = torch.tensor([-7.0, -1, -1 + 0.9 / 255, -1 + 1.1 / 255, 1, 7])
    assert data.to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_uint8_rounds_half_precision_once(dtype):
    x = torch.linspace(-1, 1, 999).to(dtype)
    exact = (x.double() + 1) * 127.5
    assert ((data.to_uint8(x).double() - exact).abs() <= 0.5 + 1e-4).all()  # 1e-4: float32 sums


def test_wrong_dtypes_and_values_get_one_line():
    with pytest.raises(TypeError, match=r"expected uint8 pixels in 0..255, got torch.float32"):
        data.to_model(torch.zeros(3))
    with pytest.raises(TypeError, match=r"expected floating-point .*got torch.int64"):
        data.to_uint8(torch.tensor([0, 200]))
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            data.to_uint8(torch.tensor([0, value]))


# Batches


def numbered(n, width=1):
    """n images (1, 1, width), image i all i."""
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 1, width)


def test_each_epoch_is_a_fresh_permutation():
    batches = data.Batches(numbered(200), 30, seed=3)
    epochs = []
    for epoch in range(3):
        stack = torch.cat([batches(6 * epoch + i) for i in range(6)])
        assert stack.shape == (180, 1, 1, 1)
        epochs.append(data.to_uint8(stack).flatten().tolist())
        assert len(set(epochs[-1])) == 180  # none twice; the last 20 of each order are left out
        assert epochs[-1] != sorted(epochs[-1])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_depends_on_seed_and_number_alone(flip):
    images = torch.from_numpy(pixels(20, 1, 2, 4))
    first, second = (data.Batches(images, 8, seed=5, flip=flip) for _ in range(2))
    forwards = [first(k) for k in range(7)]
    for k in (6, 0, 3, 3, 5, 1, 4, 2):
        assert_close(second(k), forwards[k], rtol=0, atol=0)
    other = data.Batches(images, 8, seed=6, flip=flip)
    assert not any(torch.equal(other(k), forwards[k]) for k in range(7))


def test_flip_mirrors_half_left_to_right_and_nothing_else():
    images = torch.from_numpy(pixels(100, 3, 4, 4))
    plain, flipped = (data.Batches(images, 50, seed=0, flip=flip) for flip in (False, True))
    mirrored = 0
    for k in range(40):
        for x, y in zip(plain(k), flipped(k), strict=True):
            assert torch.equal(y, x) or torch.equal(y, x.flip(-1))
            mirrored += torch.equal(y, x.flip(-1))
    # 2,000 fair coins: mean 1,000, deviation 22; five deviations
    assert abs(mirrored - 1000) < 5 * 22.4


def test_the_mirroring_of_the_first_batch_is_independent_of_its_order():
    """numpy seeds [s, 0] and [s, 0, 0] alike: such a flip would spend the same bits again."""
    images = numbered(200, width=2)
    images[..., 1] = 255
    mirrored = data.Batches(images, 200, seed=4, flip=True)(0)[:, 0, 0, 0] == 1
    spent = torch.from_numpy(np.random.default_rng([4, 0]).random(200) < 0.5)
    # 200 fair coins agree 100 times, deviation 7; five deviations
    assert abs((mirrored == spent).sum().item() - 100) < 5 * 7.1


def test_labels_travel_with_their_images_and_a_share_is_dropped():
    images, labels = numbered(200), torch.arange(200) % 7
    batches = data.Batches(images, 40, seed=3)
    dropped = 0
    for k in (11, *range(10)):
        true = data.to_uint8(batches(k)).flatten() % 7
        assert torch.equal(batches.labels(k, labels, 0.0, 7), true)
        seen = batches.labels(k, labels, 0.3, 7)
        assert torch.equal(seen, data.Batches(images, 40, seed=3).labels(k, labels, 0.3, 7))
        assert ((seen == true) | (seen == 7)).all()
        dropped += (seen == 7).sum().item()
    assert (batches.labels(0, labels, 1.0, 7) == 7).all()
    other = data.Batches(images, 40, seed=4)
    where = [(b.labels(0, labels, 0.3, 7) == 7).tolist() for b in (batches, other)]
    assert where[0] != where[1] != (batches.labels(1, labels, 0.3, 7) == 7).tolist()
    # 440 coins of 0.3: mean 132, deviation 9.6; five deviations
    assert abs(dropped - 132) < 5 * 9.6


def test_whether_a_label_is_dropped_does_not_depend_on_the_mirroring():
    batches = data.Batches(numbered(200), 200, seed=4)
    dropped = batches.labels(0, torch.zeros(200, dtype=torch.int64), 0.5, 1) == 1
    for spent in ([4, 0], [4, 0, 1]):
        coins = torch.from_numpy(np.random.default_rng(spent).random(200) < 0.5)
        assert abs((dropped == coins).sum().item() - 100) < 5 * 7.1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "a model with 3 classes needs labels: these images have none"),
        ([-1, 1], r"the labels must lie in 0..2, got -1..1: number them from 0$"),
        ([0, 3], r"with 3 classes the labels must lie in 0..2, got 0..3: .* ask for 4 --classes"),
        ([-1, 2], r"with 3 classes the labels must lie in 0..2, got -1..2"),
    ],
)
def test_labels_that_are_no_classes_get_one_line(labels, message):
    data.check_labels(torch.tensor([0, 2, 1]), 3)
    with pytest.raises(ValueError, match=message):
        data.check_labels(None if labels is None else torch.tensor(labels), 3)


@pytest.mark.parametrize("size", [0, -1, 21])
def test_an_impossible_batch_size_gets_one_line(size):
    with pytest.raises(ValueError, match=r"batch_size must lie in 1..20 .*got"):
        data.Batches(numbered(20), size)


# Points in a plane


def test_eight_gaussians_have_their_moments():
    x = data.eight_gaussians(40_000, torch.Generator().manual_seed(0)).double()
    # Centres on the unit circle: covariance I / 2, plus 0.1^2. Five standard errors: 5 * 0.71 / 200
    assert_close(x.mean(0), torch.zeros(2).double(), rtol=0, atol=0.018)
    assert_close(x.T.cov(), 0.51 * torch.eye(2).double(), rtol=0, atol=0.015)
    angle = torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi / 8)
    share = angle.round().long().remainder(8).bincount() / len(x)
    assert_close(share, torch.full((8,), 1 / 8), rtol=0, atol=0.009)  # 5 * sqrt(7/64/40000)
    centre = (2 * math.pi / 8) * angle.round()
    off = x - torch.stack([centre.cos(), centre.sin()], 1)
    assert abs(off.std().item() - 0.1) < 0.002


def test_two_moons_have_their_moments():
    x = data.two_moons(40_000, torch.Generator().manual_seed(0)).double()
    # With a ~ U(0, pi): E cos a = 0, E sin a = 2 / pi, E cos^2 a = E sin^2 a = 1/2, E sin cos = 0.
    var_x = (1 / 2 + 1 / 4) / 2.25 + 0.05**2
    var_y = (1 / 2 - 1 / math.pi + 1 / 16) / 2.25 + 0.05**2
    cov = (1 / 8 - 1 / math.pi) / 2.25
    truth = torch.tensor([[var_x, cov], [cov, var_y]]).double()
    assert_close(x.mean(0), torch.zeros(2).double(), rtol=0, atol=0.015)
    assert_close(x.T.cov(), truth, rtol=0, atol=0.01)
    # Every point is near one of the two half circles, of radius 1 / 1.5: seven deviations
    y = x * 1.5 + torch.tensor([0.5, 0.25])
    upper = (y.norm(dim=1) - 1).abs() + 9 * (y[:, 1] < -0.525)
    lower = ((y - torch.tensor([1, 0.5])).norm(dim=1) - 1).abs() + 9 * (y[:, 1] > 1.025)
    assert torch.minimum(upper, lower).max() < 7 * 0.075


@pytest.mark.parametrize("toy", [data.eight_gaussians, data.two_moons])
def test_toys_follow_their_generator(toy):
    a, b, c = (toy(10, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert a.shape == (10, 2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
