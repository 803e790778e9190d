"""A training run in a folder: data, model, progress, checkpoints, sample grids, Ctrl-C."""

import math
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from minddpm import checkpoint, data, viz
from minddpm.config import Config
from minddpm.losses import hybrid_loss, simple_loss
from minddpm.prediction import Denoiser
from minddpm.samplers import ddim, sample, uniform_grid
from minddpm.train import Record, TrainState, train


class Run:
    """A run of `config` in the folder `out`, new or resumed; `go` trains it to its end.

    Raises ValueError when `out` holds a run and `resume` is not asked for, when it holds none and
    it is, or when the run there was started with another config (more steps are welcome).
    """

    def __init__(
        self, config: Config, out: Path, resume: bool, device: str, root: str, save_every: int
    ):
        self.config, self.out, self.save_every = config, Path(out), save_every
        self.last = self.out / "last.safetensors"
        if save_every < 1:
            raise ValueError(f"save_every must be 1 or more, got {save_every}")
        self._check(resume)
        device = pick_device(device)
        pixels = data.load(config.data, config.split, root, config.size).pixels.to(device)
        self.batch = data.Batches(
            pixels, config.train.batch_size, config.train.seed, config.train.flip
        )
        if pixels.shape[2] != pixels.shape[3]:
            raise ValueError(f"the images must be square, got {tuple(pixels.shape[2:])}: crop them")
        torch.manual_seed(config.train.seed)
        self.denoiser = checkpoint.build(config, *pixels.shape[1:3]).to(device)
        self.state = TrainState(self.denoiser.net, config.train)
        self.seconds = checkpoint.load_state(self.last, self.state)["seconds"] if resume else 0.0
        if self.state.step > config.train.steps:
            raise ValueError(
                f"the run in {self.out} has done {self.state.step} steps: ask for more"
            )
        self.out.mkdir(parents=True, exist_ok=True)

    def _check(self, resume: bool) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file, not a folder: choose another --out")
        if not resume:
            if self.last.exists():
                raise ValueError(
                    f"{self.out} already holds a run: add --resume, or choose another --out"
                )
            return
        if not self.last.exists():
            raise ValueError(f"{self.out} holds no run to resume: leave --resume out to start one")
        then, now = (flatten(asdict(c)) for c in (checkpoint.read(self.last)[1], self.config))
        changed = [
            f"{k} = {then[k]}, not {now[k]}" for k in now if k != "steps" and then[k] != now[k]
        ]
        if changed:
            raise ValueError(
                f"the run in {self.out} was started with {'; '.join(changed)}: "
                "give the same flags to resume it"
            )

    def go(self) -> None:
        """Train, showing progress, to the last step or to Ctrl-C; save, and say how to go on."""
        loss_fn = hybrid_loss if self.config.model.variance == "learned" else simple_loss
        updates = train(self.state, lambda x: loss_fn(self.denoiser, x), self.batch)
        steps, began = self.config.train.steps, time.monotonic() - self.seconds
        with (
            tqdm(total=steps, initial=self.state.step, unit="step") as bar,
            Interrupt() as interrupt,
        ):
            for record in updates:
                self.seconds = time.monotonic() - began
                bar.update()
                if record.step % 20 == 0 or record.step == steps:
                    self._report(bar, record)
                if interrupt.asked:
                    break
                if record.step % self.save_every == 0:
                    self.save()
        self.save()
        print(f"step {self.state.step:,} of {steps:,}: checkpoint and samples are in {self.out}")
        if self.state.step < steps:
            print(f"to go on: {command_line()} --resume")
        else:
            print(f"to sample: minddpm sample {shlex.quote(str(self.out))}")

    def _report(self, bar: tqdm, record: Record) -> None:
        loss = record.loss.item()
        self._insist(math.isfinite(loss), f"the loss is {loss}")
        rate = record.step * self.config.train.batch_size / max(1e-9, self.seconds)
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} images/s")

    def _insist(self, finite: bool, what: str) -> None:
        if not finite:
            raise FloatingPointError(
                f"{what} at step {self.state.step}: lower --learning-rate or take "
                f"--precision fp32; a checkpoint saved before in {self.out} is as it was"
            )

    def save(self) -> None:
        """Write the checkpoint and, from the averaged weights, a grid of 64 samples.

        Raises FloatingPointError, and writes nothing, where a weight is not finite.
        """
        finite = all(p.isfinite().all() for p in self.state.net.parameters())
        self._insist(finite, "a weight is not finite")
        checkpoint.save_state(
            self.last,
            self.state,
            self.config,
            command=command_line(),
            seconds=round(self.seconds),
            device=device_name(self.state.device),
            torch=torch.__version__,
        )
        averaged = Denoiser(self.state.ema.module.eval(), *reading(self.denoiser))
        generator = torch.Generator(self.state.device).manual_seed(0)
        x = torch.randn(64, *self.state.net.shape, generator=generator, device=self.state.device)
        steps = min(50, self.denoiser.schedule.T)
        x = sample(averaged, x, uniform_grid(self.denoiser.schedule.T, steps), ddim)
        (self.out / f"samples-{self.state.step:07d}.png").write_bytes(viz.sheet(x))


class Interrupt:
    """Within the block, the first Ctrl-C only sets `asked`: no update is cut in half."""

    def __enter__(self) -> "Interrupt":
        self.asked, self.before = False, signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)  # a second Ctrl-C stops at once

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)


def reading(denoiser: Denoiser) -> tuple:
    """What besides its network makes a Denoiser: (schedule, predicts, variance)."""
    return denoiser.schedule, denoiser.predicts, denoiser.variance


def pick_device(name: str) -> str:
    """The device of that name; for "auto" cuda, mps or cpu, the first that is here."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return name


def device_name(device: torch.device) -> str:
    """The device in words, for a checkpoint's facts."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def command_line() -> str:
    """The command that started this run, without --resume."""
    resume = ("--resume", "--no-resume")
    return shlex.join(["minddpm", *(a for a in sys.argv[1:] if a not in resume)])


def flatten(tree: dict) -> dict:
    """Nested dicts as one, the innermost names as keys."""
    pairs = [flatten(v) if isinstance(v, dict) else {k: v} for k, v in tree.items()]
    return {k: v for pair in pairs for k, v in pair.items()}
