"""Checkpoints: tensors in a safetensors file, the config in its header as JSON; no pickled code."""

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minddpm.config import Config, from_dict
from minddpm.data import NAMED, replacing
from minddpm.nets import UNet
from minddpm.prediction import Denoiser
from minddpm.published import from_diffusers, to_diffusers
from minddpm.schedule import SCHEDULES

SHIPPED = Path(__file__).parent / "weights"
FORMAT = "minddpm 1"


def build(config: Config, channels: int, size: int) -> Denoiser:
    """The untrained denoiser that a config describes, for images (channels, size, size).

    Raises ValueError where the images never have a resolution that is to have attention.
    """
    model = config.model
    net = UNet(
        channels=channels,
        size=size,
        width=model.width,
        multipliers=model.multipliers,
        blocks=model.blocks,
        attention=model.attention,
        dropout=model.dropout,
        out_channels=2 * channels if model.variance == "learned" else channels,
        classes=model.classes,
    )
    resolutions = [size >> level for level in range(len(model.multipliers))]
    if not set(model.attention) <= set(resolutions):
        raise ValueError(
            f"attention at {model.attention} is asked for, but images of {size} pixels pass "
            f"through the resolutions {resolutions}: choose among them with --attention"
        )
    return Denoiser(net, SCHEDULES[model.schedule](model.T), model.predicts, model.variance)


