"""What is saved comes back, bit for bit; what cannot be read gets one line."""

import errno
import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minddpm import checkpoint, data
from minddpm.config import Config, ModelConfig, TrainConfig
from minddpm.losses import hybrid_loss, simple_loss
from minddpm.train import TrainState, train

CONFIG = Config(
    data="digits",
    model=ModelConfig(
        width=8, multipliers=(1, 2), blocks=1, attention=(4,), schedule="cosine", T=20
    ),
    train=TrainConfig(steps=20, batch_size=4, warmup=5, cooldown=5, ema_decay=0.9),
)


def start(config=CONFIG, channels=1):
    """A denoiser of 8 x 8 images and its TrainState, from the config's seed."""
    torch.manual_seed(config.train.seed)
    denoiser = checkpoint.build(config, channels, 8)
    return denoiser, TrainState(denoiser.net, config.train)


def advance(denoiser, state, steps):
    """Train on the digits up to step `steps`."""
    config = state.config
    pixels = data.load("digits").pixels
    batches = data.Batches(pixels, config.batch_size, config.seed, config.flip)
    loss_fn = hybrid_loss if denoiser.variance == "learned" else simple_loss
    for record in train(state, lambda x: loss_fn(denoiser, x), batches):
        if record.step == steps:
            return


def assert_same(state, other):
    """Weights, average, Adam's moments and loss scale are equal, bit for bit."""
    mine, theirs = checkpoint.state_tensors(state), checkpoint.state_tensors(other)
    assert mine.keys() == theirs.keys()
    assert {"net", "ema", "adam"} <= {name.split(".")[0] for name in mine}
    assert_close(mine, theirs, rtol=0, atol=0)
    assert state.step == other.step
    assert state.ema.n_averaged == other.ema.n_averaged == state.step


@pytest.mark.parametrize(
    "changed",
    [{"dropout": 0.0}, {"dropout": 0.5}, {"variance": "learned"}, {"precision": "fp16"}],
    ids=str,
)
def test_20_steps_are_10_and_save_and_load_and_10(tmp_path, changed):
    model = {k: v for k, v in changed.items() if k != "precision"}
    rest = {k: v for k, v in changed.items() if k == "precision"}
    config = replace(
        CONFIG, model=replace(CONFIG.model, **model), train=replace(CONFIG.train, **rest)
    )
    denoiser, whole = start(config)
    advance(denoiser, whole, 20)

    denoiser, half = start(config)
    advance(denoiser, half, 10)
    checkpoint.save_state(tmp_path / "a.safetensors", half, config, seconds=3)
    torch.manual_seed(99)
    denoiser = checkpoint.build(config, 1, 8)  # other weights
    again = TrainState(denoiser.net, config.train)
    facts = checkpoint.load_state(tmp_path / "a.safetensors", again)
    assert facts == {"seconds": 3, "step": 10, "shape": [1, 8, 8]}
    assert_same(again, half)
    assert again.scaler.state_dict() == half.scaler.state_dict()
    advance(denoiser, again, 20)
    assert_same(again, whole)


def test_saving_changes_nothing_in_the_state(tmp_path):
    denoiser, state = start()
    _, other = start()
    for step in (5, 10):
        advance(denoiser, state, step)
        checkpoint.save_state(tmp_path / "a.safetensors", state, CONFIG)
    advance(checkpoint.Denoiser(other.net, denoiser.schedule, "eps", "large"), other, 10)
    assert_same(state, other)


# What a file holds


@pytest.fixture
def saved(tmp_path):
    """(path, state) of a run of 3 steps."""
    denoiser, state = start()
    advance(denoiser, state, 3)
    path = tmp_path / "run" / "last.safetensors"
    checkpoint.save_state(path, state, CONFIG, seconds=1)
    return path, state


