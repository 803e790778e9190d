"""Our network and steps beside those of diffusers, in pairs, in one run: ratios of times.

    python benchmarks/compare.py            # on the GPU where there is one, else on the CPU

Each pair is timed in turns, ours and theirs, so that whatever else the machine does falls on both;
the figure is the median of the ratios of neighbours, with its quartiles. Below 1 ours is faster.
"""

import argparse
import time
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch.nn.functional import mse_loss

from minddpm.config import ModelConfig
from minddpm.nets import UNet
from minddpm.prediction import Denoiser
from minddpm.published import unet_config
from minddpm.samplers import ancestral, ddim
from minddpm.schedule import linear


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, the GPU's part included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(name: str, ours: Callable, theirs: Callable, turns: int, device: torch.device) -> None:
    """Print the ratio of the times of two calls, and the faster one's time."""
    for work in (ours, theirs):
        work()  # warm
    pairs = torch.tensor([[seconds(w, device) for w in (ours, theirs)] for _ in range(turns)])
    low, middle, high = (pairs[:, 0] / pairs[:, 1]).quantile(torch.tensor([0.25, 0.5, 0.75]))
    each = 1000 * pairs.median(0).values
    print(
        f"{name:44} {middle:5.2f} ({low:.2f} to {high:.2f})   ours {each[0]:9.3f} ms, "
        f"theirs {each[1]:9.3f} ms"
    )


def training_step(net: Callable, parameters: list, x: torch.Tensor, t: torch.Tensor) -> Callable:
    """Forward, backward and Adam."""
    optimizer = torch.optim.Adam(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        mse_loss(net(x, t), x).backward()
        optimizer.step()

    return step


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=None, help="images at a time")
    parser.add_argument("--turns", type=int, default=None, help="pairs of calls")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    batch, turns = options.batch or (128 if gpu else 4), options.turns or (50 if gpu else 9)
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, batch {batch}; ours / theirs, lower is faster")

    torch.manual_seed(0)
    ours = UNet().to(device)
    theirs = UNet2DModel.from_config(unet_config(ours, ModelConfig())).to(device)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(batch, 3, 32, 32, device=device)
    t = torch.randint(1, 1001, (batch,), device=device)

    def their_net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return theirs(x, t - 1).sample

    with torch.no_grad():
        compare(
            "U-Net, 35.7 M, forward", lambda: ours(x, t), lambda: their_net(x, t), turns, device
        )
    steps = [
        training_step(net, list(module.parameters()), x, t)
        for net, module in ((ours, ours), (their_net, theirs))
    ]
    compare("U-Net, 35.7 M, forward, backward, Adam", *steps, turns, device)

    # The steps alone: a network that costs nothing
    denoiser = Denoiser(lambda x, t: x, linear(1000), variance="small")
    for name, step, scheduler in (
        ("ancestral", ancestral, DDPMScheduler(variance_type="fixed_small")),
        ("ddim", ddim, DDIMScheduler()),
    ):
        scheduler.set_timesteps(1000)
        compare(
            f"{name} step without a network",
            lambda step=step: step(denoiser, x, 500, 499),
            lambda scheduler=scheduler: scheduler.step(x, 499, x),
            20 * turns,
            device,
        )


if __name__ == "__main__":
    main()