def save(
    path: str | Path, tensors: dict, config: Config, keep_as: Path | None = None, **facts
) -> None:
    """Write tensors, config and facts (JSON values) to `path`, all or nothing.

    The file is written beside `path` and renamed, so that a failure leaves what was there. keep_as:
    the name under which what was there is to be kept.
    """
    path = Path(path)
    header = {"format": FORMAT, "config": json.dumps(asdict(config)), "facts": json.dumps(facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    try:
        with replacing(path) as part:
            save_file(whole, part, metadata=header)
            part.chmod(0o644)
            with part.open("r+b") as file:
                os.fsync(file.fileno())
            if keep_as and path.exists():
                os.replace(path, keep_as)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} could not be written ({error}); what was there is intact") from error


def read(source: str | Path) -> tuple[dict[str, torch.Tensor], Config, dict]:
    """(tensors, config, facts) of a checkpoint: a file, a run's folder, or shipped weights by name.

    Of a run's folder it is the newest one that is whole; a warning says so where that is not the
    last. Raises FileNotFoundError or ValueError with one line that says what is wrong.
    """
    path, *earlier = candidates(source)
    for older in earlier:
        try:
            return read_file(path)
        except ValueError as error:
            warnings.warn(f"{error}: {older.name} is taken instead", stacklevel=2)
            path = older
    return read_file(path)


def read_file(path: Path) -> tuple[dict[str, torch.Tensor], Config, dict]:
    """(tensors, config, facts) of one file."""
    if path.is_file():
        path.open("rb").close()  # OSError: what may not be read is not damaged
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by minddpm: its header does not say {FORMAT!r}")
    try:
        return tensors, from_dict(json.loads(header["config"])), json.loads(header["facts"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header of {path} cannot be used: {error}") from error


def has_seen(source: str | Path, name: str) -> bool:
    """Whether a checkpoint was trained on this file or folder, or on this data set's test part."""
    config = None if is_published(source) else read(source)[1]
    if config is None or Path(config.data) != Path(name):
        return False
    return config.split != "train" or name not in NAMED


def candidates(source: str | Path) -> list[Path]:
    """The files meant by a path or the name of shipped weights; of a run's folder, newest first."""
    shipped = {f.stem: f for f in SHIPPED.glob("*.safetensors")}
    if str(source) in shipped:  # ./digits is a path
        return [shipped[str(source)]]
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = [path / "last.safetensors", *sorted(path.glob("step-*.safetensors"), reverse=True)]
    if found := [file for file in files if file.is_file()]:
        return found
    best = ", but its best.safetensors" if (path / "best.safetensors").exists() else ""
    raise FileNotFoundError(
        f"no checkpoint {str(source)!r}{best}: expected a file, a run's folder or one of "
        + ", ".join(sorted(shipped))
    )


def load(source: str | Path, device: str = "cpu") -> Denoiser:
    """The trained denoiser of a checkpoint, moving-average weights, in evaluation mode.

    source: a file, a run's folder, the name of shipped weights ("digits"), a folder of `diffusers`,
    or a repository of the Hugging Face hub ("google/ddpm-cifar10-32").
    """
    if is_published(source):
        return from_diffusers(source).to(device)
    tensors, config, facts = read(source)
    return averaged(tensors, config, facts, source).to(device)


def averaged(tensors: dict, config: Config, facts: dict, source: str | Path) -> Denoiser:
    """The denoiser of what `read` returned."""
    weights = {name[4:]: x.float() for name, x in tensors.items() if name.startswith("ema.")}
    try:
        denoiser = build(config, *facts["shape"][:2])
        denoiser.net.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{source} does not hold the network that its config describes") from error
    return denoiser.eval().requires_grad_(False)


def is_published(source: str | Path) -> bool:
    """Whether this is a folder of `diffusers`, or "owner/name" with nothing of that name here."""
    path, parts = Path(source), str(source).split("/")
    if path.is_dir():
        return (path / "model_index.json").is_file()
    named = len(parts) == 2 and all(parts) and not parts[0].startswith((".", "~"))
    return named and not path.exists() and not path.parent.is_dir() and not path.suffix


def export(source: str | Path, out: str | Path) -> None:
    """Write the averaged weights of a checkpoint: enough to sample.

    out: a `.safetensors` file, in half precision, or a folder for `diffusers`' DDPMPipeline.
    """
    if Path(out).suffix not in ("", ".safetensors"):
        raise ValueError(f"out must name a .safetensors file or a folder, got {str(out)!r}")
    if Path(out).exists():
        raise ValueError(f"{out} exists: choose another name")
    tensors, config, facts = read(source)
    if not Path(out).suffix:
        to_diffusers(averaged(tensors, config, facts, source).net, config.model, out)
        return
    half = {name: x.half() for name, x in tensors.items() if name.startswith("ema.")}
    save(out, half, config, **facts)


def state_tensors(state) -> dict[str, torch.Tensor]:
    """Everything a TrainState holds, as named tensors."""
    tensors = {f"net.{k}": v for k, v in state.net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.module.state_dict().items()}
    for i, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in slots.items()}
    scale = state.scaler.state_dict()
    return tensors | {f"scaler.{k}": torch.tensor(v) for k, v in scale.items()}


def save_state(
    path: str | Path, state, config: Config, keep_as: Path | None = None, **facts
) -> None:
    """Write what training needs to go on exactly: weights, average, Adam's moments, scale, step."""
    facts |= {"step": state.step, "shape": list(state.net.shape)}
    save(path, state_tensors(state), config, keep_as, **facts)


def save_average(path: str | Path, state, config: Config, **facts) -> None:
    """Write the averaged weights alone: enough to sample."""
    facts |= {"step": state.step, "shape": list(state.net.shape)}
    tensors = {k: x for k, x in state_tensors(state).items() if k.startswith("ema.")}
    save(path, tensors, config, **facts)


def load_state(path: str | Path, state) -> dict:
    """Put a TrainState back where save_state found it: its next update is the one that came next.

    Returns the facts that were saved. Raises ValueError where they belong to another network.
    """
    tensors, _, facts = read(path)
    put_back(state, tensors, facts, path)
    return facts


def put_back(state, tensors: dict, facts: dict, path: str | Path) -> None:
    """Put a TrainState back to what `read` returned; `path` is named where it cannot be."""
    part = {}
    for name, x in tensors.items():
        prefix, rest = name.split(".", 1)
        part.setdefault(prefix, {})[rest] = x
    if "net" not in part:
        raise ValueError(f"{path} holds weights to sample from, and nothing to train on")
    try:
        state.net.load_state_dict(part["net"])
        state.ema.module.load_state_dict(part["ema"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} holds another network, for images of shape {facts.get('shape')}: "
            "is the data still the same?"
        ) from error
    state.ema.n_averaged.fill_(facts["step"])
    slots = {}
    for name, x in part.get("adam", {}).items():
        i, slot = name.split(".")
        slots.setdefault(int(i), {})[slot] = x
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": slots, "param_groups": groups})
    if "scaler" in part:
        state.scaler.load_state_dict({k: v.item() for k, v in part["scaler"].items()})
    state.step = facts["step"]
