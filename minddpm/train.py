"""Training: a generator of steps that knows nothing of diffusion."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from minddpm.processes import place

Batch = Tensor | tuple[Tensor, ...]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Record(NamedTuple):
    """What an update did: its number from 1, mean loss, unclipped gradient norm, learning rate."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float


class TrainState:
    """A network in training: with its moving average, Adam, the loss scaler and the steps done.

    config: needs learning_rate, warmup, cooldown, steps, accumulate, grad_clip, ema_decay,
    precision and seed. fused: Adam's update as one kernel, on a GPU. replica: the
    DistributedDataParallel around the network, where several processes share each batch.
    """

    def __init__(self, net: nn.Module, config, fused: bool = False):
        self.net, self.config, self.step, self.replica = net, config, 0, None
        self.ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            net.parameters(), lr=config.learning_rate, fused=fused or None
        )
        self.device = next(net.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")


def train(
    state: TrainState, loss_fn: Callable[[Batch], Tensor], batch: Callable[[int], Batch]
) -> Iterator[Record]:
    """Update state.net until config.steps are done, yielding a Record a step (DDPM alg. 1).

    loss_fn: a batch to one loss an item, (B,). batch: the number of updates done to a batch, a
    tensor or a tuple of tensors; the same in every process, each of which trains on its share.
    Each update seeds torch from (seed, k), so that a run resumed at k repeats what it did there.
    """
    config, (rank, world) = state.config, place()
    while state.step < config.steps:
        k = state.step
        state.net.train()  # whatever the caller did with it since
        torch.manual_seed(stream(config.seed, k))
        shares = share(batch(k), config.accumulate, rank, world)
        if rank:  # each process drops features of its own
            torch.manual_seed(stream(config.seed, k, rank))
        rate = learning_rate(config, k + 1)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        loss = backward(state, loss_fn, shares)
        state.scaler.unscale_(state.optimizer)  # clipping must see the true gradient
        norm = nn.utils.clip_grad_norm_(state.net.parameters(), config.grad_clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.ema.update_parameters(state.net)
        state.step = k + 1
        yield Record(state.step, loss, norm, rate)


def backward(state: TrainState, loss_fn: Callable[[Batch], Tensor], shares: list[Batch]) -> Tensor:
    """Add up the gradients of the shares of a batch; their mean loss, ()."""
    dtype, losses = PRECISIONS[state.config.precision], []
    for i, part in enumerate(shares, start=1):
        apart = state.replica is not None and i < len(shares)  # processes meet at the last share
        with state.replica.no_sync() if apart else nullcontext():
            with torch.autocast(state.device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_fn(part).mean() / len(shares)
            state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def share(batch: Batch, parts: int, rank: int, world: int) -> list[Batch]:
    """What process `rank` of `world` sees of a batch, in `parts` equal parts."""
    if parts * world == 1:
        return [batch]
    tensors = batch if isinstance(batch, tuple) else (batch,)
    size, rest = divmod(len(tensors[0]), parts * world)
    if rest:
        raise ValueError(
            f"a batch of {len(tensors[0])} cannot be cut into {parts} x {world} equal shares: "
            "batch_size must be a multiple of accumulate times the number of processes"
        )
    cuts = [slice(i * size, (i + 1) * size) for i in range(rank * parts, (rank + 1) * parts)]
    shares = [tuple(x[cut] for x in tensors) for cut in cuts]
    return shares if isinstance(batch, tuple) else [x for (x,) in shares]


def stream(*key: int) -> int:
    """A seed that is a pure function of whole numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def pick_precision(name: str, gpu: bool) -> str:
    """The number format of that name; for "auto" bf16 where a GPU has it, else fp16, else fp32."""
    if name != "auto":
        return name
    return ("bf16" if torch.cuda.is_bf16_supported(False) else "fp16") if gpu else "fp32"


def learning_rate(config, step: int) -> float:
    """The rate of update `step` = 1, 2, ...: a linear rise, a plateau, a linear fall to 0."""
    rise = min(1.0, step / max(1, config.warmup))
    fall = min(1.0, (config.steps - step + 1) / max(1, config.cooldown))
    return config.learning_rate * min(rise, fall)
