"""The main job on real input: digits that a classifier of real digits recognizes.

A support vector machine with probabilities learns one random half of the real digits. The share of
the other half that it recognizes with probability 0.9 or more is the yardstick for 1,000 samples.
"""

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

from minddpm import checkpoint, data
from minddpm.cli import main
from minddpm.guidance import classifier_free, condition
from minddpm.samplers import ancestral, ddim, sample, uniform_grid


@pytest.fixture(scope="module")
def judge():
    """(recognize, real share): recognize maps pixels to (share recognized, share of each digit)."""
    pixels, labels = data.load("digits", "all")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
    learn, rest = order[:898], order[898:]
    classifier = CalibratedClassifierCV(SVC(gamma=0.001), ensemble=False)
    classifier.fit(features(pixels[learn]), labels[learn].numpy())

    def recognize(pixels):
        probability = classifier.predict_proba(features(pixels))
        digits = np.bincount(probability.argmax(1), minlength=10) / len(pixels)
        return (probability.max(1) >= 0.9).mean(), digits

    return recognize, recognize(pixels[rest])[0]


def features(pixels):
    """(N, 1, 8, 8) uint8 to (N, 64) on scikit-learn's scale, 0..16."""
    return pixels.flatten(1).numpy() / 255 * 16


def thousand(denoiser, step, steps):
    """1,000 samples (1000, 1, 8, 8) uint8."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1000, *denoiser.net.shape, generator=generator)
    grid = uniform_grid(denoiser.schedule.T, steps)
    return data.to_uint8(sample(denoiser, x, grid, step, generator=generator))


def hold(judge, pixels, bar, name, record_property):
    """Report both shares and the ratio; assert the ratio and that no digit is rare or common."""
    recognize, real = judge
    share, digits = recognize(pixels)
    record_property(
        "measured",
        f"{name}: recognized {share:.3f} of the samples, {real:.3f} of real digits, "
        f"ratio {share / real:.3f}; each digit {digits.min():.3f} to {digits.max():.3f}",
    )
    assert share / real >= bar
    assert digits.min() >= 0.05
    assert digits.max() <= 0.15


def test_the_judge_needs_both_halves_of_the_bar(judge):
    """Noise can be "recognized" too, but always as the same digits: the second half catches it."""
    recognize, real = judge
    assert 0.7 < real < 0.85
    noise = torch.randint(0, 256, (1000, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    share, digits = recognize(noise.to(torch.uint8))
    assert share > 0.4
    assert digits.min() < 0.05
    assert digits.max() > 0.15


@pytest.mark.parametrize(("step", "steps"), [(ddim, 50), (ancestral, 100)])
def test_shipped_digits_are_digits(judge, record_property, step, steps):
    pixels = thousand(checkpoint.load("digits"), step, steps)
    hold(judge, pixels, 0.95, f"shipped, {step.__name__}, {steps} steps", record_property)


def test_shipped_digits_with_classes_are_what_was_asked_for(judge):
    """Of 20 a class, every class is seen about as often; with guidance more are recognized."""
    recognize, real = judge
    denoiser = checkpoint.load("digits-classes")
    labels = torch.arange(200) % 10
    x = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    shares = []
    for guided in (condition(denoiser, labels), classifier_free(denoiser, labels, 2.0)):
        pixels = data.to_uint8(sample(guided, x, uniform_grid(1000, 20), ddim))
        share, digits = recognize(pixels)
        assert digits.min() >= 0.085
        assert digits.max() <= 0.115
        shares.append(share / real)
    assert 0.9 < shares[0] < shares[1]


SHIPPED = sorted(path.stem for path in checkpoint.SHIPPED.glob("*.safetensors"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_say_how_they_were_made(name):
    (path,) = checkpoint.candidates(name)
    size, minutes, command = {
        "cifar10-tiny": (6_000_000, 120, "minddpm train cifar10-small --data train.npz"),
    }.get(name, (3_000_000, 30, "minddpm train digits --split train"))
    assert path.stat().st_size <= size
    _, config, facts = checkpoint.read(path)
    assert facts["command"].startswith(command)
    assert "/tmp" not in facts["command"] and " /" not in facts["command"]
    assert ("--variance learned" in facts["command"]) == (config.model.variance == "learned")
    assert 0 < facts["seconds"] <= minutes * 60
    assert facts["step"] == config.train.steps


def test_shipped_weights_are_small_together_and_have_a_card():
    card = (checkpoint.SHIPPED / "README.md").read_text(encoding="utf-8")
    assert "digits" in SHIPPED and all(f"| `{name}` |" in card for name in SHIPPED)
    assert sum((checkpoint.SHIPPED / f"{n}.safetensors").stat().st_size for n in SHIPPED) < 10e6


def test_training_digits_from_nothing_gives_digits(judge, record_property, tmp_path):
    main(["train", "digits", "--out", str(tmp_path / "run")])
    _, _, facts = checkpoint.read(tmp_path / "run")
    pixels = thousand(checkpoint.load(tmp_path / "run"), ddim, 50)
    name = f"from nothing in {facts['seconds']} s, ddim, 50 steps"
    hold(judge, pixels, 0.85, name, record_property)
