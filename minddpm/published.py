"""Networks in the format of `diffusers`: published weights in, our weights out."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minddpm.config import ModelConfig
from minddpm.nets import UNet
from minddpm.prediction import Denoiser
from minddpm.schedule import Schedule, cosine

# Their name of each of our layers within a block, and of those outside of the blocks.
LAYERS = {
    "res.norm1": "norm1",
    "res.conv1": "conv1",
    "res.time": "time_emb_proj",
    "res.norm2": "norm2",
    "res.conv2": "conv2",
    "res.shortcut": "conv_shortcut",
    "attention.norm": "group_norm",
    "attention.query": "to_q",
    "attention.key": "to_k",
    "attention.value": "to_v",
    "attention.out": "to_out.0",
}
ENDS = {
    "embed.0": "time_embedding.linear_1",
    "embed.2": "time_embedding.linear_2",
    "labels": "class_embedding",
    "first": "conv_in",
    "last.0": "conv_norm_out",
    "last.2": "conv_out",
}
OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

# What their network and its noise must say of themselves to be ours.
UNET = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
}
NOISE = {
    "clip_sample": True,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "trained_betas": None,
}
TARGETS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}


def from_diffusers(source: str | Path) -> Denoiser:
    """The denoiser of a `diffusers` folder, or of a repository of the Hugging Face hub.

    source: a folder, or a name such as "google/ddpm-cifar10-32", which is downloaded once and kept.
    Of a network with classes the last one is read as "no class", which is what ours export. Raises
    ValueError where its network or its noise is not one that this module has.
    """
    folder = Path(source)
    folder = folder if folder.is_dir() else download(str(source))
    unet = read_json(folder, "unet", "config.json")
    noise = read_json(folder, "scheduler", "scheduler_config.json")
    check_config(source, unet, UNET)
    check_config(source, noise, NOISE)
    try:
        learned = noise.get("variance_type") == "learned_range"
        channels, width = unet["in_channels"], unet["block_out_channels"][0]
        kinds = [kind.startswith("Attn") for kind in unet["down_block_types"]]
        net = UNet(
            channels=channels,
            size=unet["sample_size"],
            width=width,
            multipliers=tuple(c // width for c in unet["block_out_channels"]),
            blocks=unet["layers_per_block"],
            attention=tuple(unet["sample_size"] >> i for i, attends in enumerate(kinds) if attends),
            dropout=unet.get("dropout", 0.0),
            out_channels=channels * (1 + learned),
            classes=max(0, (unet.get("num_class_embeds") or 0) - 1),
        )
        read_into(net, weights(folder))
        predicts = TARGETS[noise.get("prediction_type", "epsilon")]
        variance = VARIANCES[noise["variance_type"].removesuffix("_log")]
        schedule = noise_schedule(noise)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"the files in {source} cannot be used: {reason}") from error
    denoiser = Denoiser(net, schedule, predicts, variance)
    return denoiser.eval().requires_grad_(False)


def check_config(source: str | Path, config: dict, ours: dict) -> None:
    """Raises ValueError unless what a config says of the fields in `ours` is what stands there."""
    wrong = [f"{k} = {config[k]!r}, not {v!r}" for k, v in ours.items() if config.get(k, v) != v]
    if wrong:
        raise ValueError(f"the network in {source} is not DDPM's: {'; '.join(wrong)}")


def to_diffusers(net: UNet, model: ModelConfig, out: str | Path) -> None:
    """Write a network and what it predicts as a folder that `DDPMPipeline` can load.

    The pipeline passes no labels: of one with classes only its `unet` can be used, whose last class
    is "no class".
    Raises ValueError where `out` exists, a layer has other than 32 groups (narrower than 128), or
    the noise is flow matching's.
    """
    out = Path(out)
    if model.width % 128:
        raise ValueError(
            f"diffusers gives every norm of a network the same number of groups; one of width "
            f"{model.width} has several: only multiples of 128 can be exported"
        )
    if model.schedule == "straight" or model.predicts == "velocity":
        raise ValueError(
            "the DDPMScheduler of diffusers knows no straight schedule and predicts no velocity: "
            "export to a .safetensors file instead"
        )
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder")
    betas = {
        "linear": {"beta_start": 0.1 / model.T, "beta_end": 20 / model.T},
        "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    }
    noise = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": model.T,
        "beta_schedule": "linear",
        "prediction_type": {v: k for k, v in TARGETS.items()}[model.predicts],
        "variance_type": {v: k for k, v in VARIANCES.items()}[model.variance],
        "clip_sample": True,
    } | betas[model.schedule]
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    write_json(out / "model_index.json", {"_class_name": "DDPMPipeline"} | parts)
    write_json(out / "scheduler" / "scheduler_config.json", noise)
    write_json(out / "unet" / "config.json", unet_config(net, model))
    names, state = their_names(net), net.state_dict()
    theirs = {names[k]: x.flatten(1) if is_linear(k) else x for k, x in state.items()}
    save_file(theirs, out / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def unet_config(net: UNet, model: ModelConfig) -> dict:
    """What `diffusers` calls a network of 32 groups a norm: the config of its UNet2DModel."""
    attends = [net.shape[1] >> i in model.attention for i in range(len(model.multipliers))]
    return UNET | {
        "sample_size": net.shape[1],
        "in_channels": net.shape[0],
        "out_channels": net.shape[0] * (1 + (model.variance == "learned")),
        "block_out_channels": [m * model.width for m in model.multipliers],
        "layers_per_block": model.blocks,
        "dropout": model.dropout,
        "num_class_embeds": net.classes + 1 if net.classes else None,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
    }


def their_names(net: UNet) -> dict[str, str]:
    """{our name: theirs}, of every weight of the network."""
    places = blocks_of(net)
    return {ours: rename(ours, places) for ours in net.state_dict()}


def blocks_of(net: UNet) -> dict[str, tuple[str, int]]:
    """Where each of our layers sits in their nested lists: {"up.4": ("up_blocks.1", 1), ...}."""
    places = {f"middle.{i}": ("mid_block", i) for i in range(len(net.middle))}
    for side in ("down", "up"):
        level, i = 0, 0
        for k, layer in enumerate(getattr(net, side)):
            places[f"{side}.{k}"] = (f"{side}_blocks.{level}", i)
            i += 1
            if hasattr(layer, "conv"):  # Downsample or Upsample, the last layer of its level
                level, i = level + 1, 0
    return places


def rename(name: str, places: dict[str, tuple[str, int]]) -> str:
    """Their name of one of our weights."""
    layer, kind = name.rsplit(".", 1)
    if layer in ENDS:
        return f"{ENDS[layer]}.{kind}"
    side, k, rest = layer.split(".", 2)
    block, i = places[f"{side}.{k}"]
    if rest == "conv":
        return f"{block}.{side}samplers.0.conv.{kind}"
    group = "resnets" if rest.startswith("res.") else "attentions"
    return f"{block}.{group}.{i}.{LAYERS[rest]}.{kind}"


def is_linear(name: str) -> bool:
    """Whether diffusers has a linear layer where we have a 1 x 1 convolution."""
    return name.endswith((".query.weight", ".key.weight", ".value.weight", ".out.weight"))


def read_into(net: UNet, theirs: dict[str, torch.Tensor]) -> None:
    """Load their weights, all of them and nothing else; KeyError or RuntimeError where not so."""
    for old, new in OLD.items():
        theirs = {name.replace(old, new): x for name, x in theirs.items()}
    names = their_names(net)
    if extra := theirs.keys() - set(names.values()):
        raise KeyError(f"no place for {', '.join(sorted(extra)[:3])}")
    state = net.state_dict()
    net.load_state_dict({k: theirs[names[k]].float().view_as(x) for k, x in state.items()})
    for layer in net.modules():
        if isinstance(layer, torch.nn.GroupNorm):  # ours has fewer groups in narrow layers
            layer.num_groups = UNET["norm_num_groups"]


def noise_schedule(config: dict) -> Schedule:
    """The schedule of a `diffusers` scheduler's config."""
    kind, T = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if kind == "squaredcos_cap_v2":
        return cosine(T)
    if kind != "linear":
        raise ValueError(f"expected linear betas or squaredcos_cap_v2, got {kind!r}")
    ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    return Schedule.from_beta(torch.linspace(*ends, T, dtype=torch.float64))