def rewrite(path, tensors=None, **changed):
    """Replace a file's tensors or entries of its header; None takes an entry out."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() | changed
    header = {k: v for k, v in header.items() if v is not None}
    save_file(load_file(path) if tensors is None else tensors, path, metadata=header)


def test_a_file_is_plain_tensors_and_json(saved):
    path, state = saved
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "minddpm 1"
    assert json.loads(header["config"]) == json.loads(json.dumps(asdict(CONFIG)))
    assert json.loads(header["facts"]) == {"seconds": 1, "step": 3, "shape": [1, 8, 8]}
    tensors = load_file(path)
    for name, weight in state.net.state_dict().items():
        assert_close(tensors[f"net.{name}"], weight, rtol=0, atol=0)
        assert_close(tensors[f"ema.{name}"], state.ema.module.state_dict()[name], rtol=0, atol=0)


def test_load_gives_the_averaged_network_ready_to_sample(saved):
    path, state = saved
    for place in (path, str(path), path.parent):
        denoiser = checkpoint.load(place)
        average = state.ema.module.state_dict()
        assert_close(dict(denoiser.net.state_dict()), dict(average), rtol=0, atol=0)
        assert not torch.equal(denoiser.net.last[2].weight, state.net.last[2].weight)
        assert not denoiser.training
        assert not any(p.requires_grad for p in denoiser.parameters())
        assert (denoiser.predicts, denoiser.variance) == ("eps", "large")
        assert denoiser.schedule.T == 20


def test_half_precision_weights_load_as_float32(saved, tmp_path):
    path, state = saved
    checkpoint.export(path.parent, tmp_path / "small.safetensors")
    tensors = load_file(tmp_path / "small.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.float16}
    assert {name[:4] for name in tensors} == {"ema."}
    weights = checkpoint.load(tmp_path / "small.safetensors").net.state_dict()
    truth = {name: x.half().float() for name, x in state.ema.module.state_dict().items()}
    assert_close(dict(weights), truth, rtol=0, atol=0)


# Names


def test_shipped_weights_are_found_by_name_and_a_path_remains_a_path(saved, tmp_path, monkeypatch):
    path, _ = saved
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "gift.safetensors").write_bytes(path.read_bytes())
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    path.parent.rename(tmp_path / "gift")
    assert checkpoint.candidates("gift") == [shipped / "gift.safetensors"]
    mine = (tmp_path / "gift" / "last.safetensors").resolve()
    assert [file.resolve() for file in checkpoint.candidates("./gift")] == [mine]
    assert checkpoint.candidates(tmp_path / "gift") == [mine]
    with pytest.raises(FileNotFoundError, match="no checkpoint 'gifts': .*one of gift$"):
        checkpoint.candidates("gifts")


# Failures


def fail_with(error, after=0):
    def fail(*args, **kwargs):
        if after:
            args[1].write_bytes(b"x" * after)
        raise error

    return fail


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("os.replace", PermissionError(errno.EACCES, "Permission denied")),
    ],
)
def test_a_failed_write_leaves_the_earlier_file(saved, monkeypatch, name, error):
    path, state = saved
    before = path.read_bytes()
    monkeypatch.setattr(
        f"minddpm.checkpoint.{name}", fail_with(error, 100 * (name != "os.replace"))
    )
    with pytest.raises(
        OSError, match=r"last.safetensors could not be written \(.*intact"
    ) as caught:
        checkpoint.save_state(path, state, CONFIG)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_the_earlier_file(saved, monkeypatch):
    path, state = saved
    before = path.read_bytes()
    monkeypatch.setattr("minddpm.checkpoint.save_file", fail_with(KeyboardInterrupt(), 100))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_state(path, state, CONFIG)
    assert path.read_bytes() == before
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def one_line(path, message, error=ValueError, read=checkpoint.load):
    with pytest.raises(error, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_gets_one_line(tmp_path):
    message = "no checkpoint '.*': expected a file, a run's folder or one of"
    one_line(tmp_path / "nothing", message, FileNotFoundError)
    one_line(tmp_path, message, FileNotFoundError)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "header"])
def test_a_damaged_file_gets_one_line(saved, damage):
    path, _ = saved
    whole = path.read_bytes()
    header = b"\xff" * 8 + whole[8:]
    content = {"empty": b"", "text": b"hello" * 9, "truncated": whole[:-9], "header": header}
    path.write_bytes(content[damage])
    one_line(path, "is not a complete safetensors file")


def test_a_foreign_file_gets_one_line(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    one_line(tmp_path / "a.safetensors", "was not written by minddpm")
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors", {"format": "pt"})
    one_line(tmp_path / "a.safetensors", "was not written by minddpm")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"config": None}, "header of .* cannot be used: 'config'"),
        ({"facts": None}, "header of .* cannot be used: 'facts'"),
        ({"config": "{"}, "header of .* cannot be used: Expecting"),
        ({"config": "[]"}, "header of .* cannot be used"),
        ({"config": '{"model": 3}'}, "header of .* cannot be used"),
        ({"config": '{"model": {"width": "8"}}'}, "header of .* cannot be used"),
        ({"config": '{"model": {"width": 6}}'}, "cannot be used: width must be a positive"),
        ({"config": '{"model": {"wings": 2}}'}, "cannot be used: unknown .*wings; .*upgrade"),
        ({"facts": "{}"}, "does not hold the network that its config describes"),
        ({"facts": '{"shape": [1, 8], "step": 3}'}, None),
        ({"facts": '{"shape": [3, 8, 8], "step": 3}'}, "does not hold the network that its config"),
    ],
)
def test_a_header_that_cannot_be_used_gets_one_line(saved, header, message):
    path, _ = saved
    rewrite(path, **header)
    if message is None:
        assert checkpoint.load(path).net.shape == (1, 8, 8)
    else:
        one_line(path, message)


def test_missing_and_misshapen_tensors_get_one_line(saved):
    path, _ = saved
    tensors = load_file(path)
    rewrite(path, {k: v for k, v in tensors.items() if k != "ema.first.weight"})
    one_line(path, "does not hold the network that its config describes")
    rewrite(path, tensors | {"ema.first.weight": torch.zeros(2)})
    one_line(path, "does not hold the network that its config describes")


def test_a_state_is_not_put_into_another_network(saved, tmp_path):
    path, _ = saved
    _, other = start(channels=3)
    one_line(
        path,
        r"holds another network, for images of shape \[1, 8, 8\]",
        read=lambda path: checkpoint.load_state(path, other),
    )


def test_weights_alone_cannot_be_resumed(saved, tmp_path):
    path, state = saved
    checkpoint.export(path, tmp_path / "small.safetensors")
    one_line(
        tmp_path / "small.safetensors",
        "holds weights to sample from, and nothing to train on",
        read=lambda path: checkpoint.load_state(path, state),
    )


def test_attention_that_never_happens_is_refused():
    config = Config(model=ModelConfig(width=8, multipliers=(1, 2), attention=(16,)))
    with pytest.raises(ValueError, match=r"attention at \(16,\) .* resolutions \[8, 4\]"):
        checkpoint.build(config, 1, 8)
