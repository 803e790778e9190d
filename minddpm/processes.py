"""Several processes at one task, as `torchrun` starts them; alone, there is nobody to wait for."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist


def place() -> tuple[int, int]:
    """(rank, number of processes) of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join(device: str) -> str:
    """Meet the other processes, where `torchrun` started several: the device that is this one's."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and place()[1] == 1:
        if device.startswith("cuda"):
            rank, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if rank >= here:
                raise ValueError(f"each process needs a GPU of its own, and here are {here}")
            device = f"cuda:{rank}"
            torch.cuda.set_device(device)
        # Numbers that they agree on lie on the CPU, which nccl does not serve.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device


def leave() -> None:
    """Part from the other processes."""
    if place()[1] > 1:
        dist.destroy_process_group()


def wait() -> None:
    """Wait until every process is here."""
    if place()[1] > 1:
        dist.barrier()


def in_turn(make: Callable):
    """make() in the first process, then in all others."""
    rank = place()[0]
    if rank:
        wait()
    try:
        return make()
    finally:  # where it fails, each process says so
        if not rank:
            wait()


def mean(x: torch.Tensor) -> float:
    """The mean over the processes of a number (), that each has its own of."""
    if place()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x.item() / place()[1]


def gather(x) -> list:
    """On process 0, everyone's x (anything that pickles), in order; on the others, nothing."""
    rank, world = place()
    if world == 1:
        return [x]
    found = [None] * world if rank == 0 else None
    dist.gather_object(x, found)
    return found or []
