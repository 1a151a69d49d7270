"""Start the processes of a run: one alone, one per GPU, or those of torchrun, srun and several nodes."""

import argparse
import atexit
import datetime
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import distributed
from moco.distributed import DistContext
from moco.errors import PeerError, RunError, UsageError, first_line
from moco.processes import environment
from moco.processes.environment import Launched, is_local_main, is_main  # noqa: F401 (is_main for the scripts)
from moco.processes.exits import cli_main, translate_error
from moco.processes.signals import STOP_SIGNALS, blocked, handle_stop_signals

if sys.platform == "win32":  # before anything fails that is missing there
    print("error: native Windows has no POSIX signals; use WSL, where everything is as on Linux", file=sys.stderr)
    sys.exit(2)

DEFAULTS = {  # of options.add_launch_options; a script may have only some of them
    "multiprocessing_distributed": False, "world_size": -1, "rank": -1, "dist_backend": "nccl", "gpu": None,
    "dist_url": "tcp://224.66.41.62:23456",  # multicast, as published; PyTorch no longer supports it
}  # fmt: skip
JOIN_SECONDS = 300  # for all ranks to come, at the start; torchrun has limits of its own
COLLECTIVE_SECONDS = 900  # for a rank that is cut off, or waits for its data: NCCL's and gloo's limit in a step
GRACE_SECONDS = 30  # for the other ranks to save once one has failed; torchrun and Slurm give 30 s, too
METHOD = "spawn" if sys.platform == "darwin" else "forkserver"
PRELOADED = ["torch", "torch.distributed", "torch.optim.swa_utils", "torchvision.transforms.v2"]  # by the fork server


def launch(worker: Callable, args: argparse.Namespace, inputs: object, agree: Mapping[str, object]) -> None:
    """Call worker(ctx, args, inputs) in this process or in one process per GPU, by the options of `args`.

    1. torchrun, srun, an operator that sets RANK and WORLD_SIZE: moco/processes/environment.py finds the rank.
    2. --multiprocessing-distributed: one process per GPU of this node (one CPU process without a GPU); --world-size is
       the number of nodes and --rank the number of this one.
    3. --world-size above 1 without that: this process is --rank of --world-size.
    4. Otherwise this process alone, without a process group.
    Several nodes meet at --dist-url, where rank 0 listens; a single node meets in a file.

    agree: {name: plain value} that must be equal on all ranks. Raises UsageError if they differ, or if options
    contradict; RunError if the processes cannot connect.
    """
    options, launched = _resolve(args)
    local_world_size, total = resolve_world_size(args)
    say_why_on_cpu()
    job = (worker, args, inputs, agree)
    if launched:
        ctx = DistContext(*launched[1:5], devices_of(local_world_size)[launched.local_rank])
        url = "env://" if launched.launcher == "torchrun" else _tcp_url(launched.host, launched.port)
        return _join_and_run(ctx, url, options.dist_backend, *job)
    nodes, node, url = total // local_world_size, max(options.rank, 0), options.dist_url
    if options.multiprocessing_distributed:
        if not usable_gpus():
            print("no GPU found: running one CPU process (gloo)", flush=True)
        with tempfile.TemporaryDirectory() as folder:  # in which the ranks of a single node meet
            url = url if nodes > 1 else f"file://{folder}/store"
            return _start_ranks(node, local_world_size, total, (url, options.dist_backend, *job))
    (device,) = devices_of(1, options.gpu)
    if nodes > 1:
        return _join_and_run(DistContext(node, nodes, 0, 1, device), url, options.dist_backend, *job)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise a context on GPU 0 as well
    worker(DistContext(device=device), args, inputs)


def resolve_world_size(args: argparse.Namespace) -> tuple[int, int]:
    """The number of processes that `launch` runs on this node, and in total. UsageError if the options contradict."""
    (options, launched), gpus = _resolve(args), usable_gpus()
    if options.gpu is not None and options.gpu >= gpus:
        raise UsageError(f"--gpu {options.gpu}: this machine has {gpus} GPUs; leave --gpu out to use the existing ones")
    if launched:
        # A single GPU may be a task's own, except torchrun's, whose processes all see the same.
        if (0 if launched.launcher == "torchrun" else 1) < gpus < launched.local_world_size:
            raise UsageError(
                f"{launched.launcher}: {launched.local_world_size} processes for {gpus} GPUs; use one per GPU"
            )
        return launched.local_world_size, launched.world_size
    nodes = 1 if options.world_size == -1 else options.world_size
    if not (0 <= options.rank < nodes or nodes == 1 and options.rank == -1):
        raise UsageError(f"--world-size {options.world_size} --rank {options.rank}: N nodes have --rank 0 to N-1")
    if nodes > 1 and not re.fullmatch(r"tcp://(\[[\da-fA-F:]+\]|(?!224\.)[^:/\[\]]+):\d{1,5}/?", options.dist_url):
        raise UsageError(
            f"--dist-url {options.dist_url}: use the address and a free port of node 0, like tcp://10.0.0.1:10001"
        )
    local_world_size = max(gpus, 1) if options.multiprocessing_distributed else 1
    return local_world_size, local_world_size * nodes


