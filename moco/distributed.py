"""Rank information and collectives. Without a process group everything works as rank 0 of 1."""

import hashlib
import inspect
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel


class DistContext(NamedTuple):
    """A process's rank among all processes of the run, and the device it trains on."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1  # processes on this node
    device: torch.device = torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


# Seeds


def derive_seed(*parts) -> int:
    """A 63-bit seed for one purpose: other parts, or the same in another order, give an unrelated seed."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(*parts) -> None:
    """Seed Python, NumPy and PyTorch (all devices) with the seed derived from the parts, e.g. (seed, epoch, rank)."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_rng(*parts) -> np.random.Generator:
    return np.random.default_rng(derive_seed(*parts))


def resolve_seed(seed: int | None, saved: Mapping) -> int:
    """The seed of a run, equal on all ranks: --seed, else that of the checkpoint it resumes, else a random one."""
    if seed is None:
        seed = saved.get("seed", random.SystemRandom().randrange(2**31))
    return all_reduce_max(seed if is_main() else 0)[0]


_shuffle_generator = torch.Generator()  # on the CPU and equal on all ranks: permutations need no broadcast or sync


def seed_shuffles(*parts) -> None:
    """Seed the orders of `draw_shuffle`; all ranks must pass the same parts."""
    _shuffle_generator.manual_seed(derive_seed(*parts))


# Gradients


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DistributedDataParallel; the model itself in a single process.

    Buffers are not synchronised: the queue is equal on all ranks anyway, and batch statistics are meant to differ.
    """
    if world_size() == 1:
        return model
    # The strides of 1×1 kernels may differ (always so for bf16 or fp16), but only in dimensions of size 1.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # PyTorch is renaming this option, and warns about the old name once the new one exists.
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if new_name else "broadcast_buffers"
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **{option: False})


# Collectives on the training device


@torch.no_grad()
def gather(x: torch.Tensor) -> torch.Tensor:
    """All ranks' tensors (N, ...), equal in shape, concatenated by rank: (world_size × N, ...). No gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_in_order(x: torch.Tensor) -> torch.Tensor:
    """The rows of a data set (N, ...), in its order, of which rank r has r, r + world_size, …, as eval_loader reads."""
    whole = x.new_zeros(int(all_reduce(torch.tensor(len(x), device=x.device))), *x.shape[1:])
    whole[rank() :: world_size()] = x
    return all_reduce(whole)


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks rank 0's buffers of the module."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def draw_shuffle(n: int) -> torch.Tensor:
    """A random order of all ranks' n rows, equal on all ranks. A single rank keeps its own: BatchNorm sees no order."""
    return torch.randperm(world_size() * n, generator=_shuffle_generator) if world_size() > 1 else torch.arange(n)


@torch.no_grad()
def exchange_rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """This rank's rows (N, ...) of the global batch (world_size × N, ...) in this order; each row is sent once.

    The order's argsort() undoes it. A single rank's batch stays as it is.
    """
    if world_size() == 1:
        return x
    owner = (order // len(x)).view(world_size(), -1)  # by receiving rank: where each wanted row is
    position = (order % len(x)).view(world_size(), -1)
    mine = owner == rank()
    arrival = owner[rank()].argsort(stable=True).argsort()  # from rank 0 first: where each wanted row arrived
    ((wanted, arrival),) = to_device([[position[mine].numpy(), arrival.numpy()]], x.device)
    sent = x[wanted]  # to rank 0 first, to each in the order it wants
    received = torch.empty_like(sent)
    received_counts = owner[rank()].bincount(minlength=world_size()).tolist()
    dist.all_to_all_single(received, sent, received_counts, mine.sum(1).tolist())
    return received[arrival]


# Collectives between the hosts, which do not wait for a GPU


def all_reduce_max(*numbers: int) -> list[int]:
    """The maximum of each integer over all ranks."""
    if world_size() == 1:
        return list(numbers)
    shared = torch.tensor(numbers)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def gather_lists(items: list) -> list:
    """All ranks' lists of plain values as one, rank 0's first. They travel as JSON, which cannot run foreign code."""
    if world_size() == 1:
        return items
    text = json.dumps(items).encode()
    (longest,) = all_reduce_max(len(text))
    everyone = gather(torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).unsqueeze(0))
    return sum((json.loads(each.numpy().tobytes()) for each in everyone), [])


def barrier() -> None:
    """Wait for all ranks. Runs over gloo, not NCCL: a dead rank raises immediately."""
    all_reduce_max(0)


# Small arrays from the host to the training device, together and without a CPU-GPU sync

ALIGNMENT = 16  # bytes; a view of the buffer as another type must start at a multiple of its size


def to_device(groups: Sequence[Sequence[np.ndarray]], device: torch.device) -> list[list[torch.Tensor]]:
    """The arrays of each group as tensors on the device.

    To a GPU they travel as one copy from pinned memory. Each array by itself, from ordinary memory, would cost as much
    as a kernel launch, and a large one would block the host until the GPU has caught up.
    """
    arrays = [np.ascontiguousarray(array) for group in groups for array in group]
    tensors = iter(_packed(arrays, device) if device.type == "cuda" else map(torch.from_numpy, arrays))
    return [[next(tensors).to(device, non_blocking=True) for _ in group] for group in groups]


def _packed(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    if not arrays:
        return []
    starts = np.cumsum([0] + [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays])
    packed = np.empty(starts[-1], dtype=np.uint8)
    for array, start in zip(arrays, starts):
        packed[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    buffer = torch.from_numpy(packed)
    if torch.cuda.is_available():  # the tests also simulate GPUs where there are none
        buffer = buffer.pin_memory()  # its allocator reuses the memory only after the copy
    buffer = buffer.to(device, non_blocking=True)
    return [
        buffer[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, starts)
    ]
