"""A run saves on the way, refuses what would spoil it, and never keeps weights that diverged."""

import csv
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from minddpm import checkpoint, data
from minddpm import run as module
from minddpm.config import Config, ModelConfig, TrainConfig
from minddpm.run import Interrupt, Run, flatten, pick_device

CONFIG = Config(
    data="digits",
    model=ModelConfig(width=8, multipliers=(1,), blocks=1, attention=(), schedule="cosine", T=10),
    train=TrainConfig(steps=6, batch_size=8, warmup=0, ema_decay=0.5),
)


def run(out, config=CONFIG, resume=False, device="cpu", save_every=100, **options):
    return Run(config, out, resume, device, "data", save_every, **options)


def train_with(**changed):
    return replace(CONFIG, train=replace(CONFIG.train, **changed))


def assert_same_tensors(a, b):
    assert_close(
        load_file(a / "last.safetensors"), load_file(b / "last.safetensors"), rtol=0, atol=0
    )


def test_a_run_saves_on_the_way_and_at_its_end(tmp_path, capsys, monkeypatch):
    saved = []
    monkeypatch.setattr(
        module.checkpoint,
        "save_state",
        lambda path, state, *args, save=checkpoint.save_state, **facts: (
            saved.append(state.step),
            save(path, state, *args, **facts),
        ),
    )
    out = tmp_path / "a" / "run"
    run(out, save_every=4).go()
    assert saved == [4, 6]
    names = sorted(f.name for f in out.iterdir() if "tfevents" not in f.name)
    pictures = ["samples-0000004.png", "samples-0000006.png"]
    whole = ["best.safetensors", "last.safetensors"]
    assert names == [*whole, "log.csv", *pictures, "step-0000004.safetensors"]
    for name in pictures:
        picture = np.asarray(Image.open(out / name))
        assert picture.shape == (8 * 72, 8 * 72)  # 8 x 8 tiles of 8 + 1 pixels, each 8 wide
    said = capsys.readouterr().out
    assert f"step 6 of 6: checkpoint and samples are in {out}" in said
    assert f"to sample: minddpm sample {out}" in said
    _, config, facts = checkpoint.read(out)
    assert config == CONFIG
    assert facts["step"] == 6
    assert facts["torch"] == torch.__version__


def test_saving_on_the_way_changes_nothing(tmp_path):
    run(tmp_path / "a", save_every=1).go()
    run(tmp_path / "b").go()
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_more_steps_are_welcome_and_go_on_exactly(tmp_path):
    run(tmp_path / "a", train_with(steps=10)).go()
    run(tmp_path / "b").go()
    run(tmp_path / "b", train_with(steps=10), resume=True).go()
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


def test_a_finished_run_resumed_stays_as_it_is(tmp_path, capsys):
    run(tmp_path).go()
    before, rows = load_file(tmp_path / "last.safetensors"), log_of(tmp_path)
    run(tmp_path, resume=True).go()
    assert_close(load_file(tmp_path / "last.safetensors"), before, rtol=0, atol=0)
    assert capsys.readouterr().out.count("step 6 of 6") == 2
    assert log_of(tmp_path) == rows


def test_fewer_steps_than_done_are_refused(tmp_path):
    run(tmp_path).go()
    with pytest.raises(ValueError, match="has done 6 steps: ask for more"):
        run(tmp_path, train_with(steps=5), resume=True)