def _resolve(args: argparse.Namespace) -> tuple[argparse.Namespace, Launched | None]:
    """The options, and the rank set by a launcher; None if there is no launcher or --world-size and --rank apply.

    Raises UsageError if the options would make each of several processes a run of its own.
    """
    options = argparse.Namespace(**DEFAULTS | vars(args))
    per_node = options.multiprocessing_distributed
    try:
        launched = environment.launched()
        if launched and (launched.launcher == "torchrun" or not per_node and options.world_size == -1):
            return options, launched
        if options.dist_url == "env://":
            for name in ("world_size", "rank"):
                if getattr(options, name) == -1:
                    setattr(options, name, environment.number(name.upper()))
            options.dist_url = _tcp_url(environment.text("MASTER_ADDR"), environment.number("MASTER_PORT"))
    except ValueError as error:
        raise UsageError(str(error)) from error
    same = launched and (options.world_size, options.rank) == (launched.world_size, launched.rank)
    if launched and not (same and (launched.local_world_size == 1 or not per_node)):
        raise UsageError(
            f"{launched.launcher}: process {launched.rank} of {launched.world_size} contradicts --world-size"
            f" {options.world_size} --rank {options.rank} or --multiprocessing-distributed: leave these out, or start"
            " one process per node"
        )
    return options, None if per_node else launched  # with per_node each starts the processes of its node


# ---------------------------------------------------------------- processes of this node


def _start_ranks(node: int, count: int, world_size: int, job: tuple) -> None:
    """Call _join_and_run(ctx, *job) in `count` processes of this node, and wait for all; signals are forwarded.

    If one fails, the others get SIGTERM after GRACE_SECONDS, and this program exits with its code; RunError if it was
    killed. They are forked from a server that has imported PyTorch, and end with this program.
    """
    mp.set_forkserver_preload(PRELOADED)
    with blocked():  # a signal to all processes must not end the tracker of multiprocessing, which unblocks some
        resource_tracker.ensure_running()
    with blocked():  # nor the fork server; one that comes while it imports PyTorch is forwarded afterwards
        arguments = (node * count, count, world_size, _Job(job))
        ranks = mp.start_processes(_rank, arguments, nprocs=count, join=False, start_method=METHOD)
        received: list[int] = []

        def forward(signum, frame):
            received.append(signum)
            for process in ranks.processes:
                if process.is_alive():
                    os.kill(process.pid, signum)

        handle_stop_signals(forward)
    try:
        while not ranks.join(grace_period=GRACE_SECONDS):
            pass
    except mp.ProcessExitedException as error:
        if received:
            sys.exit(128 + received[-1])
        if 0 < error.exit_code < 255:
            sys.exit(error.exit_code)
        # The error names the process and the signal; without one, 255 is the fork server's own end.
        killed = error.signal_name in (None, "SIGKILL")
        way = "if memory ran out, use a smaller batch or fewer -j" if killed else "its own messages are above"
        raise RunError(f"{error}; {way}") from error
    if server := getattr(forkserver._forkserver, "_forkserver_pid", None):
        os.kill(server, signal.SIGKILL)  # it has nothing to save, and `| tee` would wait for PyTorch's exit handlers


class _Job(tuple):
    """Pickled anew as each process starts, since a lock goes to one process at a time; tensors not through /dev/shm."""

    def __reduce__(self):
        return bytes, (pickle.dumps(tuple(self)),)


