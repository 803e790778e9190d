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
class Sample:
    """Draw samples and write them as one picture."""

    model: Annotated[str, tyro.conf.Positional] = "digits"
    """A checkpoint file, a run's folder, or the name of shipped weights."""
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 64
    """Number of samples."""
    sampler: Literal[
        "ddim", "ancestral", "heun", "dpm-solver", "reverse-diffusion", "predictor-corrector"
    ] = "ddim"
    """The step."""
    steps: int = 50
    """Steps a sample, a network call each; two with heun and predictor-corrector."""
    grid: Literal["uniform", "quadratic", "log-snr", "karras"] = "uniform"
    """How the steps are spread over time."""
    eta: float | None = None
    """Noise of ddim (0 unless given: none; 1: ancestral) or reverse-diffusion (1; 0: an ODE)."""
    seed: int = 0
    """The same seed gives the same samples."""
    batch: int = 256
    """Samples at a time."""
    frames: int = 0
    """Stops on the way to show: a strip in a .png; a .gif or .webp has 25 unless told."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best one here."""
    out: Path = Path("samples.png")
    """The file to write: .png, .gif, .webp, or .npz for an array `images` (N, H, W, C)."""

    def __call__(self) -> None:
        from minddpm import checkpoint, generate, processes
        from minddpm.run import pick_device
        from minddpm.samplers import GRIDS, STEPS

        self._check(generate.SUFFIXES)
        try:
            device = processes.join(pick_device(self.device))
            denoiser = checkpoint.load(self.model, device)
            grid = GRIDS[self.grid](denoiser.schedule, self.steps)
            work = denoiser, self.n, grid, STEPS[self.sampler]
            options = {"seed": self.seed} | ({} if self.eta is None else {"eta": self.eta})
            frames = self.frames
            if self.out.suffix.lower() in (".gif", ".webp"):
                frames = frames or min(25, len(grid))
            if frames:
                _, pixels = generate.path(*work, frames, **options)
            else:
                pixels = generate.samples(*work, batch=self.batch, **options)
            if processes.place()[0] == 0:
                generate.write(self.out, pixels)
                print(f"{self.n} samples are in {self.out}")
        finally:
            processes.leave()

    def _check(self, suffixes: tuple[str, ...]) -> None:
        for name in ("n", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eta is not None and self.sampler not in ("ddim", "reverse-diffusion"):
            raise ValueError(f"eta belongs to ddim and reverse-diffusion, not to {self.sampler}")
        if self.out.suffix.lower() not in suffixes or self.out.is_dir():
            raise ValueError(f"out must name a {', '.join(suffixes)} file, got {str(self.out)!r}")
        if self.frames and self.out.suffix.lower() == ".npz":
            raise ValueError("frames are for pictures: choose a .png, .gif or .webp, or no frames")


@dataclass(frozen=True)
class Export:
    """Write a run's averaged weights: a small file to share and sample, or a diffusers pipeline."""

    run: Annotated[Path, tyro.conf.Positional]
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
