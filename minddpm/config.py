"""What defines a run, as data: fields named as in the papers' appendices, and presets."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin


@dataclass(frozen=True)
class ModelConfig:
    """The network and what it predicts."""

    width: int = 128
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each resolution, in units of the width; each resolution halves the last."""
    blocks: int = 2
    """Residual blocks a resolution."""
    attention: tuple[int, ...] = (16,)
    """Resolutions (in pixels) with self-attention."""
    dropout: float = 0.1
    """Probability of dropping a feature in training."""
    schedule: Literal["linear", "cosine", "straight"] = "linear"
    """Noise schedule."""
    T: int = 1000
    """Number of noising steps."""
    predicts: Literal["eps", "x0", "v", "velocity"] = "eps"
    """What the network predicts."""
    variance: Literal["small", "large", "learned"] = "large"
    """Variance of a reverse step."""
    classes: int = 0
    """Number of classes that the images' labels tell apart; 0 to train without labels."""

    def __post_init__(self):
        check(
            self,
            width=(self.width > 0 and self.width % 4 == 0, "a positive multiple of 4"),
            multipliers=(min(self.multipliers, default=0) > 0, "at least one, each positive"),
            blocks=(self.blocks > 0, "1 or more"),
            dropout=(0 <= self.dropout < 1, "in [0, 1)"),
            T=(self.T > 0, "1 or more"),
            classes=(self.classes >= 0, "0 or more"),
        )


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    steps: int = 800_000
    """Parameter updates in all."""
    batch_size: int = 128
    """Images an update."""
    learning_rate: float = 2e-4
    """Adam's step size, reached after the warmup."""
    warmup: int = 5000
    """Updates over which the learning rate rises from 0."""
    cooldown: int = 0
    """Last updates, over which the learning rate falls to 0."""
    accumulate: int = 1
    """Parts in which a batch passes through the network, to save memory."""
    grad_clip: float = 1.0
    """Largest norm of a gradient."""
    ema_decay: float = 0.9999
    """Decay of the moving average of the weights, an update."""
    flip: bool = True
    """Mirror half of the images, left to right."""
    drop_label: float = 0.1
    """Share of the images trained on without their label; with 0 only labels can be drawn."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Number format of the network's arithmetic; weights stay in fp32. auto: the GPU's best."""
    seed: int = 0
    """Everything random in the run follows from it."""

    def __post_init__(self):
        check(
            self,
            steps=(self.steps > 0, "1 or more"),
            batch_size=(self.batch_size > 0, "1 or more"),
            learning_rate=(0 < self.learning_rate < float("inf"), "positive and finite"),
            warmup=(self.warmup >= 0, "0 or more"),
            cooldown=(self.cooldown >= 0, "0 or more"),
            accumulate=(self.accumulate >= 1, "1 or more"),
            grad_clip=(self.grad_clip > 0, "positive (inf for none)"),
            ema_decay=(0 <= self.ema_decay < 1, "in [0, 1)"),
            drop_label=(0 <= self.drop_label <= 1, "in [0, 1]"),
            seed=(0 <= self.seed < 2**63, "in 0..2^63 - 1"),
        )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: str = "cifar10"
    """digits, mnist, cifar10, an .npz file or a folder of images."""
    split: Literal["train", "test", "all"] = "train"
    """Which part of a named data set."""
    size: int = 32
    """Pixels a side to which a folder's images are resized."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network and what it predicts."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""

    def __post_init__(self):
        check(self, size=(self.size > 0, "1 or more"))


def check(config, **rules: tuple[bool, str]) -> None:
    """Raise ValueError for a field outside its choices, or whose rule (holds, need) is broken."""
    for f in fields(config):
        value = getattr(config, f.name)
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            raise ValueError(
                f"{f.name} must be one of {', '.join(get_args(f.type))}, got {value!r}"
            )
        holds, need = rules.get(f.name, (True, ""))
        if not holds:
            raise ValueError(f"{f.name} must be {need}, got {value!r}")


def from_dict(values: dict) -> Config:
    """The config of nested dicts from `dataclasses.asdict` or JSON; what they lack has its default.

    Raises ValueError for a field that this version does not know, or a value that cannot be.
    """
    parts = {"model": ModelConfig, "train": TrainConfig}
    built = {name: make(cls, values.get(name, {})) for name, cls in parts.items()}
    return make(Config, values | built)


def make(cls: type, values: dict):
    """A config dataclass of a dict, lists made tuples."""
    unknown = values.keys() - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(
            f"unknown in a config: {', '.join(sorted(unknown))}; a newer minddpm wrote it: upgrade"
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


DIGITS = Config(
    data="digits",
    split="all",
    model=ModelConfig(
        width=32,
        multipliers=(1, 2),
        blocks=1,
        attention=(4,),
        dropout=0.0,
        schedule="cosine",
        predicts="v",
        variance="small",
    ),
    train=TrainConfig(
        steps=1000,
        batch_size=64,
        learning_rate=2e-3,
        warmup=100,
        cooldown=500,
        ema_decay=0.995,
        flip=False,
    ),
)
MNIST = Config(
    data="mnist",
    model=ModelConfig(width=64, multipliers=(1, 2, 2), attention=(16,), schedule="cosine"),
    train=TrainConfig(
        steps=40_000,
        learning_rate=5e-4,
        warmup=1000,
        cooldown=10_000,
        ema_decay=0.999,
        flip=False,
        precision="auto",
    ),
)
CIFAR10_TINY = Config(
    model=ModelConfig(
        width=32,
        multipliers=(1, 2, 4),
        blocks=1,
        attention=(8,),
        dropout=0.0,
        schedule="cosine",
        predicts="v",
        variance="small",
        classes=10,
    ),
    train=TrainConfig(
        steps=11_000,
        batch_size=64,
        learning_rate=1e-3,
        warmup=500,
        cooldown=6000,
        ema_decay=0.998,
        drop_label=0.15,
        precision="auto",
    ),
)
CIFAR10_SMALL = Config(
    model=ModelConfig(
        multipliers=(1, 1, 2, 2), blocks=1, schedule="cosine", predicts="v", variance="small"
    ),
    train=TrainConfig(
        steps=60_000,
        batch_size=256,
        learning_rate=4e-4,
        warmup=1000,
        cooldown=20_000,
        ema_decay=0.9995,
        precision="auto",
    ),
)
CIFAR10 = Config(train=TrainConfig(precision="auto"))
PRESETS = {
    "digits": ("scikit-learn's 8 x 8 digits: minutes on two CPU cores", DIGITS),
    "mnist": ("MNIST, padded to 32 x 32: for a GPU", MNIST),
    "cifar10-tiny": ("CIFAR-10 by class, 2.7 M: an hour or two on two CPU cores", CIFAR10_TINY),
    "cifar10-small": ("CIFAR-10, a faster recipe: 60,000 updates of 18.9 M", CIFAR10_SMALL),
    "cifar10": ("CIFAR-10, the paper's recipe: 800,000 updates of the 35.7 M network", CIFAR10),
}
