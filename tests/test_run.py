"""A run saves on the way, refuses what would spoil it, and never keeps weights that diverged."""

import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from minddpm import checkpoint
from minddpm import run as module
from minddpm.config import Config, ModelConfig, TrainConfig
from minddpm.run import Interrupt, Run, flatten, pick_device

CONFIG = Config(
    data="digits",
    model=ModelConfig(width=8, multipliers=(1,), blocks=1, attention=(), schedule="cosine", T=10),
    train=TrainConfig(steps=6, batch_size=8, warmup=0, ema_decay=0.5),
)


def run(out, config=CONFIG, resume=False, device="cpu", save_every=100):
    return Run(config, out, resume, device, "data", save_every)


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
        lambda path, state, config, save=checkpoint.save_state, **facts: (
            saved.append(state.step),
            save(path, state, config, **facts),
        ),
    )
    out = tmp_path / "a" / "run"
    run(out, save_every=4).go()
    assert saved == [4, 6]
    names = sorted(f.name for f in out.iterdir())
    assert names == ["last.safetensors", "samples-0000004.png", "samples-0000006.png"]
    for name in names[1:]:
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
    before = load_file(tmp_path / "last.safetensors")
    run(tmp_path, resume=True).go()
    assert_close(load_file(tmp_path / "last.safetensors"), before, rtol=0, atol=0)
    assert capsys.readouterr().out.count("step 6 of 6") == 2


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


def test_a_corrupt_checkpoint_is_not_resumed(tmp_path):
    run(tmp_path).go()
    file = tmp_path / "last.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        run(tmp_path, resume=True)
    assert file.read_bytes() == before


@pytest.mark.parametrize("save_every", [0, -3])
def test_save_every_must_be_positive(tmp_path, save_every):
    with pytest.raises(ValueError, match=f"save_every must be 1 or more, got {save_every}"):
        run(tmp_path, save_every=save_every)


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

    def loss(denoiser, x):
        calls.append(None)
        return real(denoiser, x) * (value if len(calls) >= step else 1)

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
    assert not list(tmp_path.iterdir())


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


def test_ctrl_c_finishes_the_update_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    real = module.simple_loss
    calls = []

    def loss(denoiser, x):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # in the midst of update 3
        return real(denoiser, x)

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
    for name in ("toaster", "cuda:99", ""):
        with pytest.raises(ValueError, match=f"device {name!r} cannot be used here") as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)


def test_flatten():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "c": 2, "e": 3}
