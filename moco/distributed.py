"""One process or many: how they start, who they are, and what they exchange.

Everything below works without a process group, too, where this process is rank 0 of 1.
"""

import hashlib
import os
import random
import signal
import socket
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco.options import BadInput, RunFailed, run

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)           # SIGUSR1 is what Slurm is told to send
MULTICAST_DEFAULT = "tcp://224.66.41.62:23456"  # the published default; PyTorch dropped multicast long ago


class Place(NamedTuple):
    """Where a process stands among all processes of the run, and the device it trains on."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1     # processes on this node
    device: torch.device = torch.device("cpu")


def launch(worker, args, *, multiprocessing=False, world_size=-1, rank=-1, dist_url=MULTICAST_DEFAULT,
           backend="nccl", gpu=None):
    """Run worker(place, *args) in this process or in one process a GPU, as the launch options say.

    1. torchrun: its environment says who this process is; the options are not needed.
    2. multiprocessing: one process a GPU on this node (one CPU process without a GPU); `world_size` counts the
       nodes and `rank` is this node's.
    3. world_size > 1 without multiprocessing: this process is `rank` of `world_size`.
    4. otherwise: this process alone, no process group.
    Raises BadInput where the options do not fit together.
    """
    gpus = torch.cuda.device_count()
    if gpu is not None and gpu >= gpus:
        raise BadInput(f"--gpu {gpu}: this machine has {gpus} GPUs; leave --gpu out to use what there is")

    if _under_torchrun():
        numbers = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        return _join_and_run(Place(*numbers, _device(numbers[2])), "env://", backend, worker, args)

    nodes = max(world_size, 1)
    if nodes > 1 and not 0 <= rank < nodes:
        raise BadInput(f"--rank {rank}: with --world-size {nodes} it must be 0..{nodes - 1}, one number each node")
    if dist_url == MULTICAST_DEFAULT:
        if nodes > 1:
            raise BadInput(f"--dist-url {dist_url}: {nodes} nodes need the first one's address and a free port,"
                           " for example tcp://10.0.0.1:10001")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"

    if multiprocessing:
        if not gpus:
            print("no GPU found: one CPU process, over gloo", flush=True)
        local_size, _ = process_counts(multiprocessing, world_size)
        spawn_args = (max(rank, 0), nodes, local_size, dist_url, backend, worker, args)
        return _join(mp.start_processes(_spawned, spawn_args, nprocs=local_size, join=False))
    device = _device(gpu or 0)
    if nodes > 1:
        return _join_and_run(Place(rank, nodes, 0, 1, device), dist_url, backend, worker, args)
    return worker(Place(device=device), *args)


def process_counts(multiprocessing, world_size):
    """How many processes `launch` would run on this node, and on all."""
    if _under_torchrun():
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    local_size = max(torch.cuda.device_count(), 1) if multiprocessing else 1
    return local_size, local_size * max(world_size, 1)


def _under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def _spawned(local_rank, node, nodes, local_size, dist_url, backend, worker, args):
    place = Place(node * local_size + local_rank, nodes * local_size, local_rank, local_size, _device(local_rank))
    run(lambda: _join_and_run(place, dist_url, backend, worker, args))


def _join(context):
    """Wait for all spawned processes, and pass signals on to them. When one fails the others are ended; its traceback
    or exit code is this process's."""
    def pass_on(number, frame):
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)
    for number in STOPPING:
        signal.signal(number, pass_on)
    try:
        while not context.join(grace_period=10):
            pass
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:
            raise RunFailed(f"process {error.error_index} was killed by {error.signal_name};"
                            " if that was for lack of memory, take a smaller --batch-size or fewer -j") from error
        sys.exit(error.exit_code)


def _join_and_run(place, dist_url, backend, worker, args):
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
        if backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"                           # what is on the host is exchanged between hosts
    elif backend == "nccl":
        backend = "gloo"
    dist.init_process_group(backend, init_method=dist_url, world_size=place.world_size, rank=place.rank)
    try:
        return worker(place, *args)
    finally:
        dist.destroy_process_group()


def _device(index):
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def barrier():
    if world_size() > 1:
        dist.barrier()
