"""The processes of a run: one alone, spawned ones (moco/spawn.py), torchrun's or srun's; how they rendezvous."""

import datetime
import functools
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from moco import environment, rendezvous, spawn
from moco.distributed import DistContext
from moco.environment import Launched
from moco.errors import PeerError, UsageError, translate_error
from moco.gpus import say_why_on_cpu, usable_gpus
from moco.limits import COLLECTIVE_SECONDS


def resolve_world_size(
    *,
    multiprocessing: bool = False,
    world_size: int = -1,
    rank: int = -1,
    dist_url: str = rendezvous.MULTICAST_DEFAULT,
    backend: str = "nccl",
    gpu: int | None = None,
) -> tuple[int, int]:
    """How many processes `launch` runs on this node, and in total. Raises UsageError if its options contradict."""
    gpus = usable_gpus()
    if gpu is not None and gpu >= gpus:
        raise UsageError(f"--gpu {gpu}: this machine has {gpus} GPUs; leave --gpu out to use the existing ones")
    if backend != "nccl" and not dist.is_backend_available(backend):
        raise UsageError(f"--dist-backend {backend}: this PyTorch has no such backend; use nccl (without a GPU: gloo)")
    if launched := by_launcher(multiprocessing, world_size, rank, dist_url):
        if launched.launcher == "torchrun" and 0 < gpus < launched.local_world_size:
            raise UsageError(
                f"torchrun --nproc-per-node={launched.local_world_size}: this machine has {gpus} GPUs; use one process"
                " per GPU"
            )
        if 1 < gpus < launched.local_world_size:  # a single one may be a task's own
            raise UsageError(
                f"{launched.launcher}: {launched.local_world_size} processes on this node, which has {gpus} GPUs; use"
                " one process per GPU"
            )
        return launched.local_world_size, launched.world_size
    world_size, rank, dist_url = _from_env(world_size, rank, dist_url)
    if world_size < 1 and world_size != -1:
        raise UsageError(f"--world-size {world_size}: it is the number of nodes; use 1 or more")
    nodes = max(world_size, 1)
    if not (0 <= rank < nodes or nodes == 1 and rank == -1):
        raise UsageError(
            f"--rank {rank}: with --world-size {nodes} it must be 0..{nodes - 1}, a different one on each node"
        )
    if nodes > 1 or dist_url != rendezvous.MULTICAST_DEFAULT:
        rendezvous.host_and_port(dist_url)
    local_world_size = max(gpus, 1) if multiprocessing else 1
    return local_world_size, local_world_size * nodes


def by_launcher(
    multiprocessing: bool = False,
    world_size: int = -1,
    rank: int = -1,
    dist_url: str = rendezvous.MULTICAST_DEFAULT,
    **others,
) -> Launched | None:
    """What torchrun, srun or the like says of this process; None if it goes by the options, or is alone.

    Raises UsageError if the options would make each of several processes a run of its own.
    """
    try:
        launched = environment.launched()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if launched is None or launched.launcher == "torchrun":
        return launched
    if not multiprocessing and world_size == -1:
        return launched
    if (max(world_size, 1), max(rank, 0)) == (launched.world_size, launched.rank):
        if not multiprocessing:
            return launched
        if launched.local_world_size == 1:
            return None  # each starts the processes of its node
    if multiprocessing and world_size == -1 and dist_url == "env://" and launched.local_world_size == 1:
        return None
    raise UsageError(
        f"{launched.launcher}: this is process {launched.rank} of {launched.world_size}, which contradicts --world-size"
        f" {world_size} --rank {rank}{' --multiprocessing-distributed' if multiprocessing else ''}: leave these options"
        " out, or start one process per node with --multiprocessing-distributed --world-size NODES --rank NODE"
    )


def _from_env(world_size: int, rank: int, dist_url: str) -> tuple[int, int, str]:
    """The options with what --dist-url env:// leaves to the environment. Raises UsageError if that lacks it."""
    if dist_url != "env://":
        return world_size, rank, dist_url
    values = dict(zip(("WORLD_SIZE", "RANK"), (world_size, rank)))
    names = [name for name, value in values.items() if value == -1] + ["MASTER_ADDR", "MASTER_PORT"]
    found = {name: os.environ.get(name, "") for name in names}
    bad = [name for name in names if not found[name] or name != "MASTER_ADDR" and not found[name].isdecimal()]
    if bad:
        raise UsageError(f"--dist-url env://: the environment variable {' and '.join(bad)} is not set, or no number")
    world_size, rank = (int(found.get(name, value)) for name, value in values.items())
    return world_size, rank, rendezvous.tcp_url(found["MASTER_ADDR"], int(found["MASTER_PORT"]))


