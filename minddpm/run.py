"""A training run in a folder: data, model, progress, checkpoints, sample grids, Ctrl-C."""

import math
import os
import shlex
import signal
import sys
import time
import zlib
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from minddpm import checkpoint, data, processes, viz
from minddpm.config import Config
from minddpm.guidance import condition
from minddpm.likelihood import bound_estimate
from minddpm.log import Log
from minddpm.losses import draw, hybrid_loss, simple_loss
from minddpm.prediction import Denoiser
from minddpm.samplers import ddim, sample, uniform_grid
from minddpm.train import Record, TrainState, pick_precision, train

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None

FIXED = 512  # images on which the run watches itself


class Run:
    """A run of `config` in the folder `out`, new or resumed; `go` trains it to its end.

    save_every: updates between checkpoints; keep: how many of them stay. compile, channels_last,
    fused: what makes a GPU faster; on other devices they do nothing. Started by `torchrun`, the
    processes share each batch, and the first alone writes. Raises ValueError when `out` holds a run
    and `resume` is not asked for, when it holds none and it is, or when the run there was started
    with another config (more steps are welcome).
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        resume: bool = False,
        device: str = "auto",
        root: str = "data",
        save_every: int = 500,
        keep: int = 2,
        compile: bool = True,
        channels_last: bool = True,
        fused: bool = True,
    ):
        self.config, self.out, self.save_every, self.keep = config, Path(out), save_every, keep
        self.last = self.out / "last.safetensors"
        for name, value in [("save_every", save_every), ("keep", keep)]:
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.seconds, self.best, self.previous = 0.0, math.inf, None
        saved = self._find(resume)
        device = processes.join(pick_device(device))
        gpu = device.startswith("cuda")
        self._load_images(device, root)
        torch.manual_seed(config.train.seed)
        self.denoiser = checkpoint.build(config, *self.batches.pixels.shape[1:3]).to(device)
        self.format = torch.channels_last if gpu and channels_last else torch.contiguous_format
        self.denoiser.net.to(memory_format=self.format)
        train_config = replace(config.train, precision=pick_precision(config.train.precision, gpu))
        self.state = TrainState(self.denoiser.net, train_config, fused and gpu)
        if saved:
            tensors, _, facts = saved
            checkpoint.put_back(self.state, tensors, facts, self.out)
            exact = not Path(config.data).is_dir()  # decoded by another version, images may differ
            if exact and facts.get("data", self.checksum) != self.checksum:
                raise ValueError(
                    f"{config.data} no longer holds the images that the run in {self.out} began "
                    "with: bring them back, or begin anew with another --out"
                )
            self.seconds = facts.get("seconds", 0.0)
            if (self.out / "best.safetensors").exists():
                self.best = facts.get("best", math.inf)
        if self.state.step > config.train.steps:
            raise ValueError(
                f"the run in {self.out} has done {self.state.step} steps: ask for more"
            )
        self.learner = Denoiser(self._wrap(gpu and compile), *reading(self.denoiser))
        self.out.mkdir(parents=True, exist_ok=True)

    def _find(self, resume: bool) -> tuple | None:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file, not a folder: choose another --out")
        held = self.last.exists() or any(self.out.glob("step-*.safetensors"))
        if not resume:
            if held:
                raise ValueError(
                    f"{self.out} already holds a run: add --resume, or choose another --out"
                )
            if (self.out / "best.safetensors").exists():
                raise ValueError(
                    f"{self.out} holds the best of an earlier run: move it away, or choose "
                    "another --out"
                )
            return None
        if not held:
            raise ValueError(f"{self.out} holds no run to resume: leave --resume out to start one")
        try:
            saved = checkpoint.read_file(self.last)
            self.previous = saved[2]["step"]  # whole, and to be kept when the next one is written
        except ValueError:
            saved = checkpoint.read(self.out.absolute())
        then, now = (flatten(asdict(c)) for c in (saved[1], self.config))
        changed = [
            f"{k} = {then[k]}, not {now[k]}" for k in now if k != "steps" and then[k] != now[k]
        ]
        if changed:
            raise ValueError(
                f"the run in {self.out} was started with {'; '.join(changed)}: "
                "give the same flags to resume it"
            )
        return saved

    def _load_images(self, device: str, root: str) -> None:
        config, world = self.config, processes.place()[1]
        held_out = config.data in data.NAMED and config.split == "train"
        images, fixed = processes.in_turn(  # the first process downloads
            lambda: (
                images := data.load(config.data, config.split, root, config.size),
                data.load(config.data, "test", root) if held_out else images,
            )
        )
        pixels = images.pixels
        if pixels.shape[2] != pixels.shape[3]:
            raise ValueError(f"the images must be square, got {tuple(pixels.shape[2:])}: crop them")
        every = max(1, len(fixed.pixels) // FIXED)
        self.labels = self.fixed_labels = None
        if config.model.classes:
            data.check_labels(images.labels, config.model.classes)
            self.labels = images.labels.to(device)
            self.fixed_labels = fixed.labels[::every][:FIXED].to(device)
        if config.train.batch_size % (config.train.accumulate * world):
            raise ValueError(
                f"batch_size = {config.train.batch_size} must be a multiple of accumulate = "
                f"{config.train.accumulate} times the number of processes = {world}"
            )
        self.checksum = zlib.crc32(pixels.contiguous().numpy())
        if self.labels is not None:
            self.checksum = zlib.crc32(images.labels.contiguous().numpy(), self.checksum)
        batch = config.train.batch_size, config.train.seed, config.train.flip
        self.batches = data.Batches(pixels.to(device), *batch)
        self.fixed = data.to_model(fixed.pixels[::every][:FIXED]).to(device)

    def _wrap(self, compile: bool) -> torch.nn.Module:
        net = self.denoiser.net
        if processes.place()[1] > 1:
            net = self.state.replica = torch.nn.parallel.DistributedDataParallel(net)
        return torch.compile(net) if compile else net

    def _batch(self, k: int) -> tuple[torch.Tensor, ...]:
        x0 = self.batches(k).contiguous(memory_format=self.format)
        batch = x0, *draw(self.denoiser.schedule.T, x0, None, None)
        if self.labels is None:
            return batch
        drop, none = self.config.train.drop_label, self.config.model.classes
        return *batch, self.batches.labels(k, self.labels, drop, none)

    def go(self) -> None:
        """Train, showing progress, to the last step, Ctrl-C or SIGTERM; save, say how to go on."""
        loss_fn = hybrid_loss if self.config.model.variance == "learned" else simple_loss

        def loss(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
            x0, t, eps, *labels = batch
            return loss_fn(condition(self.learner, *labels), x0, t, eps)

        updates = train(self.state, loss, self._batch)
        (rank, world), steps = processes.place(), self.config.train.steps
        self.began, first = time.monotonic() - self.seconds, self.state.step
        self.mark = self.state.step, self.seconds
        silent = {"disable": True} if rank else {}
        with (
            nullcontext() if rank else alone(self.out),
            tqdm(total=steps, initial=self.state.step, unit="step", **silent) as bar,
            Interrupt() as interrupt,
        ):
            self.log = None if rank else Log(self.out, self.state.step)
            for record in updates:
                self.seconds = time.monotonic() - self.began
                bar.update()
                saves = record.step % self.save_every == 0 and record.step < steps
                meets = record.step % 20 == 0
                row = self._report(bar, record) if meets or saves or record.step == steps else {}
                if row and world > 1:  # all of them stop at the same step, or none
                    interrupt.asked = processes.mean(torch.tensor(float(interrupt.asked))) > 0
                if interrupt.asked and (world == 1 or row):
                    break
                if saves:
                    row |= self.save()
                if row and self.log:
                    self.log.write(self.state.step, **row)
            row = self.save()
        if self.log:
            if self.state.step > first:
                self.log.write(self.state.step, seconds=self.seconds, **row)
            self.log.close()
            self._farewell()

    def _farewell(self) -> None:
        step, steps = self.state.step, self.config.train.steps
        print(f"step {step:,} of {steps:,}: checkpoint and samples are in {self.out}")
        if step < steps:
            print(f"to go on: {command_line()} --resume")
        else:
            name = self.out if len(self.out.parts) > 1 else f"./{self.out}"  # not shipped weights
            flags = f" --steps {self.denoiser.schedule.T}" if self.denoiser.schedule.T < 50 else ""
            if self.config.model.classes and not self.config.train.drop_label:
                flags += " --label 0"  # "no class" was never trained
            print(f"to sample: minddpm sample {shlex.quote(str(name))}{flags}")

    def _report(self, bar: tqdm, record: Record) -> dict:
        loss = processes.mean(record.loss)
        self._insist(math.isfinite(loss), f"the loss is {loss}")
        (step, seconds), self.mark = self.mark, (record.step, self.seconds)
        images = (record.step - step) * self.config.train.batch_size
        rate = images / max(1e-9, self.seconds - seconds)
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} images/s")
        row = {"seconds": self.seconds, "loss": loss, "grad_norm": record.grad_norm.item()}
        row |= {"learning_rate": record.learning_rate, "images_per_second": rate}
        if self.state.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated(self.state.device) / 2**30
        return row

    def _insist(self, finite: bool, what: str) -> None:
        if not finite:
            raise FloatingPointError(
                f"{what} at step {self.state.step}: lower --learning-rate or take "
                f"--precision fp32; a checkpoint saved before in {self.out} is as it was"
            )

    def save(self) -> dict:
        """Write the checkpoint and a grid of the averaged weights' samples: 64, or 8 a class.

        Returns the averaged weights' loss and bound on the fixed images. Raises FloatingPointError,
        and writes nothing, where a weight is not finite.
        """
        finite = all(p.isfinite().all() for p in self.state.net.parameters())
        self._insist(finite, "a weight is not finite")
        if processes.place()[0]:
            return {}
        parts = self.config.train.accumulate * processes.place()[1]
        size = max(1, 4 * self.config.train.batch_size // parts)  # without gradients, 4 times more
        net = InParts(self.state.ema.module.eval(), size)
        averaged = Denoiser(net, *reading(self.denoiser))
        row = watch(condition(averaged, self.fixed_labels), self.fixed)
        better, self.best = row["fixed_loss"] < self.best, min(self.best, row["fixed_loss"])
        facts = dict(
            command=command_line(),
            seconds=round(self.seconds),
            best=self.best,
            data=self.checksum,
            device=device_name(self.state.device),
            torch=torch.__version__,
        )
        if better:  # first: what `last` says of the best is then true whenever this stops
            checkpoint.save_average(self.out / "best.safetensors", self.state, self.config, **facts)
        older = self.keep > 1 and self.previous is not None
        keep_as = self.out / f"step-{self.previous:07d}.safetensors" if older else None
        if self.previous != self.state.step:
            checkpoint.save_state(self.last, self.state, self.config, keep_as, **facts)
        self.previous = self.state.step
        for file in sorted(self.out.glob("step-*.safetensors"), reverse=True)[self.keep - 1 :]:
            file.unlink()
        classes = torch.arange(min(self.config.model.classes, 16)).repeat_interleave(8)
        pictured = condition(averaged, classes) if len(classes) else averaged
        picture = viz.sheet(draw_samples(pictured, len(classes) or 64))
        (self.out / f"samples-{self.state.step:07d}.png").write_bytes(picture)
        self.log.picture(self.state.step, picture)
        return row


@contextmanager
def alone(out: Path):
    """Within the block no other process trains in `out`; ValueError where one does already."""
    with ExitStack() as stack:
        if fcntl:
            folder = os.open(out, os.O_RDONLY)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"another process trains in {out}: choose another --out"
                ) from error
            except OSError:  # a mounted drive may have no locks
                pass
        yield


class InParts(torch.nn.Module):
    """A network that takes a batch `size` images at a time: what fits in training fits here."""

    def __init__(self, net: torch.nn.Module, size: int):
        super().__init__()
        self.net, self.size, self.shape = net, size, net.shape

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.net(*p) for p in zip(*(x.split(self.size) for x in batch))])


def watch(denoiser: Denoiser, x0: torch.Tensor) -> dict:
    """The loss and the bound, in bits per dimension, on x0 with noises that are always the same."""
    generator = torch.Generator().manual_seed(0)
    T, n = denoiser.schedule.T, len(x0)
    t = 1 + torch.randint(T, (n,), generator=generator)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    with torch.no_grad():
        loss = simple_loss(denoiser, x0, t, eps).mean().item()
    bits = bound_estimate(denoiser, x0, generator=generator).mean().item()
    return {"fixed_loss": loss, "fixed_bits_per_dim": bits}


def draw_samples(denoiser: Denoiser, n: int) -> torch.Tensor:
    """n samples, always from the same noise, in at most 50 deterministic steps."""
    shape, T = denoiser.net.shape, denoiser.schedule.T
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    x = x.to(next(denoiser.net.parameters()).device)
    return sample(denoiser, x, uniform_grid(T, min(50, T)), ddim)


class Interrupt:
    """Within the block, the first Ctrl-C or SIGTERM only sets `asked`: no update is cut in half."""

    def __enter__(self) -> "Interrupt":
        self.asked = False
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_) -> None:
        self.asked = True
        self.__exit__()  # a second one stops at once

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def reading(denoiser: Denoiser) -> tuple:
    """What besides its network makes a Denoiser: (schedule, predicts, variance)."""
    return denoiser.schedule, denoiser.predicts, denoiser.variance


def pick_device(name: str) -> str:
    """The device of that name; for "auto" cuda, mps or cpu, the first that is here."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
    return name


def device_name(device: torch.device) -> str:
    """The device in words, for a checkpoint's facts."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def command_line() -> str:
    """The command that started this run, without --resume."""
    resume, (_, world) = ("--resume", "--no-resume"), processes.place()
    start = ["torchrun", f"--nproc-per-node={world}", "-m"] if world > 1 else []
    return shlex.join([*start, "minddpm", *(a for a in sys.argv[1:] if a not in resume)])


def flatten(tree: dict) -> dict:
    """Nested dicts as one, the innermost names as keys."""
    pairs = [flatten(v) if isinstance(v, dict) else {k: v} for k, v in tree.items()]
    return {k: v for pair in pairs for k, v in pair.items()}
