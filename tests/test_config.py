"""A config survives JSON, presets are what they say, and impossible values get one line."""

import json
import math
from dataclasses import asdict, fields, replace

import pytest
import torch

from minddpm import checkpoint
from minddpm.config import PRESETS, Config, ModelConfig, TrainConfig, from_dict
from minddpm.run import flatten
from minddpm.schedule import cosine, linear
from minddpm.train import PRECISIONS

CONFIGS = [config for _, config in PRESETS.values()]
UNUSUAL = Config(
    data="a folder",
    split="test",
    size=48,
    model=ModelConfig(width=8, multipliers=(3,), attention=(), T=30, variance="learned"),
    train=TrainConfig(steps=1, learning_rate=1e-5, grad_clip=math.inf, flip=False, seed=2**40),
)


@pytest.mark.parametrize("config", [*CONFIGS, UNUSUAL])
def test_a_config_survives_json(config):
    assert from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_what_a_dict_lacks_has_its_default():
    assert from_dict({}) == Config()
    assert from_dict({"model": {"T": 7}}) == Config(model=ModelConfig(T=7))


def test_the_cifar10_preset_is_the_papers_recipe():
    """DDPM appendix B and the released scripts; each field is typed out here once more."""
    assert asdict(PRESETS["cifar10"][1]) == {
        "data": "cifar10",
        "split": "train",
        "size": 32,
        "model": {
            "width": 128,
            "multipliers": (1, 2, 2, 2),
            "blocks": 2,
            "attention": (16,),
            "dropout": 0.1,
            "schedule": "linear",
            "T": 1000,
            "predicts": "eps",
            "variance": "large",
            "classes": 0,
        },
        "train": {
            "steps": 800_000,
            "batch_size": 128,
            "learning_rate": 2e-4,
            "warmup": 5000,
            "cooldown": 0,
            "accumulate": 1,
            "grad_clip": 1.0,
            "ema_decay": 0.9999,
            "flip": True,
            "precision": "auto",
            "drop_label": 0.1,
            "seed": 0,
        },
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_name_their_data(name):
    text, config = PRESETS[name]
    assert text
    assert config.data == name.partition("-")[0]
    channels, size = {"digits": (1, 8), "mnist": (1, 32), "cifar10": (3, 32)}[config.data]
    net = checkpoint.build(config, channels, size).net
    assert net.shape == (channels, size, size)
    attended = set(config.model.attention)
    assert attended <= {size >> level for level in range(len(config.model.multipliers))}
    assert config.train.warmup + config.train.cooldown <= config.train.steps


@pytest.mark.parametrize(("variance", "factor"), [("small", 1), ("large", 1), ("learned", 2)])
def test_a_learned_variance_doubles_the_outputs(variance, factor):
    config = replace(UNUSUAL, model=replace(UNUSUAL.model, variance=variance))
    denoiser = checkpoint.build(config, channels=3, size=4)
    x = torch.zeros(2, 3, 4, 4)
    assert denoiser.net(x, torch.tensor([1, 30])).shape == (2, 3 * factor, 4, 4)
    assert denoiser(x, 30).x0.shape == x.shape
    assert denoiser.variance == variance


def test_build_hands_every_model_field_on():
    def build(**changed):
        model = replace(UNUSUAL.model, **{"T": 30, **changed})
        return checkpoint.build(replace(UNUSUAL, model=model), channels=1, size=4)

    def parameters(**changed):
        return sum(p.numel() for p in build(**changed).net.parameters())

    counts = [
        parameters(),
        parameters(width=16),
        parameters(multipliers=(3, 2)),
        parameters(blocks=3),
        parameters(attention=(4,)),
        parameters(variance="small"),
    ]
    assert len(set(counts)) == len(counts)
    net = build(dropout=0.25).net
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert build(predicts="v").predicts == "v"
    for name, schedule in (("linear", linear), ("cosine", cosine)):
        built = build(schedule=name, T=40).schedule.signal
        torch.testing.assert_close(built, schedule(40).signal, rtol=0, atol=0)


def test_the_names_of_all_fields_are_different():
    """So a flag and a line about a changed flag need no prefix."""
    names = [f.name for cls in (Config, ModelConfig, TrainConfig) for f in fields(cls)]
    assert len(names) == len(set(names))
    assert set(flatten(asdict(Config()))) == set(names) - {"model", "train"}


def test_precisions_are_those_the_trainer_knows():
    for precision in PRECISIONS:
        assert TrainConfig(precision=precision).precision == precision


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (ModelConfig, "T", 0, "T must be 1 or more, got 0"),
        (ModelConfig, "width", 6, "width must be a positive multiple of 4, got 6"),
        (ModelConfig, "width", 0, "width must be a positive multiple of 4, got 0"),
        (ModelConfig, "multipliers", (), "multipliers must be at least one, each positive"),
        (ModelConfig, "multipliers", (1, 0), "multipliers must be at least one, each positive"),
        (ModelConfig, "blocks", 0, "blocks must be 1 or more"),
        (ModelConfig, "dropout", 2.0, r"dropout must be in \[0, 1\), got 2.0"),
        (ModelConfig, "dropout", 1.0, r"dropout must be in \[0, 1\), got 1.0"),
        (ModelConfig, "dropout", math.nan, r"dropout must be in \[0, 1\), got nan"),
        (ModelConfig, "schedule", "square", "one of linear, cosine, straight, got 'square'"),
        (ModelConfig, "predicts", "x1", "one of eps, x0, v, velocity, got 'x1'"),
        (ModelConfig, "variance", "huge", "variance must be one of small, large, learned, got"),
        (TrainConfig, "steps", 0, "steps must be 1 or more, got 0"),
        (TrainConfig, "batch_size", 0, "batch_size must be 1 or more, got 0"),
        (TrainConfig, "learning_rate", -1.0, "learning_rate must be positive and finite"),
        (TrainConfig, "learning_rate", math.nan, "learning_rate must be positive and finite"),
        (TrainConfig, "warmup", -1, "warmup must be 0 or more"),
        (TrainConfig, "cooldown", -1, "cooldown must be 0 or more"),
        (TrainConfig, "grad_clip", 0.0, "grad_clip must be positive"),
        (TrainConfig, "ema_decay", 1.5, r"ema_decay must be in \[0, 1\), got 1.5"),
        (TrainConfig, "ema_decay", 1.0, r"ema_decay must be in \[0, 1\), got 1.0"),
        (
            TrainConfig,
            "precision",
            "fp8",
            "precision must be one of fp32, bf16, fp16, auto, got 'fp8'",
        ),
        (ModelConfig, "classes", -1, "classes must be 0 or more, got -1"),
        (TrainConfig, "drop_label", 1.1, r"drop_label must be in \[0, 1\], got 1.1"),
        (TrainConfig, "drop_label", -0.1, r"drop_label must be in \[0, 1\], got -0.1"),
        (TrainConfig, "seed", -1, "seed must be in 0.."),
        (TrainConfig, "seed", 2**63, "seed must be in 0.."),
        (Config, "size", 0, "size must be 1 or more"),
        (Config, "split", "valid", "split must be one of train, test, all, got 'valid'"),
    ],
)
def test_an_impossible_value_gets_one_line(part, field, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        part(**{field: value})
    assert "\n" not in str(caught.value)


def test_a_size_that_cannot_be_halved_gets_one_line():
    with pytest.raises(ValueError, match="4 resolutions need a size divisible by 8, got 30"):
        checkpoint.build(Config(), channels=3, size=30)


@pytest.mark.parametrize(
    "values", [{"colour": "red"}, {"model": {"colour": "red"}}, {"train": {"colour": "red"}}]
)
def test_a_field_of_a_newer_version_gets_one_line(values):
    with pytest.raises(ValueError, match="unknown in a config: colour; .*upgrade"):
        from_dict(values)