def launch(worker: Callable, args: tuple, **settings) -> object:
    """Run worker(ctx, *args) in this process or in one process per GPU, by the settings of `resolve_world_size`.

    1. torchrun, srun, an operator that sets RANK and WORLD_SIZE: the environment has the ranks (moco/environment.py).
    2. multiprocessing: one process per GPU of this node (one CPU process without a GPU); `world_size` is the number of
       nodes and `rank` the number of this one.
    3. world_size > 1 without multiprocessing: this process is `rank` of `world_size`.
    4. otherwise: this process alone, without a process group.
    Several nodes rendezvous at `dist_url`, where rank 0 listens; a single node chooses a free port. Raises RunError if
    the processes cannot connect.
    """
    local_world_size, total = resolve_world_size(**settings)
    say_why_on_cpu()
    backend, gpu = settings.get("backend", "nccl"), settings.get("gpu")
    if launched := by_launcher(**settings):
        ctx = DistContext(*launched[1:5], devices_of(local_world_size)[launched.local_rank])
        url = "env://"
        if launched.launcher != "torchrun":
            url = rendezvous.tcp_url(rendezvous.reachable_host(launched), launched.port)
        return _join_and_run(ctx, url, backend, worker, args, f"{launched.launcher}, {url} ({launched.settings})")
    dist_url = settings.get("dist_url", rendezvous.MULTICAST_DEFAULT)
    _, node, dist_url = _from_env(settings.get("world_size", -1), settings.get("rank", -1), dist_url)
    nodes, node = total // local_world_size, max(node, 0)
    if nodes == 1 and settings.get("multiprocessing"):
        rendezvous.check_loopback()
        dist_url = f"tcp://127.0.0.1:{rendezvous.free_port()}"
    if settings.get("multiprocessing"):
        if not torch.cuda.device_count():
            print("no GPU found: running one CPU process (gloo)", flush=True)
        rank = functools.partial(_run_rank, node, local_world_size, total, dist_url, backend, (worker, args))
        return spawn.run(rank, local_world_size)
    device = device_of(gpu or 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise a context on GPU 0 as well
    if nodes > 1:
        return _join_and_run(DistContext(node, nodes, 0, 1, device), dist_url, backend, worker, args)
    return worker(DistContext(device=device), *args)


def _run_rank(
    node: int, local_world_size: int, world_size: int, dist_url: str, backend: str, job: tuple, local_rank: int
) -> None:
    rank = node * local_world_size + local_rank
    ctx = DistContext(rank, world_size, local_rank, local_world_size, device_of(local_rank))
    _join_and_run(ctx, dist_url, backend, *job)


def _join_and_run(ctx: DistContext, dist_url: str, backend: str, worker: Callable, args: tuple, source: str = ""):
    """Run the worker in a process group. source: where dist_url comes from, for messages."""
    if ctx.device.type == "cuda":
        torch.cuda.set_device(ctx.device)
        if backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"  # CPU tensors between the hosts, CUDA tensors over NCCL
    elif backend == "nccl":
        backend = "gloo"
    store = rendezvous.connect(ctx, dist_url, source)
    try:
        limit = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
        dist.init_process_group(backend, timeout=limit, world_size=ctx.world_size, rank=ctx.rank, store=store)
        result = worker(ctx, *args)
    except (UsageError, SystemExit):  # on all ranks: refused at the start, or stopped by a signal
        if dist.is_initialized():
            dist.destroy_process_group()  # otherwise gloo's threads may abort the process while it exits
        raise
    except RuntimeError as error:
        if ctx.local_rank and isinstance(translate_error(error), PeerError):
            sys.exit(1)  # one process per node reports it
        raise
    dist.destroy_process_group()  # not after an error, where it might wait for a rank that has ended
    return result


def device_of(index: int) -> torch.device:
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def devices_of(local_world_size: int, gpu: int | None = None) -> list[torch.device]:
    """The devices of this node's processes; gpu: that of a single process.

    Where each process sees one GPU, as under Slurm with --gpus-per-task=1, that is its own.
    """
    alone = torch.cuda.device_count() == 1
    return [device_of(gpu or (0 if alone else index)) for index in range(local_world_size)]
