"""Several processes share a batch, and train as one process does on all of it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from minddpm import processes

CODE = """
import dataclasses, json, pathlib, sys
import torch
from minddpm import processes
from minddpm.config import Config, ModelConfig, TrainConfig
from minddpm.run import Run

out, accumulate, dropout, batch = sys.argv[1], *map(float, sys.argv[2:5])
model = ModelConfig(width=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=dropout,
                    schedule="cosine", T=20)
train = TrainConfig(steps=6, batch_size=int(batch), accumulate=int(accumulate), warmup=0,
                    learning_rate=1e-3)
run = Run(Config(data="digits", model=model, train=train), pathlib.Path(out), device="cpu")
run.go()
rank, world = processes.place()
torch.save(run.denoiser.net.state_dict(), f"{out}/rank{rank}.pt")
meeting = processes.mean(torch.tensor(float(rank)))
gathered = [x.item() for x in processes.gather(torch.tensor(rank + 10))]
pathlib.Path(f"{out}/rank{rank}.json").write_text(json.dumps([world, meeting, gathered]))
processes.leave()
"""


def launch(folder, n, accumulate=1, dropout=0.0, batch=16):
    """Run CODE in n processes; what it printed on the way."""
    script = folder.parent / "worker.py"
    script.write_text(CODE)
    start = [sys.executable]
    if n > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port=0"]
        start += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*start, str(script), str(folder), str(accumulate), str(dropout), str(batch)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def trained(folder, **options):
    done = launch(folder, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6 of 6") == 1  # one of them speaks
    return load_file(folder / "last.safetensors")


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_whole_batch(tmp_path):
    one = trained(tmp_path / "one", n=1)
    two = trained(tmp_path / "two", n=2)
    parts = trained(tmp_path / "parts", n=2, accumulate=4)
    for name, x in one.items():
        if name.startswith(("net.", "ema.")):
            for other in (two, parts):
                assert_close(other[name], x, rtol=1e-4, atol=1e-5)
    first, second = (torch.load(tmp_path / "two" / f"rank{i}.pt") for i in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    moved = max(
        (x - first[k]).abs().max() for k, x in torch.load(tmp_path / "one/rank0.pt").items()
    )
    assert moved < 1e-4
    said = [json.loads((tmp_path / "two" / f"rank{i}.json").read_text()) for i in (0, 1)]
    assert said == [[2, 0.5, [10, 11]], [2, 0.5, []]]


@pytest.mark.slow
def test_with_dropout_the_processes_still_agree(tmp_path):
    trained(tmp_path / "run", n=2, dropout=0.5)
    first, second = (torch.load(tmp_path / "run" / f"rank{i}.pt") for i in (0, 1))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = launch(tmp_path / "run", n=1, accumulate=3)
    assert done.returncode == 1
    assert "batch_size = 16 must be a multiple of accumulate = 3 times the number" in done.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in [("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")]:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="each process needs a GPU of its own, and here are 1"):
        processes.join("cuda")


def test_alone_nothing_happens():
    x = torch.tensor(3.0)
    assert processes.place() == (0, 1)
    assert processes.join("cpu") == "cpu"
    assert processes.mean(x) == 3
    assert processes.gather(x) == [x]
    processes.wait()
    processes.leave()
