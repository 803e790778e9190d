"""Train diffusion models and draw samples from them."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minddpm.config import PRESETS, Config


@dataclass(frozen=True)
class Train:
    """Train a model, or go on training it."""

    config: Config
    out: Path
    """Folder for the checkpoint and the sample grids."""
    resume: bool = False
    """Go on from the checkpoint in `out`, exactly as if never stopped."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best one here."""
    root: str = "data"
    """Where downloaded data sets are kept."""
    save_every: int = 500
    """Updates from one checkpoint and sample grid to the next."""
    keep: int = 2
    """Checkpoints that stay: the last ones. The best averaged weights stay besides."""
    compile: bool = True
    """On a GPU, let torch compile the network: a slow first minute, then faster updates."""
    channels_last: bool = True
    """On a GPU, store images with their channels together: faster convolutions."""
    fused: bool = True
    """On a GPU, update all weights in one kernel."""

    def __call__(self) -> None:
        from minddpm import processes
        from minddpm.run import Run

        try:
            Run(**vars(self)).go()
        finally:
            processes.leave()


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    sampler: Literal[
        "ddim",
        "ancestral",
        "heun",
        "dpm-solver",
        "dpm-solver-3m",
        "dpm-solver-single-2",
        "dpm-solver-single-3",
        "reverse-diffusion",
        "predictor-corrector",
    ] = "ddim"
    """The step."""
    steps: int = 50
    """Steps a sample: a network call each, two with heun, predictor-corrector and
    dpm-solver-single-2, three with dpm-solver-single-3."""
    grid: Literal["uniform", "quadratic", "ddim-quadratic", "log-snr", "karras"] = "uniform"
    """How the steps are spread over time."""
    label: tuple[int, ...] = ()
    """After the model's name: the class to draw, or several, an equal share each."""
    guidance: float = 1.0
    """How much of what the label changes: 1 as trained, more overdoes it, 0 ignores it."""
    eta: float | None = None
    """Noise of ddim (0 unless given: none; 1: ancestral) or reverse-diffusion (1; 0: an ODE)."""
    seed: int = 0
    """The same seed gives the same samples, with the same batch."""
    batch: int = 256
    """Samples at a time."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Number format of the network's arithmetic; auto: the GPU's best."""

    def work(self, denoiser, n: int) -> tuple:
        """The arguments of `generate.samples`: (denoiser, n, grid, step) and options."""
        from minddpm.samplers import GRIDS, STEPS

        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.eta is not None and self.sampler not in ("ddim", "reverse-diffusion"):
            raise ValueError(f"eta belongs to ddim and reverse-diffusion, not to {self.sampler}")
        grid = GRIDS[self.grid](denoiser.schedule, self.steps)
        options = {"seed": self.seed, "precision": self.precision}
        options |= {} if self.eta is None else {"eta": self.eta}
        if self.label:
            options |= {"labels": self._labels(denoiser.net.classes, n), "scale": self.guidance}
        elif self.guidance != 1:
            raise ValueError("guidance needs a class to guide to: add --label")
        return (denoiser, n, grid, STEPS[self.sampler]), options

    def _labels(self, classes: int, n: int) -> list[int]:
        if n < len(self.label):
            raise ValueError(f"{n} samples cannot show {len(self.label)} classes: raise -n")
        for label in self.label:
            if not 0 <= label < classes:
                has = f"only 0..{classes - 1}" if classes else "it was trained without classes"
                raise ValueError(f"the model has no class {label}: {has}")
        return [self.label[i * len(self.label) // n] for i in range(n)]

    def __str__(self) -> str:
        eta = "" if self.eta is None else f", eta {self.eta:g}"
        precision = "" if self.precision == "fp32" else f", {self.precision}"
        names = " ".join(map(str, self.label))
        kinds = f", classes {names}, guidance {self.guidance:g}" if self.label else ""
        how = f"{self.sampler}, {self.steps} steps, {self.grid} grid{eta}{precision}{kinds}"
        return f"{how}, seed {self.seed}"


@dataclass(frozen=True)
class Sample:
    """Draw samples and write them as one picture."""

    model: Annotated[str, tyro.conf.Positional] = "digits"
    """A checkpoint file, a run's folder, or the name of shipped weights."""
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 64
    """Number of samples."""
    sampling: Sampling = field(default_factory=Sampling)
    frames: int = 0
    """Stops on the way to show: a strip in a .png; a .gif or .webp has 25 unless told."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best one here."""
    out: Path = Path("samples.png")
    """The file to write: .png, .gif, .webp, or .npz for an array `images` (N, H, W, C)."""

    def __call__(self) -> None:
        from minddpm import checkpoint, generate, processes
        from minddpm.run import pick_device

        self._check(generate.SUFFIXES)
        try:
            device = processes.join(pick_device(self.device))
            denoiser = checkpoint.load(self.model, device)
            work, options = self.sampling.work(denoiser, self.n)
            self.out.parent.mkdir(parents=True, exist_ok=True)  # or fail before the work, not after
            frames = self.frames
            if self.out.suffix.lower() in (".gif", ".webp"):
                frames = frames or min(25, len(work[2]))
            if frames and self.n > self.sampling.batch:
                raise ValueError(f"frames show one batch: draw -n {self.sampling.batch} at most")
            if frames:
                _, pixels = generate.path(*work, frames, **options)
            else:
                pixels = generate.samples(*work, batch=self.sampling.batch, **options)
            if processes.place()[0] == 0:
                generate.write(self.out, pixels)
                print(f"{self.n} samples are in {self.out}")
        finally:
            processes.leave()

    def _check(self, suffixes: tuple[str, ...]) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if self.out.suffix.lower() not in suffixes or self.out.is_dir():
            raise ValueError(f"out must name a {', '.join(suffixes)} file, got {str(self.out)!r}")
        if self.frames and self.out.suffix.lower() == ".npz":
            raise ValueError("frames are for pictures: choose a .png, .gif or .webp, or no frames")


@dataclass(frozen=True)
class Evaluate:
    """Measure a model: the distance of its samples from data, and its bits per dimension."""

    model: Annotated[str, tyro.conf.Positional] = "digits"
    """A checkpoint file, a run's folder, or the name of shipped or published weights."""
    data: str = "cifar10"
    """What to compare with: a data set, an .npz file or a folder."""
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 50_000
    """Number of samples; 0 for none. An FID is comparable only with 50,000."""
    sampling: Sampling = field(default_factory=Sampling)
    features: Literal["inception", "classifier"] = "inception"
    """Where to measure: the reference Inception, downloaded (FID), or a classifier trained here."""
    bits: int = 0
    """Number of test images whose bits per dimension to bound, by T network calls each."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best one here."""
    root: str = "data"
    """Where downloaded data sets and the classifier are kept."""

    def __call__(self) -> None:
        from minddpm import checkpoint, data, generate, metrics, processes
        from minddpm.run import pick_device

        if 1 in (self.n, self.bits) or min(self.n, self.bits) < 0 or not (self.n or self.bits):
            raise ValueError("ask for two or more samples (-n), or --bits of two or more images")
        try:
            device = processes.join(pick_device(self.device))
            denoiser = checkpoint.load(self.model, device)
            shape = denoiser.net.shape
            train = processes.in_turn(  # the first process downloads
                lambda: data.load(self.data, "train", self.root, shape[1])
            )
            if train.pixels.shape[1:] != shape:
                raise ValueError(
                    f"{self.model} makes images of shape {shape}, and those of {self.data} have "
                    f"{tuple(train.pixels.shape[1:])}: choose --data of that shape"
                )
            if self.n:
                work, options = self.sampling.work(denoiser, self.n)
                if not processes.place()[0]:  # or fail before the work, not after
                    metrics.check_kind(self.features, train, self.root, device)
                fake = generate.samples(*work, batch=self.sampling.batch, **options)
            if processes.place()[0]:
                return
            if self.n:
                print(f"{self.n:,} samples of {self.model} ({self.sampling})")
                print(f"against the {len(train.pixels):,} training images of {self.data}:")
                for line in metrics.report(self.features, train, fake, self.root, device):
                    print(line)
            if self.bits:
                self._bits(denoiser, data.load(self.data, "test", self.root, shape[1]).pixels)
        finally:
            processes.leave()

    def _bits(self, denoiser, images) -> None:
        from minddpm import checkpoint, data, metrics
        from minddpm.samplers import log_snr_grid

        images, schedule = images[: self.bits], denoiser.schedule
        if len(images) < 2:
            raise ValueError(f"bits need two images or more, and {self.data} holds {len(images)}")
        kind = "test images" if self.data in data.NAMED else "images"
        print(f"bits per dimension, at most, of {len(images):,} {kind} of {self.data}:")
        if checkpoint.has_seen(self.model, self.data):
            print("(the model was trained on them: a new image may cost more)")
        ways = {"variational bound": None}
        if schedule.signal[-1] > 0 and schedule.T > 1:  # or the flow has no beginning
            ways["probability flow"] = log_snr_grid(schedule, min(100, schedule.T))[:-1]
        for name, grid in ways.items():
            mean, error = metrics.bits(denoiser, images, grid)
            print(f"{mean:.3f} +- {error:.3f} by the {name}")


@dataclass(frozen=True)
class Export:
    """Write a run's averaged weights: a small file to share and sample, or a diffusers pipeline."""

    run: Annotated[str, tyro.conf.Positional]  # a Path would make ./digits the shipped digits
    """A run's folder, or a checkpoint file."""
    out: Annotated[Path, tyro.conf.Positional]
    """The .safetensors file to write, in half precision; or a folder, for diffusers."""

    def __call__(self) -> None:
        from minddpm import checkpoint

        checkpoint.export(self.run, self.out)
        print(f"weights of {self.run} are in {self.out}")


def main(args: list[str] | None = None) -> None:
    """Run the command line; a mistake in the input ends it with one line and exit status 1."""
    trains = tyro.extras.subcommand_type_from_defaults(
        {name: Train(config, Path("runs") / name) for name, (_, config) in PRESETS.items()},
        {name: text for name, (text, _) in PRESETS.items()},
        prefix_names=False,
    )
    command = tyro.cli(
        Annotated[trains, tyro.conf.subcommand("train", description=Train.__doc__)]
        | Annotated[Sample, tyro.conf.subcommand("sample", description=Sample.__doc__)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate", description=Evaluate.__doc__)]
        | Annotated[Export, tyro.conf.subcommand("export", description=Export.__doc__)],
        prog="minddpm",
        description=__doc__,
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        command()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"minddpm: {error}")
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit("minddpm: out of memory: lower --batch-size or --batch, or raise --accumulate")
    except KeyboardInterrupt:
        sys.exit("minddpm: interrupted")