def download(repository: str) -> Path:
    """The folder of a repository of the Hugging Face hub, fetched where it is not here yet."""
    from huggingface_hub import snapshot_download

    wanted = ["*config.json", "*.safetensors", "unet/*", "scheduler/*"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
        if not find_weights(folder):
            folder = Path(snapshot_download(repository, allow_patterns=[*wanted, "*.bin"]))
    except Exception as error:  # network, hub and file errors of several libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"there is no {repository!r} here, and it could not be downloaded: {reason}"
        ) from error
    return folder


def find_weights(folder: Path) -> Path | None:
    """Their file of weights, safetensors rather than pickled."""
    for suffix in ("safetensors", "bin"):
        for place in (folder / "unet", folder):
            if (path := place / f"diffusion_pytorch_model.{suffix}").is_file():
                return path
    return None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Their weights by their names."""
    path = find_weights(folder)
    if path is None:
        raise KeyError("no diffusion_pytorch_model.safetensors or .bin")
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except Exception as error:  # either library raises several types for a damaged file
        raise RuntimeError(f"{path.name} is not complete: remove it and try again") from error


def read_json(folder: Path, part: str, name: str) -> dict:
    """A JSON file of a pipeline's folder, in its part or, in older ones, beside the others."""
    for path in (folder / part / name, folder / name):
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} holds no JSON object: {error}") from error
    raise ValueError(f"{folder} is not a diffusers folder: it holds no {part}/{name}")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, and the folder where it lies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
