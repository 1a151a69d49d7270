"""One process or many: how they start, find each other, and end together."""

import os
import signal
import socket
import sys
import time
import traceback
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco.distributed import Place, under_torchrun
from moco.failures import BadInput, PeerLost, RunFailed, explained, run
from moco.signals import STOPPING

MULTICAST_DEFAULT = "tcp://224.66.41.62:23456"  # the published default; PyTorch dropped multicast long ago
JOIN_SECONDS = 300               # how long processes wait for each other at the start


def process_counts(*, multiprocessing=False, world_size=-1, rank=-1, dist_url=MULTICAST_DEFAULT, backend="nccl", gpu=None):
    """How many processes `launch` would run on this node, and on all. BadInput where its options do not fit together."""
    gpus = torch.cuda.device_count()
    if gpu is not None and gpu >= gpus:
        raise BadInput(f"--gpu {gpu}: this machine has {gpus} GPUs; leave --gpu out to use what there is")
    if backend != "nccl" and not dist.is_backend_available(backend):
        raise BadInput(f"--dist-backend {backend}: this PyTorch has no such backend; use nccl, which is gloo without a GPU")
    if under_torchrun():
        local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        if 0 < gpus < local_size:
            raise BadInput(f"torchrun --nproc-per-node={local_size}: this machine has {gpus} GPUs; use one process a GPU")
        return local_size, int(os.environ["WORLD_SIZE"])
    if world_size < 1 and world_size != -1:
        raise BadInput(f"--world-size {world_size}: it is the number of nodes; use 1 or more")
    nodes = max(world_size, 1)
    if not (0 <= rank < nodes or nodes == 1 and rank == -1):
        raise BadInput(f"--rank {rank}: with --world-size {nodes} it must be 0..{nodes - 1}, one number each node")
    if nodes > 1 or dist_url != MULTICAST_DEFAULT:
        _host_and_port(dist_url)
    local_size = max(gpus, 1) if multiprocessing else 1
    return local_size, local_size * nodes


def launch(worker, args, **settings):
    """Run worker(place, *args) in this process or in one process a GPU, as the settings of `process_counts` say.

    1. torchrun: its environment says who this process is; the options are not needed.
    2. multiprocessing: one process a GPU on this node (one CPU process without a GPU); `world_size` counts the
       nodes and `rank` is this node's.
    3. world_size > 1 without multiprocessing: this process is `rank` of `world_size`.
    4. otherwise: this process alone, no process group.
    Several nodes meet at `dist_url`, where rank 0 listens; one node takes a free port. RunFailed where they do not meet.
    """
    local_size, everywhere = process_counts(**settings)
    backend, gpu = settings.get("backend", "nccl"), settings.get("gpu")
    if under_torchrun():
        numbers = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        return _join_and_run(Place(*numbers, device_of(numbers[2])), "env://", backend, worker, args)
    nodes, node = everywhere // local_size, max(settings.get("rank", -1), 0)
    dist_url = settings["dist_url"] if nodes > 1 else f"tcp://127.0.0.1:{free_port()}"
    if settings.get("multiprocessing"):
        if not torch.cuda.device_count():
            print("no GPU found: one CPU process, over gloo", flush=True)
        spawn_args = (node, nodes, local_size, dist_url, backend, worker, args)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)                # inherited by multiprocessing's resource tracker
        return _wait_for(mp.start_processes(_spawned, spawn_args, nprocs=local_size, join=False))
    device = device_of(gpu or 0)
    if nodes > 1:
        return _join_and_run(Place(node, nodes, 0, 1, device), dist_url, backend, worker, args)
    return worker(Place(device=device), *args)


def _spawned(local_rank, node, nodes, local_size, dist_url, backend, worker, args):
    place = Place(node * local_size + local_rank, nodes * local_size, local_rank, local_size, device_of(local_rank))
    os.environ["LOCAL_RANK"] = str(local_rank)                       # as under torchrun: one process a node speaks
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    os.setpgrp()                                                     # a terminal's signals come once, by way of the parent
    try:
        run(lambda: _join_and_run(place, dist_url, backend, worker, args))
    except Exception:  # said here: the parent hears of one process only, maybe not of the first
        traceback.print_exc()
        sys.exit(1)


def _wait_for(context):
    """Wait for all spawned processes, and pass signals on to them. When one fails the others are ended; its exit code is
    this process's."""
    received = []

    def pass_on(number, frame):
        received.append(number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)
    for number in STOPPING:
        signal.signal(number, pass_on)
    try:
        while not context.join(grace_period=10):
            pass
    except mp.ProcessExitedException as error:
        if received:
            sys.exit(128 + received[-1])
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
    meeting = {"store": _meet(place, dist_url)} if dist_url.startswith("tcp:") else {"init_method": dist_url}
    try:
        dist.init_process_group(backend, world_size=place.world_size, rank=place.rank, **meeting)
        result = worker(place, *args)
    except RuntimeError as error:
        if place.local_rank and isinstance(explained(error), PeerLost):
            sys.exit(1)                                              # one process a node says so
        raise
    dist.destroy_process_group()                                     # after an error it might wait for who is gone
    return result


def _meet(place, dist_url):
    """The store through which the processes of tcp://HOST:PORT find each other, once all of them are there.

    RunFailed after JOIN_SECONDS, naming the address nobody answers at or the missing ranks, and where the port is taken.
    """
    host, port = _host_and_port(dist_url)
    deadline = time.monotonic() + JOIN_SECONDS
    if place.rank == 0:
        try:
            store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
        except dist.DistNetworkError as error:
            reason = "it is taken" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
            raise RunFailed(f"--dist-url {dist_url}: rank 0 cannot listen on port {port} of this machine, {reason}; use another"
                            " on all nodes") from error
    else:
        while not _answers(host, port):
            if time.monotonic() > deadline:
                raise RunFailed(f"--dist-url {dist_url}: rank {place.rank} waited {JOIN_SECONDS} s, and rank 0 does not answer at"
                                f" {host}, port {port}; start node 0, and name an address of it that this machine reaches")
            time.sleep(0.2)
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    store.set(f"rank {place.rank}", "here")
    while missing := [rank for rank in range(place.world_size) if not store.check([f"rank {rank}"])]:
        if time.monotonic() > deadline:
            raise RunFailed(f"--dist-url {dist_url}: after {JOIN_SECONDS} s, rank {', '.join(map(str, missing))} of"
                            f" {place.world_size} ranks is missing; start its node with this address")
        time.sleep(0.1)
    return store


def _answers(host, port):
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _host_and_port(dist_url):
    try:
        url = urlsplit(dist_url)
        good = url.scheme == "tcp" and url.hostname and url.port and dist_url != MULTICAST_DEFAULT
    except ValueError:                                               # a port that is no number, or too large
        good = False
    if not good:
        raise BadInput(f"--dist-url {dist_url}: nodes need the first one's address and a free port, for example"
                       " tcp://10.0.0.1:10001")
    return url.hostname, url.port


def device_of(index):
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
