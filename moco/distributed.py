"""Who this process is among all of a run, and what they exchange.

Everything here works without a process group, too, where this process is rank 0 of 1.
"""

import hashlib
import inspect
import os
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Place(NamedTuple):
    """Where a process stands among all processes of the run, and the device it trains on."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1     # processes on this node
    device: torch.device = torch.device("cpu")


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def seed_everything(*parts):
    """Seed Python, NumPy and PyTorch (every device) with what follows from the parts, e.g. (seed, epoch, rank)."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_seed(*parts):
    """A 63-bit seed for one purpose: other parts, or another order of them, give an unrelated one."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def parallel(model, device):
    """The model, with its gradients averaged over all processes. Buffers stay each process's own: the queue is equal in
    all by construction, and batch statistics are meant to differ."""
    if world_size() == 1:
        return model
    # PyTorch renames the option: the old name warns where there is the new one.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                   **{"forward_sync_buffers" if new else "broadcast_buffers": False})


@torch.no_grad()
def gather(x):
    """The tensors x (N, ...) of all ranks, equal in shape, joined by rank to (world × N, ...). No gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def gather_uneven(x):
    """As `gather`, of tensors that may differ in length (N, ...)."""
    if world_size() == 1:
        return x
    lengths = gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros(max(lengths) - len(x), *x.shape[1:])])
    return torch.cat([part[:length] for part, length in zip(gather(padded).split(max(lengths)), lengths)])


@torch.no_grad()
def shuffle(x):
    """Deal the rows of the global batch anew to the ranks: each gets N random ones of all world × N.

    Returns its new rows (N, ...) and the permutation, which `unshuffle` takes. One rank's batch stays as it is:
    its BatchNorm statistics do not depend on the order.
    """
    if world_size() == 1:
        return x, None
    order = torch.randperm(world_size() * len(x), generator=_shuffles)
    return _deal(x, order), order


@torch.no_grad()
def unshuffle(x, order):
    """Give the rows (N, ...) of a shuffled batch back to the ranks and places they came from."""
    return x if order is None else _deal(x, order.argsort())


_shuffles = torch.Generator()    # on the CPU and alike in all processes: nobody need be told the permutation, or wait


def seed_shuffles(*parts):
    """Seed the permutations of `shuffle`, by the same parts in all processes."""
    _shuffles.manual_seed(derive_seed(*parts))


def _deal(x, order):
    """This rank's rows (N, ...) of the global batch (world × N, ...) in the given order. Every row travels once."""
    owner, place = (order // len(x)).view(world_size(), -1), (order % len(x)).view(world_size(), -1)  # by receiving rank
    mine = owner == rank()
    sent = x[place[mine].to(x.device, non_blocking=True)]            # to rank 0 first, to each in the order it wants
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, owner[rank()].bincount(minlength=world_size()).tolist(), mine.sum(1).tolist())
    arrival = owner[rank()].argsort(stable=True).argsort()           # from rank 0 first: where each wanted row came in
    return received[arrival.to(x.device, non_blocking=True)]


def agree(number, device):
    """Rank 0's whole number, on every rank."""
    if world_size() == 1:
        return number
    shared = torch.tensor(number, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()


def all_reduce(x):
    """The sum of x over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def maxima(*numbers):
    """The largest of each whole number over all processes. Hosts tell hosts: no GPU is waited for."""
    if world_size() == 1:
        return list(numbers)
    shared = torch.tensor(numbers)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def gather_lists(items):
    """The lists of all processes as one, rank 0's first. For small ones: they travel pickled."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def barrier():
    """Wait until all processes are here. Among the hosts: where one has ended, the others are told at once."""
    maxima(0)