def test_a_run_is_not_overwritten_and_none_is_not_resumed(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume: leave --resume out"):
        run(tmp_path, resume=True)
    run(tmp_path).go()
    before = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run: add --resume, or choose another"):
        run(tmp_path)
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_changed_flags_are_named(tmp_path):
    run(tmp_path).go()
    changed = replace(
        train_with(learning_rate=1e-3, steps=9), model=replace(CONFIG.model, dropout=0.3)
    )
    with pytest.raises(ValueError, match="was started with") as caught:
        run(tmp_path, changed, resume=True)
    assert str(caught.value) == (
        f"the run in {tmp_path} was started with dropout = 0.1, not 0.3; "
        "learning_rate = 0.0002, not 0.001: give the same flags to resume it"
    )


def test_changed_data_are_noticed(tmp_path):
    file = tmp_path / "images.npz"
    config = replace(CONFIG, data=str(file))
    np.savez(file, images=np.zeros((8, 8, 8), np.uint8))
    run(tmp_path / "a", config).go()
    np.savez(file, images=np.zeros((8, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"for images of shape \[1, 8, 8\]: is the data still"):
        run(tmp_path / "a", config, resume=True)
    np.savez(file, images=np.ones((8, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="no longer holds the images that the run in .* began"):
        run(tmp_path / "a", config, resume=True)


def test_changed_labels_are_noticed(tmp_path):
    file = tmp_path / "images.npz"
    config = replace(WITH_CLASSES, data=str(file))
    images = np.zeros((8, 8, 8), np.uint8)
    np.savez(file, images=images, labels=np.arange(8))
    run(tmp_path / "a", config).go()
    np.savez(file, images=images, labels=np.arange(8)[::-1])
    with pytest.raises(ValueError, match="no longer holds the images that the run in .* began"):
        run(tmp_path / "a", config, resume=True)


def test_a_second_run_in_the_folder_stops_before_it_touches_the_first(tmp_path):
    run(tmp_path, train_with(steps=3)).go()
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with module.alone(tmp_path), pytest.raises(ValueError, match="another process trains in"):
        run(tmp_path, resume=True).go()
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before
    run(tmp_path, resume=True).go()
    assert checkpoint.read(tmp_path)[2]["step"] == 6


def test_a_drive_without_locks_can_be_trained_on(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    run(tmp_path).go()
    assert checkpoint.read(tmp_path)[2]["step"] == 6


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    run(tmp_path, save_every=3).go()

    def refuse(path, *args, real=Path.open):
        if path.name == "last.safetensors":
            raise PermissionError(f"Permission denied: {path}")
        return real(path, *args)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        run(tmp_path, resume=True)


def test_a_best_that_was_deleted_comes_back(tmp_path, monkeypatch):
    run(tmp_path, save_every=3).go()
    (tmp_path / "best.safetensors").unlink()
    worse = {"fixed_loss": 99.0, "fixed_bits_per_dim": 9.0}
    monkeypatch.setattr(module, "watch", lambda *args: worse)
    run(tmp_path, train_with(steps=7), resume=True).go()
    assert checkpoint.read(tmp_path / "best.safetensors")[2]["step"] == 7


def test_a_corrupt_checkpoint_is_not_resumed(tmp_path):
    run(tmp_path).go()
    file = tmp_path / "last.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        run(tmp_path, resume=True)
    assert file.read_bytes() == before


def test_the_last_checkpoints_stay_and_a_damaged_one_gives_way_to_the_one_before(tmp_path):
    run(tmp_path, train_with(steps=9), save_every=2, keep=3).go()
    names = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    kept = ["step-0000006.safetensors", "step-0000008.safetensors"]
    assert names == ["best.safetensors", "last.safetensors", *kept]
    file = tmp_path / "last.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"not a complete .*: step-0000008.safetensors is taken"):
        again = run(tmp_path, train_with(steps=9), resume=True)
    assert again.state.step == 8
    again.go()
    run(tmp_path / "whole", train_with(steps=9)).go()
    assert_same_tensors(tmp_path, tmp_path / "whole")


def test_a_resumed_run_keeps_the_checkpoint_it_came_from(tmp_path):
    for steps in (3, 5, 7):
        run(tmp_path, train_with(steps=steps), resume=steps > 3).go()
    names = [f.name for f in tmp_path.glob("step-*")]
    assert names == ["step-0000005.safetensors"]
    assert checkpoint.read(tmp_path / names[0])[2]["step"] == 5


def test_an_out_with_the_name_of_shipped_weights_is_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("digits").go()
    assert "to sample: minddpm sample ./digits --steps 10\n" in capsys.readouterr().out
    (tmp_path / "digits" / "last.safetensors").rename("digits/step-0000006.safetensors")
    again = run("digits", resume=True)
    assert again.state.step == 6


def test_the_best_of_an_earlier_run_is_not_overwritten(tmp_path):
    run(tmp_path).go()
    (tmp_path / "last.safetensors").unlink()
    with pytest.raises(ValueError, match="holds the best of an earlier run: move it away"):
        run(tmp_path)


def test_ctrl_c_in_the_last_save_does_not_stop_it(tmp_path, monkeypatch):
    real = module.watch
    monkeypatch.setattr(module, "watch", lambda *x: os.kill(os.getpid(), signal.SIGINT) or real(*x))
    run(tmp_path).go()
    assert checkpoint.read(tmp_path)[2]["step"] == 6


def test_a_loss_that_cannot_be_computed_is_never_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "watch", lambda *x: {"fixed_loss": math.nan})
    again = run(tmp_path)
    again.go()
    assert again.best == math.inf and not (tmp_path / "best.safetensors").exists()


def test_in_parts_is_the_network():
    sizes = []
    net = torch.nn.Module()
    net.shape, net.forward = (2,), lambda x, t: sizes.append(len(x)) or x * t[:, None]
    x, t = torch.randn(7, 2), torch.arange(7)
    assert_close(module.InParts(net, 3)(x, t), x * t[:, None])
    assert sizes == [3, 3, 1]


def test_best_is_the_average_with_the_lowest_loss_on_the_fixed_images(tmp_path):
    """Too large a learning rate: the loss rises again, and the best stays what it was."""
    run(tmp_path, train_with(steps=12, learning_rate=0.3), save_every=2).go()
    rows = log_of(tmp_path)
    losses = {int(r["step"]): float(r["fixed_loss"]) for r in rows if r["fixed_loss"]}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=losses.get)
    assert best < 12
    _, _, facts = checkpoint.read(tmp_path / "best.safetensors")
    assert facts["step"] == best
    assert_close(facts["best"], losses[best], rtol=1e-5, atol=0)
    denoiser = checkpoint.load(tmp_path / "best.safetensors")
    fixed = data.to_model(data.load("digits", "test").pixels)
    assert_close(module.watch(denoiser, fixed)["fixed_loss"], losses[best], rtol=1e-4, atol=0)


def log_of(folder):
    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_of_a_resumed_run_is_that_of_a_whole_one(tmp_path):
    run(tmp_path / "a", train_with(steps=45), save_every=15).go()
    run(tmp_path / "b", train_with(steps=30), save_every=15).go()
    run(tmp_path / "b", train_with(steps=45), save_every=15, resume=True).go()
    timed = ("seconds", "images_per_second")
    a, b = ([{k: r[k] for k in r if k not in timed} for r in log_of(tmp_path / x)] for x in "ab")
    assert [r["step"] for r in a] == ["15", "20", "30", "40", "45", "45"]
    assert [r for r in b if r in a] == [r for r in a if r in b] and len(b) == 7
    assert {r["step"]: r for r in b}["45"] == a[-1]


def test_accumulation_trains_on_the_same_batch(tmp_path):
    plain = replace(CONFIG.model, dropout=0.0)
    for name, accumulate in [("a", 1), ("b", 4)]:
        run(tmp_path / name, replace(train_with(accumulate=accumulate), model=plain)).go()
    a, b = (load_file(tmp_path / x / "last.safetensors") for x in "ab")
    for name in a:
        if name.startswith("net."):
            assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


# Classes

WITH_CLASSES = replace(CONFIG, model=replace(CONFIG.model, classes=10))


def test_a_run_with_classes_resumes_exactly_and_its_parts_are_its_batch(tmp_path):
    half = replace(WITH_CLASSES, train=replace(CONFIG.train, steps=3))
    run(tmp_path / "a", half).go()
    run(tmp_path / "a", WITH_CLASSES, resume=True).go()
    run(tmp_path / "b", WITH_CLASSES).go()
    assert_same_tensors(tmp_path / "a", tmp_path / "b")
    plain = replace(WITH_CLASSES, model=replace(WITH_CLASSES.model, dropout=0.0))
    for name, accumulate in [("whole", 1), ("parts", 4)]:
        train = replace(CONFIG.train, accumulate=accumulate)
        run(tmp_path / name, replace(plain, train=train)).go()
    whole, parts = (load_file(tmp_path / x / "last.safetensors") for x in ("whole", "parts"))
    for name in whole:
        if name.startswith("net."):
            assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)
    picture = np.asarray(Image.open(tmp_path / "whole" / "samples-0000006.png"))
    assert picture.shape == (10 * 72, 8 * 72)  # a row of eight for each class
    assert checkpoint.load(tmp_path / "whole").net.classes == 10


def test_a_run_that_drops_no_label_says_to_sample_with_one(tmp_path, capsys):
    for drop, asks in [(0.0, True), (0.1, False)]:
        train = replace(CONFIG.train, steps=1, drop_label=drop)
        run(tmp_path / str(drop), replace(WITH_CLASSES, train=train)).go()
        assert ("--label 0" in capsys.readouterr().out) == asks


def test_a_run_trains_each_image_on_its_own_label(tmp_path, monkeypatch):
    seen, images = [], data.load("digits", "train")
    of = {x.numpy().tobytes(): y.item() for x, y in zip(images.pixels, images.labels)}

    def loss(denoiser, x0, t, eps):
        labels = denoiser.net.rule.__closure__
        (labels,) = (c.cell_contents for c in labels if isinstance(c.cell_contents, torch.Tensor))
        seen.append((x0, labels))
        return real(denoiser, x0, t, eps)

    real = module.simple_loss
    monkeypatch.setattr(module, "simple_loss", loss)
    train = replace(CONFIG.train, drop_label=0.5, flip=False, steps=20)
    run(tmp_path, replace(WITH_CLASSES, train=train)).go()
    pairs = [
        (of[data.to_uint8(x).numpy().tobytes()], y.item())
        for x0, labels in seen[:20]
        for x, y in zip(x0, labels)
    ]
    assert len(pairs) == 160 and all(got in (true, 10) for true, got in pairs)
    # 160 fair coins, deviation 6.3; five deviations
    assert abs(sum(got == 10 for _, got in pairs) - 80) < 5 * 6.3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "a model with 10 classes needs labels: these images have none"),
        (np.arange(8) + 3, r"with 10 classes the labels must lie in 0..9, got 3..10"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_training(tmp_path, labels, message):
    arrays = {"images": np.zeros((8, 8, 8), np.uint8)} | (
        {} if labels is None else {"labels": labels}
    )
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", replace(WITH_CLASSES, data=str(tmp_path / "images.npz")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["save_every", "keep"])
@pytest.mark.parametrize("value", [0, -3])
def test_save_every_and_keep_must_be_positive(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got {value}"):
        run(tmp_path, **{name: value})


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_out_that_cannot_be_a_folder_is_refused_before_training(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, OSError), match=r"file is a file, not a folder|Not a dir"):
        run(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 8, 10), r"the images must be square, got \(8, 10\): crop them"),
        ((8, 30, 30, 3), "3 resolutions need a size divisible by 4, got 30"),
        ((7, 8, 8), r"batch_size must lie in 1..7 \(the images at hand\), got 8"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_training(tmp_path, shape, message):
    np.savez(tmp_path / "images.npz", images=np.zeros(shape, np.uint8))
    model = replace(CONFIG.model, multipliers=(1, 1, 1))
    config = replace(CONFIG, data=str(tmp_path / "images.npz"), model=model)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


# Divergence


def loss_that_breaks_at(step, value, monkeypatch):
    """Let the loss be as it is up to update `step`, then times `value`."""
    calls, real = [], module.simple_loss

    def loss(denoiser, *batch):
        calls.append(None)
        return real(denoiser, *batch) * (value if len(calls) >= step else 1)

    monkeypatch.setattr(module, "simple_loss", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("save_every", [4, 5])
def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path, monkeypatch, value, save_every):
    loss_that_breaks_at(save_every + 1, value, monkeypatch)
    with pytest.raises(FloatingPointError, match="at step .*: lower --learning-rate") as caught:
        run(tmp_path, train_with(steps=20), save_every=save_every).go()
    assert "\n" not in str(caught.value)
    tensors, _, facts = checkpoint.read(tmp_path)
    assert facts["step"] == save_every
    assert all(x.isfinite().all() for x in tensors.values())
    assert not list(tmp_path.glob("*.part"))


def test_a_loss_that_is_not_finite_is_reported_without_a_save(tmp_path, monkeypatch):
    loss_that_breaks_at(1, float("nan"), monkeypatch)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 20"):
        run(tmp_path, train_with(steps=30)).go()
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".safetensors", ".png")]


# Progress and Ctrl-C


def test_progress_shows_loss_speed_and_time_left(tmp_path, monkeypatch, capsys):
    shown = {}

    class Bar(module.tqdm):
        def __init__(self, **options):
            super().__init__(**options, disable=False, mininterval=0, maxinterval=0)

        def set_postfix_str(self, s="", refresh=True):
            super().set_postfix_str(s, refresh)
            shown[self.n] = s

    monkeypatch.setattr(module, "tqdm", Bar)
    run(tmp_path, train_with(steps=41)).go()
    assert list(shown) == [20, 40, 41]
    assert all(re.fullmatch(r"loss \d\.\d{4}, [\d,]+ images/s", s) for s in shown.values())
    err = capsys.readouterr().err
    assert re.search(r"21/41 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss ", err)  # done<left


def test_ctrl_c_is_asked_for_once_and_the_second_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_update_saves_and_says_how_to_go_on(
    tmp_path, monkeypatch, capsys, signal_number
):
    real = module.simple_loss
    calls = []

    def loss(denoiser, *batch):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal_number)  # in the midst of update 3
        return real(denoiser, *batch)

    monkeypatch.setattr(module, "simple_loss", loss)
    argv = ["/x/minddpm", "train", "digits", "--out", "a folder", "--resume", "--no-resume"]
    monkeypatch.setattr("sys.argv", argv)
    run(tmp_path).go()
    assert checkpoint.read(tmp_path)[2]["step"] == 3
    said = capsys.readouterr().out
    assert "step 3 of 6: checkpoint and samples are in" in said
    assert "to go on: minddpm train digits --out 'a folder' --resume\n" in said
    monkeypatch.setattr(module, "simple_loss", real)
    run(tmp_path, resume=True).go()
    run(tmp_path / "whole").go()
    assert_same_tensors(tmp_path, tmp_path / "whole")


# Small parts


def test_devices():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda", "mps")
    for name in ("toaster", "cuda:99", "meta", ""):
        with pytest.raises(ValueError, match=f"device {name!r} cannot be used here") as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)


def test_flatten():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "c": 2, "e": 3}