def _rank(local_rank: int, first_rank: int, count: int, world_size: int, job: bytes) -> None:
    os.setpgrp()  # a terminal's signals arrive once, through the program
    handle_stop_signals(signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    environment.spawned_rank = local_rank  # one process per node prints errors
    ctx = DistContext(first_rank + local_rank, world_size, local_rank, count, devices_of(count)[local_rank])
    try:
        cli_main(lambda: _join_and_run(ctx, *pickle.loads(job)))
    except Exception:  # printed here: the program learns of one process only, which may not be the first to fail
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends forked processes without this


# ---------------------------------------------------------------- process group


def _join_and_run(
    ctx: DistContext, url: str, backend: str, worker: Callable, args: object, inputs: object, agree: Mapping
) -> None:
    """Call the worker in a process group whose ranks meet at `url`."""
    if ctx.device.type == "cuda":
        torch.cuda.set_device(ctx.device)
    if ctx.local_world_size == ctx.world_size:  # nothing of a single node listens on the network
        for name in "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME":
            os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
    if backend == "nccl":  # for CUDA tensors; the hosts exchange CPU tensors
        backend = "cpu:gloo,cuda:nccl" if ctx.device.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group(backend, timeout=limit, world_size=ctx.world_size, rank=ctx.rank, store=_meet(ctx, url))
    if "nccl" in backend:  # so that a stuck rank ends in gloo's one line, not in 45 of NCCL's
        dist.group.WORLD._get_backend(ctx.device)._set_default_timeout(2 * limit)
    try:
        check_agreement(agree)
        worker(ctx, args, inputs)
    except (UsageError, SystemExit):  # on all ranks: refused at the start, or stopped by a signal
        dist.destroy_process_group()  # otherwise gloo's threads may abort the process while it exits
        raise
    except RuntimeError as error:
        if ctx.local_rank and isinstance(translate_error(error), PeerError):
            sys.exit(1)  # one process per node reports it
        raise
    dist.destroy_process_group()  # not after an error, where it might wait for a rank that has ended


def _meet(ctx: DistContext, url: str) -> dist.Store:
    """The store of all ranks, once all are there. Raises RunError after JOIN_SECONDS, or if the port is taken."""
    limit = datetime.timedelta(seconds=JOIN_SECONDS)
    try:
        store, _, _ = next(dist.rendezvous(url, rank=ctx.rank, world_size=ctx.world_size, timeout=limit))
    except (dist.DistError, ValueError, OSError) as error:
        raise RunError(
            f"rank {ctx.rank} of {ctx.world_size} could not join the others at {url} ({first_line(error)}); start all"
            f" nodes within {JOIN_SECONDS} s, with an address of node 0 that they can reach and a free port of it"
        ) from error
    # After a restart, torchrun's store may still hold what the attempt before has left.
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def check_agreement(agree: Mapping[str, object]) -> None:
    """Raise UsageError on all ranks if a value differs between them: they would hang, or train different things."""
    mine = {name: str(value) for name, value in {**agree, "PyTorch": torch.__version__}.items()}
    everyone = distributed.gather_lists([(socket.gethostname(), mine)])
    first_host, first = everyone[0]
    for rank, (host, own) in enumerate(everyone):
        for name in first:
            if own[name] != first[name]:
                start = max(0, len(os.path.commonprefix([first[name], own[name]])) - 20)  # print what differs
                raise UsageError(
                    f"{name} is {first[name][start:][:60]} on rank 0 ({first_host}), but {own[name][start:][:60]} on"
                    f" rank {rank} ({host}); start all processes with the same options, data and code"
                )


def _tcp_url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


# ---------------------------------------------------------------- GPUs


def devices_of(local_world_size: int, gpu: int | None = None) -> list[torch.device]:
    """The devices of this node's processes; gpu: that of a single process."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")] * local_world_size
    seen = torch.cuda.device_count()  # 1 if each task has its own, as under Slurm with --gpus-per-task=1
    return [torch.device("cuda", gpu or index % seen) for index in range(local_world_size)]


def usable_gpus() -> int:
    """The number of GPUs that PyTorch can use. Raises UsageError if it sees others: broken ones, or parts (MIG)."""
    seen, usable = torch.cuda.device_count(), torch.accelerator.device_count() if torch.cuda.is_available() else 0
    if usable < seen:
        raise UsageError(
            f"PyTorch {torch.__version__} can use {usable} of the {seen} GPUs of this machine; name these in"
            " CUDA_VISIBLE_DEVICES (a part of a GPU by its MIG-… of nvidia-smi -L), or set it empty to use the CPU"
        )
    return seen


def say_why_on_cpu() -> None:
    """Print on stderr, once per node, which kinds of GPUs this machine has if the run leaves them idle."""
    if torch.cuda.is_available() or not is_local_main():
        return
    devices = {"NVIDIA": "nvidia[0-9]*", "AMD": "kfd"}
    idle = [name for name, pattern in devices.items() if any(Path("/dev").glob(pattern))]
    idle += [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []  # xpu, mps
    if idle:
        why = f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}, ROCm {torch.version.hip}) finds none it can use"
        gpus, visible = ", ".join(idle), os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        print(f"running on the CPU, not on a GPU ({gpus}): {why}; CUDA_VISIBLE_DEVICES is {visible}", file=sys.stderr)


def check_devices(devices: Sequence[torch.device], precision: str) -> None:
    """Raise UsageError unless this PyTorch has kernels for the devices, and they can compute in this precision."""
    archs = torch.cuda.get_arch_list()
    for device in (device for device in devices if device.type == "cuda"):
        with warnings.catch_warnings():  # PyTorch says in 20 lines what is said here in one
            warnings.simplefilter("ignore")
            name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if not has_kernels(archs, capability):
            raise UsageError(
                f"{name} is sm_{capability[0]}{capability[1]}, and PyTorch {torch.__version__} has kernels for"
                f" {' '.join(archs)}; for sm_50 to sm_70 install PyTorch up to 2.14 with pip's --index-url"
                " https://download.pytorch.org/whl/cu126, else a newer one; or set CUDA_VISIBLE_DEVICES= for the CPU"
            )
        if precision == "bf16" and capability < (8, 0):
            raise UsageError(f"--precision bf16: {name} would only emulate it (it needs an Ampere or later); use fp16")


def has_kernels(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether PyTorch's kernels run on a GPU: those of sm_XY do on X.Y and later X.*, of compute_XY on all later."""
    listed = [(kind, int(number)) for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(archs))]
    own = 10 * capability[0] + capability[1]
    fits = (n <= own and (kind == "compute" or n // 10 == capability[0]) for kind, n in listed)
    return not listed or any(fits)  # AMD's are named otherwise
