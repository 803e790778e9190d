"""Training: a generator of steps that knows nothing of diffusion."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Record(NamedTuple):
    """What an update did: its number from 1, mean loss, unclipped gradient norm, learning rate."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float


class TrainState:
    """A network in training: with its moving average, Adam, the loss scaler and the steps done.

    config: needs learning_rate, warmup, cooldown, steps, grad_clip, ema_decay, precision and seed.
    """

    def __init__(self, net: nn.Module, config):
        self.net, self.config, self.step = net, config, 0
        self.ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
        self.device = next(net.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")


def train(
    state: TrainState, loss_fn: Callable[[Tensor], Tensor], batch: Callable[[int], Tensor]
) -> Iterator[Record]:
    """Update state.net until config.steps are done, yielding a Record a step (DDPM alg. 1).

    loss_fn: a batch to one loss an item, (B,). batch: the number of updates done to a batch.
    Each update seeds torch from (seed, k), so that a run resumed at k repeats what it did there.
    """
    config, dtype = state.config, PRECISIONS[state.config.precision]
    while state.step < config.steps:
        k = state.step
        state.net.train()  # whatever the caller did with it since
        torch.manual_seed(int(np.random.SeedSequence([config.seed, k]).generate_state(1)[0]))
        rate = learning_rate(config, k + 1)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(state.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_fn(batch(k)).mean()
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimizer)  # clipping must see the true gradient
        norm = nn.utils.clip_grad_norm_(state.net.parameters(), config.grad_clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.ema.update_parameters(state.net)
        state.step = k + 1
        yield Record(state.step, loss.detach(), norm, rate)


def learning_rate(config, step: int) -> float:
    """The rate of update `step` = 1, 2, ...: a linear rise, a plateau, a linear fall to 0."""
    rise = min(1.0, step / max(1, config.warmup))
    fall = min(1.0, (config.steps - step + 1) / max(1, config.cooldown))
    return config.learning_rate * min(rise, fall)
