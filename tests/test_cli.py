"""The command line, from its help to a run that is interrupted and taken up again."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from minddpm import checkpoint
from minddpm.cli import main
from minddpm.config import PRESETS, Config, ModelConfig, TrainConfig

TINY = shlex.split(
    "--width 8 --multipliers 1 --blocks 1 --attention --T 10 --batch-size 8 --warmup 2 "
    "--cooldown 2 --dropout 0.2 --device cpu"
)


def train(out, *flags, steps=4):
    main(["train", "digits", "--out", str(out), *TINY, "--steps", str(steps), *map(str, flags)])


def said(capsys):
    """What was written since, as one line of words: boxes and line breaks taken out."""
    captured = capsys.readouterr()
    return " ".join(re.sub("[│─╭╮╰╯]", " ", captured.out + captured.err).split())


def mistake(call, *args):
    """The one line with which the command line refuses."""
    with pytest.raises(SystemExit) as caught:
        call(*args)
    line = caught.value.code
    assert isinstance(line, str)
    assert line.startswith("minddpm: ")
    assert "\n" not in line
    return line


# Help


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = said(capsys)
    assert "usage: minddpm" in text
    assert re.search("train .*sample ", text)


def test_help_of_train_names_the_presets(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = said(capsys)
    for name, (line, _) in PRESETS.items():
        assert name in text
        assert line.split(":")[0] in text


def test_help_of_a_preset_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "digits", "--help"])
    text = said(capsys)
    config = PRESETS["digits"][1]
    for part, cls in ((config, Config), (config.model, ModelConfig), (config.train, TrainConfig)):
        for name in {f.name for f in fields(cls)} - {"model", "train"}:
            value = getattr(part, name)
            default = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flag = f"--{name.replace('_', '-')}"
            pattern = rf"{flag}[ ,](?:(?!default:).)*\(default: {re.escape(default)}\)"
            assert re.search(pattern, text), (flag, default)


# Train


def test_train_then_sample(tmp_path, capsys):
    train(tmp_path / "run")
    files = (f.name for f in (tmp_path / "run").iterdir())
    names = sorted(name for name in files if "tfevents" not in name)
    assert names == ["best.safetensors", "last.safetensors", "log.csv", "samples-0000004.png"]
    assert "step 4 of 4" in said(capsys)
    out = tmp_path / "deeper" / "s.png"
    main(["sample", str(tmp_path / "run"), "--n", "9", "--steps", "5", "--out", str(out)])
    assert f"9 samples are in {out}" in said(capsys)
    assert np.asarray(Image.open(out)).shape == (2 * 72, 8 * 72)


def test_flags_reach_the_run(tmp_path):
    flags = shlex.split("--predicts x0 --variance learned --seed 7 --learning-rate 1e-3 --flip")
    train(tmp_path, *flags, "--precision", "bf16", "--split", "test", steps=2)
    config = checkpoint.read(tmp_path)[1]
    model, training = config.model, config.train
    assert (model.predicts, model.variance, model.attention) == ("x0", "learned", ())
    assert (model.width, model.multipliers, model.T, model.dropout) == (8, (1,), 10, 0.2)
    assert (training.seed, training.learning_rate, training.flip) == (7, 1e-3, True)
    assert (training.precision, config.split, training.steps) == ("bf16", "test", 2)


def test_train_on_a_folder_and_on_an_array_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    np.savez(tmp_path / "photos.npz", images=pixels[..., 0])
    train(tmp_path / "a", "--data", tmp_path / "photos", "--size", 16, steps=1)
    assert checkpoint.load(tmp_path / "a").net.shape == (3, 16, 16)
    train(tmp_path / "b", "--data", tmp_path / "photos.npz", steps=1)
    assert checkpoint.load(tmp_path / "b").net.shape == (1, 12, 12)


def test_flags_of_classes_reach_the_run(tmp_path):
    train(tmp_path, "--classes", "10", "--drop-label", "0.2", steps=1)
    config = checkpoint.read(tmp_path)[1]
    assert (config.model.classes, config.train.drop_label) == (10, 0.2)


def test_a_class_on_demand(tmp_path):
    drawn = {}
    for flags in ("", "--label 3", "--label 4", "--label 3 --guidance 2", "--label 3 --guidance 0"):
        args = ["sample", "digits-classes", "-n", "4", "--steps", "5"]
        main([*args, *shlex.split(flags), "--device", "cpu", "--out", str(tmp_path / "s.npz")])
        drawn[flags] = np.load(tmp_path / "s.npz")["images"].astype(int)
    any_digit, three, four, guided, ignored = drawn.values()
    assert (any_digit == ignored).all()
    assert (three != four).any() and (three != any_digit).any() and (guided != three).any()


def test_several_classes_share_the_samples_whatever_the_batch(tmp_path):
    """In batches of 4 the classes change within a batch; so do they in the frames of a film."""
    args = ["sample", "digits-classes", "--steps", "5", "--guidance", "2", "--device", "cpu", "-n"]
    whole = tmp_path / "whole.npz"
    main([*args, "6", "--label", "3", "4", "--batch", "4", "--out", str(whole)])
    drawn = np.load(whole)["images"]
    for label in "34":
        out = tmp_path / f"{label}.npz"
        main([*args, "6", "--label", label, "--batch", "4", "--out", str(out)])
        alone = np.load(out)["images"]
        same = (np.abs(alone.astype(int) - drawn.astype(int)) <= 1).all(axis=(1, 2, 3))
        assert same.tolist() == [label == "3"] * 3 + [label == "4"] * 3
    main([*args, "2", "--label", "3", "4", "--frames", "2", "--out", str(tmp_path / "a.png")])
    main([*args, "2", "--label", "3", "3", "--frames", "2", "--out", str(tmp_path / "b.png")])
    a, b = (np.asarray(Image.open(tmp_path / f"{x}.png")).astype(int) for x in "ab")
    rows = np.abs(a - b).reshape(2, -1).max(axis=1)
    assert rows[0] <= 1 < rows[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("digits --label 3", "the model has no class 3: it was trained without classes"),
        ("digits-classes --label 10", "the model has no class 10: only 0..9"),
        ("digits-classes --label 4 -1", "the model has no class -1: only 0..9"),
        ("digits-classes -n 2 --label 1 2 3", "2 samples cannot show 3 classes: raise -n"),
        ("digits-classes --guidance 2", "guidance needs a class to guide to: add --label"),
    ],
)
def test_a_class_that_is_not_there_gets_one_line(tmp_path, flags, message):
    out = tmp_path / "s.png"
    assert message in mistake(main, ["sample", *shlex.split(flags), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--device toaster", "device 'toaster' cannot be used here"),
        ("--data /nothing/here", "no data set or file '/nothing/here'"),
        ("--save-every 0", "save_every must be 1 or more, got 0"),
        ("--batch-size 2000", r"batch_size must lie in 1..1797 .*got 2000"),
        ("--multipliers 1 1 1 1 1", "5 resolutions need a size divisible by 16, got 8"),
        ("--schedule linear", "the betas, scaled by 1000 / T, must lie in .*take a larger T"),
        ("--resume", "holds no run to resume"),
    ],
)
def test_mistakes_in_a_run_get_one_line(tmp_path, flags, message):
    assert re.search(message, mistake(train, tmp_path / "run", *shlex.split(flags)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--T 0", "T must be 1 or more, got 0"),
        ("--ema-decay 1.5", r"ema_decay must be in \[0, 1\), got 1.5"),
        ("--multipliers", "multipliers must be at least one, each positive"),
        ("--width wide", "wide"),
        ("--schedule square", "square"),
        ("--colour red", "--colour"),
    ],
)
def test_impossible_flags_are_refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", *shlex.split(flags))
    assert caught.value.code == 2
    assert re.search(message, said(capsys))


def test_an_existing_run_is_kept(tmp_path):
    train(tmp_path, steps=1)
    before = (tmp_path / "last.safetensors").read_bytes()
    assert "already holds a run: add --resume" in mistake(train, tmp_path)
    line = mistake(train, tmp_path, "--resume", "--predicts", "x0")
    assert "was started with predicts = v, not x0: give the same flags" in line
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_a_full_disk_ends_with_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minddpm.checkpoint.save_file", full)
    assert "could not be written ([Errno 28] No space left" in mistake(train, tmp_path)
    assert [f.name for f in tmp_path.iterdir() if "tfevents" not in f.name] == ["log.csv"]


def test_too_little_memory_ends_with_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr("minddpm.data.load", full)
    assert "out of memory: lower --batch-size" in mistake(train, tmp_path)


def test_ctrl_c_outside_training_ends_with_one_line(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("minddpm.data.load", interrupt)
    assert mistake(train, tmp_path) == "minddpm: interrupted"


def test_ctrl_c_then_the_printed_command_equals_a_run_in_one_go(tmp_path):
    """In processes of their own, with dropout, at whatever step the signal arrives."""
    steps, out = 80, tmp_path / "two parts"
    flags = ["--out", str(out), *TINY, "--steps", str(steps), "--save-every", "20"]
    showing = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    process = subprocess.Popen(
        ["minddpm", "train", "digits", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=showing,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("samples-*")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert re.search(r"\d+/80 \[\d\d:\d\d<", stderr)  # steps, time gone and time left
    stopped, command = re.search(
        r"step (\d+) of 80: .*\nto go on: (minddpm .* --resume)\n", stdout
    ).groups()
    assert 20 <= int(stopped) < steps

    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120)
    whole = tmp_path / "whole"
    train(whole, steps=steps)
    names = ("last.safetensors", f"samples-{steps:07d}.png")
    assert_close(load_file(out / names[0]), load_file(whole / names[0]), rtol=0, atol=0)
    assert (out / names[1]).read_bytes() == (whole / names[1]).read_bytes()


def test_python_m_minddpm_is_minddpm():
    done = subprocess.run(
        [sys.executable, "-m", "minddpm", "sample", "nothing"], capture_output=True
    )
    assert done.returncode == 1
    assert done.stdout == b""
    assert re.fullmatch(rb"minddpm: no checkpoint 'nothing': [^\n]*\n", done.stderr)


# Sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train(folder)
    return str(folder)


def draw(model, out, flags=""):
    main(["sample", model, "--n", "4", "--device", "cpu", "--out", str(out), *shlex.split(flags)])
    return out.read_bytes()


OPTIONS = [
    "--steps 5",
    "--steps 10",
    "--steps 5 --grid quadratic",
    "--steps 5 --eta 0.5",
    "--steps 5 --sampler ancestral",
    "--steps 5 --seed 1",
    "--steps 5 --sampler heun",
    "--steps 5 --sampler dpm-solver",
    "--steps 5 --sampler dpm-solver-3m",
    "--steps 5 --sampler dpm-solver-single-2",
    "--steps 3 --sampler dpm-solver-single-3",
    "--steps 5 --sampler reverse-diffusion",
    "--steps 5 --sampler reverse-diffusion --eta 0",
    "--steps 5 --sampler predictor-corrector",
    "--steps 5 --grid log-snr",
    "--steps 5 --grid karras",
    "--steps 5 --grid ddim-quadratic",
    "--steps 5 --frames 3",
]


def test_each_option_changes_the_samples_and_each_repeats(model, tmp_path):
    pictures = [draw(model, tmp_path / "a.png", flags) for flags in OPTIONS]
    assert len(set(pictures)) == len(OPTIONS)
    assert [draw(model, tmp_path / "b.PNG", flags) for flags in OPTIONS] == pictures
    # Its variance is small: eta = 1 is the ancestral step on the same noise (DDIM sec. 4.1)
    draw(model, tmp_path / "a.png", "--steps 5 --eta 1")
    draw(model, tmp_path / "b.png", "--steps 5 --sampler ancestral")
    a, b = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("a.png", "b.png"))
    assert np.abs(a - b).max() <= 1  # of 255: float32


def test_samples_are_those_of_the_module(model, tmp_path):
    import torch

    from minddpm import checkpoint, viz
    from minddpm.samplers import ddim, sample, uniform_grid
    from minddpm.train import stream

    draw(model, tmp_path / "a.png", "--steps 5 --seed 3")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(stream(3, 0)))
    x = sample(checkpoint.load(model), x, uniform_grid(10, 5), ddim)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    for k in range(4):
        tile = viz.grid(x[k : k + 1], scale=8)[..., 0]
        assert (picture[:64, 72 * k : 72 * k + 64] == tile).all()


def test_choices_are_those_of_the_module():
    from minddpm.cli import Sampling
    from minddpm.samplers import GRIDS, STEPS

    for field, table in [("sampler", STEPS), ("grid", GRIDS)]:
        assert set(get_args(Sampling.__annotations__[field])) == set(table)


def test_an_array_file_of_many_batches_can_be_trained_on(model, tmp_path):
    from minddpm import data

    flags = "--n 10 --steps 5 --batch 4"
    draw(model, tmp_path / "a.npz", flags)
    images = np.load(tmp_path / "a.npz")["images"]
    assert (images.shape, images.dtype) == ((10, 8, 8, 1), np.uint8)
    assert data.load(str(tmp_path / "a.npz")).pixels.shape == (10, 1, 8, 8)
    draw(model, tmp_path / "b.npz", "--n 4 --steps 5 --batch 4")
    assert (np.load(tmp_path / "b.npz")["images"] == images[:4]).all()
    assert len({image.tobytes() for image in images}) == 10


@pytest.mark.parametrize("suffix, frames", [("gif", 6), ("webp", 4)])
def test_a_film_moves_from_noise_to_the_samples(model, tmp_path, suffix, frames):
    flags = "--steps 5" + (f" --frames {frames}" if frames < 6 else "")
    draw(model, tmp_path / f"a.{suffix}", flags)
    with Image.open(tmp_path / f"a.{suffix}") as film:
        assert (film.n_frames, film.format.lower()) == (frames, suffix)
        film.seek(frames - 1)
        last = np.asarray(film.convert("RGB")).astype(int)
    draw(model, tmp_path / "a.png", "--steps 5")
    still = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert last.shape == still.shape and np.abs(last - still).mean() < 8  # compression


def test_a_strip_shows_a_row_for_each_sample(model, tmp_path):
    draw(model, tmp_path / "a.png", "--steps 5 --frames 3")
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    assert strip.shape == (4 * 72, 3 * 72)
    draw(model, tmp_path / "b.png", "--steps 5")
    assert (strip[:64, 144:208] == np.asarray(Image.open(tmp_path / "b.png"))[:64, :64]).all()


@pytest.mark.slow
def test_two_processes_draw_what_one_does(model, tmp_path):
    common = ["-m", "minddpm", "sample", model, "-n", "10", "--batch", "3", "--steps", "5"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    for name, start in [("one", []), ("two", [*launch, "--rdzv-endpoint=localhost:0"])]:
        out = ["--device", "cpu", "--out", str(tmp_path / f"{name}.npz")]
        command = [sys.executable, *start, *common, *out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("10 samples are in") == 1
    one, two = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("one", "two"))
    assert np.abs(one.astype(int) - two).max() <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n 0", "n must be at least 1, got 0"),
        ("--steps 11", r"the number of steps must lie in 1..T = 10, got 11"),
        ("--steps 0", r"the number of steps must lie in 1..T = 10, got 0"),
        ("--steps 5 --eta 1.5", r"eta must lie in \[0, 1\], got 1.5"),
        ("--steps 5 --eta nan", r"eta must lie in \[0, 1\], got nan"),
        ("--steps 5 --eta 1 --sampler ancestral", "eta belongs to ddim and reverse-diffusion, not"),
        ("--steps 5 --eta -1 --sampler reverse-diffusion", "eta must be 0 or more"),
        ("--steps 5 --batch 0", "batch must be at least 1, got 0"),
        ("--steps 5 --seed -1", "seed must be 0 or more, got -1"),
        ("--steps 1 --grid ddim-quadratic", "the ddim-quadratic grid needs 2 steps or more"),
        ("--steps 5 --frames 3 --batch 3", "frames show one batch: draw -n 3 at most"),
        ("--steps 5 --frames 7", r"frames must lie in 2..6 \(the stops of the path\), got 7"),
        ("--steps 5 --frames 3 --out a.npz", "frames are for pictures"),
        ("--steps 5 --device toaster", "device 'toaster' cannot be used here"),
        (
            "--steps 5 --out picture.jpg",
            "out must name a .png, .gif, .webp, .npz file, got 'picture.jpg'",
        ),
        ("--steps 5 --out {model}", "out must name a .png"),
        ("--steps 5 --out {model}/last.safetensors/a.png", "last.safetensors"),
    ],
)
def test_mistakes_in_sampling_get_one_line(model, tmp_path, flags, message):
    out = tmp_path / "a.png"
    assert re.search(message, mistake(draw, model, out, flags.format(model=shlex.quote(model))))
    assert not out.exists()


def test_a_corrupt_checkpoint_gets_one_line(model, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    line = mistake(draw, str(tmp_path / "bad.safetensors"), tmp_path / "a.png")
    assert "is not a complete safetensors file" in line


def test_an_array_file_has_the_name_asked_for(model, tmp_path):
    draw(model, tmp_path / "a.NPZ", "--steps 5")
    assert [f.name for f in tmp_path.iterdir()] == ["a.NPZ"]


def test_a_place_that_cannot_be_is_refused_before_the_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr("minddpm.generate.samples", lambda *args, **options: 1 / 0)
    (tmp_path / "file").write_text("mine")
    assert "file" in mistake(draw, model, tmp_path / "file" / "a.png", "--steps 5")


@pytest.mark.parametrize("suffix", ["npz", "png"])
def test_what_was_there_stays_where_the_new_samples_cannot_be_written(
    model, tmp_path, monkeypatch, suffix
):
    out = tmp_path / f"a.{suffix}"
    before = draw(model, out, "--steps 5")

    def full(*args, **arrays):
        if suffix == "npz":
            args[0].write(b"half")
        raise OSError("No space left on device")

    place = {"npz": "minddpm.generate.np.savez_compressed", "png": "minddpm.generate.viz.sheet"}
    monkeypatch.setattr(place[suffix], full)
    assert "No space left" in mistake(draw, model, out, "--steps 5 --seed 1")
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def test_a_film_too_large_for_its_format_gets_one_line(model, tmp_path):
    line = mistake(draw, model, tmp_path / "a.webp", "--steps 1 --n 2000 --batch 2000")
    assert "a .webp cannot be (576, 18000) pixels large: draw fewer" in line


def test_samples_in_sixteen_bits_are_nearly_the_same_and_every_batch_has_them(model, tmp_path):
    flags = "--steps 5 -n 8 --batch 4"
    for name in ("fp32", "bf16"):
        draw(model, tmp_path / f"{name}.npz", f"{flags} --precision {name}")
    exact, coarse = (np.load(tmp_path / f"{n}.npz")["images"].astype(int) for n in ("fp32", "bf16"))
    for half in (slice(4), slice(4, 8)):
        off = np.abs(exact[half] - coarse[half])
        assert off.max() > 0 and off.mean() < 4  # of 255; bfloat16 has 8 bits
    draw(model, tmp_path / "auto.npz", f"{flags} --precision auto --device cpu")
    assert (np.load(tmp_path / "auto.npz")["images"] == exact).all()


def test_export_overwrites_nothing(model):
    last = os.path.join(model, "last.safetensors")
    size = os.path.getsize(last)
    assert "last.safetensors exists" in mistake(main, ["export", model, last])
    assert os.path.getsize(last) == size


def test_export_of_a_run_with_the_name_of_shipped_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("digits", steps=2)
    for source, width in [("./digits", 8), ("digits", 32)]:
        out = tmp_path / f"{width}.safetensors"
        main(["export", source, str(out)])
        assert checkpoint.read(out)[1].model.width == width


def test_export_writes_half_the_bytes_and_samples_alike(model, tmp_path, capsys):
    main(["export", model, str(tmp_path / "small.safetensors")])
    assert f"weights of {model} are in" in said(capsys)
    draw(model, tmp_path / "a.png", "--steps 5")
    draw(str(tmp_path / "small.safetensors"), tmp_path / "b.png", "--steps 5")
    a, b = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("a.png", "b.png"))
    assert np.abs(a - b).max() <= 2  # of 255; half precision has 11 bits
    size = (tmp_path / "small.safetensors").stat().st_size
    assert size < os.path.getsize(os.path.join(model, "last.safetensors")) / 4
