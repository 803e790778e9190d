"""Train diffusion models and draw samples from them."""

import sys
from dataclasses import dataclass
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

    def __call__(self) -> None:
        from minddpm.run import Run

        Run(self.config, self.out, self.resume, self.device, self.root, self.save_every).go()


@dataclass(frozen=True)
class Sample:
    """Draw samples and write them as one picture."""

    model: Annotated[str, tyro.conf.Positional] = "digits"
    """A checkpoint file, a run's folder, or the name of shipped weights."""
    n: int = 64
    """Number of samples."""
    sampler: Literal["ddim", "ancestral"] = "ddim"
    """The step."""
    steps: int = 50
    """Network calls a sample."""
    grid: Literal["uniform", "quadratic"] = "uniform"
    """How the steps are spread over time."""
    eta: float = 0.0
    """DDIM's noise: 0 deterministic, 1 ancestral."""
    seed: int = 0
    """The same seed gives the same samples."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best one here."""
    out: Path = Path("samples.png")
    """The picture to write."""

    def __call__(self) -> None:
        import torch

        from minddpm import checkpoint, viz
        from minddpm.run import pick_device
        from minddpm.samplers import GRIDS, STEPS, sample

        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta belongs to the sampler ddim, not to {self.sampler}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        if self.out.suffix.lower() != ".png" or self.out.is_dir():
            raise ValueError(f"out must name a .png file, got {str(self.out)!r}")
        device = pick_device(self.device)
        denoiser = checkpoint.load(self.model, device)
        generator = torch.Generator(device).manual_seed(self.seed)
        x = torch.randn(self.n, *denoiser.net.shape, generator=generator, device=device)
        options = {"eta": self.eta} if self.sampler == "ddim" else {}
        grid = GRIDS[self.grid](denoiser.schedule.T, self.steps)
        x = sample(denoiser, x, grid, STEPS[self.sampler], generator=generator, **options)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_bytes(viz.sheet(x))
        print(f"{self.n} samples are in {self.out}")


@dataclass(frozen=True)
class Export:
    """Write a run's averaged weights in half precision: a small file to share and sample."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or a checkpoint file."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write."""

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
    except KeyboardInterrupt:
        sys.exit("minddpm: interrupted")
