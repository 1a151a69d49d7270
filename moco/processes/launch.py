"""The processes of a run: one alone, spawned ones (moco/processes/launch.py), torchrun's or srun's; how they rendezvous."""

import argparse
import atexit
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import distributed
from moco.data.folders import PathArray
from moco.distributed import DistContext
from moco.errors import PeerError, RunError, UsageError, first_line
from moco.processes import environment
from moco.processes.environment import COLLECTIVE_SECONDS, GRACE_SECONDS, JOIN_SECONDS, Launched, is_local_main
from moco.processes.exits import cli_main, exit_now, translate_error
from moco.processes.signals import STOP_SIGNALS, blocked, handle_stop_signals, signal_when_parent_ends

MULTICAST_DEFAULT = "tcp://224.66.41.62:23456"  # the published default; PyTorch no longer supports multicast


def resolve_world_size(
    *,
    multiprocessing: bool = False,
    world_size: int = -1,
    rank: int = -1,
    dist_url: str = MULTICAST_DEFAULT,
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
    if nodes > 1 or dist_url != MULTICAST_DEFAULT:
        host_and_port(dist_url)
    local_world_size = max(gpus, 1) if multiprocessing else 1
    return local_world_size, local_world_size * nodes


def by_launcher(
    multiprocessing: bool = False,
    world_size: int = -1,
    rank: int = -1,
    dist_url: str = MULTICAST_DEFAULT,
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
    return world_size, rank, tcp_url(found["MASTER_ADDR"], int(found["MASTER_PORT"]))


def launch(worker: Callable, args: tuple, **settings) -> object:
    """Run worker(ctx, *args) in this process or in one process per GPU, by the settings of `resolve_world_size`.

    1. torchrun, srun, an operator that sets RANK and WORLD_SIZE: the environment has the ranks (moco/processes/environment.py).
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
            url = tcp_url(reachable_host(launched), launched.port)
        return _join_and_run(ctx, url, backend, worker, args, f"{launched.launcher}, {url} ({launched.settings})")
    dist_url = settings.get("dist_url", MULTICAST_DEFAULT)
    _, node, dist_url = _from_env(settings.get("world_size", -1), settings.get("rank", -1), dist_url)
    nodes, node = total // local_world_size, max(node, 0)
    if nodes == 1 and settings.get("multiprocessing"):
        check_loopback()
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    if settings.get("multiprocessing"):
        if not torch.cuda.device_count():
            print("no GPU found: running one CPU process (gloo)", flush=True)
        rank = functools.partial(_run_rank, node, local_world_size, total, dist_url, backend, (worker, args))
        return spawn_ranks(rank, local_world_size)
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
    store = connect(ctx, dist_url, source)
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


# ---- gpus: The GPUs of this machine: whether PyTorch can use them, and what they can do.

PROC = Path("/proc/driver/nvidia")


def usable_gpus() -> int:
    """How many GPUs PyTorch can use. Raises UsageError if it sees some and can use none."""
    seen = torch.cuda.device_count()
    if not seen:
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return seen
    reasons = [_short(str(warning.message)) for warning in caught if "CUDA" in str(warning.message)]
    raise UsageError(
        f"this machine has {seen} GPUs that PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot"
        f" use: {'; '.join([*reasons, _driver()])}; update the driver or install a PyTorch for an older CUDA; to run on"
        " the CPU nevertheless, set CUDA_VISIBLE_DEVICES= (empty)"
    )


def say_why_on_cpu() -> None:
    """Print why this run is on the CPU although the machine has a GPU, if that is so, once per node."""
    if not torch.cuda.is_available() and (reason := _why_on_cpu()) and is_local_main():
        print(reason, file=sys.stderr, flush=True)


def _why_on_cpu() -> str:
    present = len(list((PROC / "gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if present and torch.version.cuda is None:
        reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
    elif present and visible is not None:
        reason = f"CUDA_VISIBLE_DEVICES={visible} hides them"
    elif present:
        reason = f"PyTorch sees none of them ({_driver()}); does nvidia-smi list them?"
    elif torch.backends.mps.is_available():
        return "running on the CPU: this machine has an Apple GPU, which is not supported"
    else:
        return ""
    return f"running on the CPU, although this machine has {present} NVIDIA GPUs: {reason}"


def _driver() -> str:
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", (PROC / "version").read_text())
    except OSError:
        found = None
    return f"the driver is {found[0]}" if found else "the driver's version is unknown"


def _short(message: str) -> str:
    """PyTorch's reason, without the advice that follows it."""
    return re.split(r"\. |\s*\(Triggered", first_line(message).removeprefix("CUDA initialization: "))[0]


def check_options(devices: Sequence[torch.device], precision: str, compiled: bool = False) -> None:
    """Raise UsageError unless the devices can compute in this precision and, with `compiled`, run compiled code."""
    for device in devices:
        if device.type != "cuda":
            continue
        capability = torch.cuda.get_device_capability(device)
        what = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        if precision == "bf16" and capability < (8, 0):
            raise UsageError(
                f"--precision bf16: {what} would only emulate it, slowly; use fp16, or a GPU of 8.0 or more"
            )
        if compiled and capability < (7, 0):
            raise UsageError(f"--compile: {what} is too old for it, it needs 7.0 or more; leave it out")
    if compiled:
        _check_compiler(any(device.type == "cuda" for device in devices))


def _check_compiler(on_gpu: bool) -> None:
    """Raise UsageError unless torch.compile finds the compiler that it needs."""
    if not on_gpu:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UsageError("--compile: on a CPU it needs a C++ compiler, and there is no g++; leave it out")
        return
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "--compile: on a GPU it needs Triton, which is not installed (pip install triton); leave it out"
        )
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        missing = f"CC={named} is none" if named else "there is no gcc or clang"
        raise UsageError(f"--compile: on a GPU it needs a C compiler, and {missing}; install one, or leave it out")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise UsageError(
            f"--compile: on a GPU it needs Python's headers, and there is no {header}; install them (Debian, Ubuntu:"
            " apt install python3-dev), or leave it out"
        )


# ---- spawn: Processes that this program starts itself, one per GPU: they start together, hear of signals, and end together.

METHOD = "spawn" if sys.platform == "darwin" else "fork"


def spawn_ranks(function: Callable[[int], object], count: int) -> None:
    """Call function(i) in process i of `count`, and wait for all; signals are forwarded to them.

    function: is pickled. If one process fails, the others are terminated, and this one exits with its code. Raises
    RunError if the starter was killed.
    """
    context = mp.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    starter = context.Process(target=_starter, args=(reader, count))
    with blocked():  # inherited: a signal to all processes must not end multiprocessing's resource tracker
        resource_tracker.ensure_running()  # it unblocks some of them
    with blocked():  # inherited: one that comes while the starter imports is kept until it can be forwarded
        starter.start()
        handle_stop_signals(lambda signum, frame: _forward(signum, [starter]))
    reader.close()
    with contextlib.suppress(BrokenPipeError), writer:  # then it has ended, with an exit code
        # Pickled here: as an argument, tensors in it would travel through /dev/shm, which containers keep small.
        writer.send_bytes(pickle.dumps(function))
    starter.join()
    if starter.exitcode < 0:
        raise _killed("the process that starts the ranks", starter.exitcode)
    if starter.exitcode:
        sys.exit(starter.exitcode)


def _starter(reader: Connection, count: int) -> None:
    """Start the processes and wait for them. Exit handlers are theirs: here they would run once more."""
    os.setpgrp()  # a terminal's signals arrive once, through the program
    try:
        cli_main(lambda: _start(reader, count))
        code = 0
    except SystemExit as stop:
        code = stop.code
    exit_now(code)


def _start(reader: Connection, count: int) -> None:
    received, processes = [], []

    def forward(signum, frame):
        received.append(signum)
        _forward(signum, processes)

    handle_stop_signals(forward)
    signal_when_parent_ends(signal.SIGTERM)
    try:
        function = pickle.loads(reader.recv_bytes())
    except EOFError:  # the program was killed
        return
    with blocked():  # until each has its own handlers
        context = mp.start_processes(_started, (function,), nprocs=count, join=False, start_method=METHOD)
        processes += context.processes
    del function  # it may hold a checkpoint, which each of them drops in time
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the program blocked them
    try:
        while not context.join(grace_period=GRACE_SECONDS):
            pass
    except mp.ProcessExitedException as error:
        if received:
            sys.exit(128 + received[-1])
        if error.exit_code < 0:
            raise _killed(f"process {error.error_index}", error.exit_code) from error
        sys.exit(error.exit_code)


def _started(local_rank: int, function: Callable[[int], object]) -> None:
    handle_stop_signals(signal.SIG_DFL)  # not the starter's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    environment.set_spawned_rank(local_rank)  # one process per node prints errors
    try:
        cli_main(lambda: function(local_rank))
    except Exception:  # printed here: the starter learns of one process only, which may not be the first to fail
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends forked processes without this


def _forward(signum: int, processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signum)


def _killed(what: str, exit_code: int) -> RunError:
    name = signal.Signals(-exit_code).name
    return RunError(f"{what} was killed by {name}; if memory ran out, use a smaller --batch-size or fewer -j")


# ---- rendezvous: Where the processes of a run meet: addresses, ports, and the store that connects them.


def connect(ctx: DistContext, dist_url: str, source: str = "") -> dist.Store:
    """The store through which the ranks of tcp://HOST:PORT connect, once all of them have; torchrun's for env://.

    source: where dist_url comes from, for messages. Raises RunError after JOIN_SECONDS, with the address that does not
    answer or the missing ranks, and if the port is taken.
    """
    if dist_url == "env://":
        return _torchruns_store(ctx)
    host, port = host_and_port(dist_url)
    source = source or f"--dist-url {dist_url}"
    deadline = time.monotonic() + JOIN_SECONDS
    if ctx.rank == 0:
        try:
            store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
        except dist.DistNetworkError as error:
            reason = "it is taken" if "EADDRINUSE" in str(error) else first_line(error)
            raise RunError(
                f"{source}: rank 0 cannot listen on port {port} of this machine, {reason}; use another"
                " port on all nodes"
            ) from error
    else:
        while not _answers(host, port):
            if time.monotonic() > deadline:
                raise RunError(
                    f"{source}: rank {ctx.rank} waited {JOIN_SECONDS} s, and rank 0 does not answer at"
                    f" {host}, port {port}; start node 0, and use an address of it that this machine can reach"
                )
            time.sleep(0.2)
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    store.set(f"rank {ctx.rank}", "here")
    while missing := [rank for rank in range(ctx.world_size) if not store.check([f"rank {rank}"])]:
        if time.monotonic() > deadline:
            raise RunError(
                f"{source}: after {JOIN_SECONDS} s, rank {', '.join(map(str, missing))} of"
                f" {ctx.world_size} ranks is missing; start its node with this address"
            )
        time.sleep(0.1)
    return store


def _torchruns_store(ctx: DistContext) -> dist.Store:
    """The store whose address torchrun has set, for this attempt: it may still hold what the one before has left."""
    limit = datetime.timedelta(seconds=JOIN_SECONDS)
    store, _, _ = next(dist.rendezvous("env://", rank=ctx.rank, world_size=ctx.world_size, timeout=limit))
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def host_and_port(dist_url: str) -> tuple[str, int]:
    """Of tcp://HOST:PORT. Raises UsageError for anything else, the published default included."""
    try:
        url = urlsplit(dist_url)
        good = url.scheme == "tcp" and url.hostname and url.port and dist_url != MULTICAST_DEFAULT
    except ValueError:  # a port that is not a number, or too large
        good = False
    if not good:
        raise UsageError(
            f"--dist-url {dist_url}: several nodes need the first one's address and a free port, for example"
            " tcp://10.0.0.1:10001"
        )
    return url.hostname, url.port


def tcp_url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def reachable_host(launched: Launched) -> str:
    """The host of rank 0, or its address where Slurm's name of a node is not the host's."""
    try:
        socket.getaddrinfo(launched.host, launched.port)
    except OSError:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            shown = subprocess.run(
                ["scontrol", "show", "node", launched.host], capture_output=True, text=True, timeout=10, check=True
            )
            if address := re.search(r"NodeAddr=(\S+)", shown.stdout):
                return address[1]
    return launched.host


def check_loopback() -> None:
    """Raise RunError if this machine cannot reach itself: PyTorch would try for five minutes, and say it each time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        try:
            socket.create_connection(server.getsockname(), timeout=5).close()
        except OSError as error:
            raise RunError(
                f"the processes of this node cannot connect over 127.0.0.1 ({error}): bring the loopback interface up"
                " (ip link set lo up), or run a single process, without --multiprocessing-distributed"
            ) from error


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- agreement: What all processes of a run must have in common, compared when they have met and before they do anything together.

# Options that may differ: where things are on a node, which node it is, and what only rank 0 does.
OWN_OPTIONS = {
    "data", "ckpt_path", "resume", "pretrained", "workers", "batch_size", "gpu", "rank", "local_rank", "dist_url",
    "print_freq", "verbose", "json", "plot", "latex", "classes", "val", "corruption", "sketch", "stylized",
    "rendition", "sets", "defaults", "auto_resume",
}  # fmt: skip
SHOWN = 4  # ranks named per value


def shared_options(args: argparse.Namespace) -> dict[str, object]:
    """{"--name": value} of the options that must be equal on all ranks."""
    return {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in OWN_OPTIONS}


def check_agreement(shared: Mapping[str, object], facts: Mapping[str, Callable[[], object]]) -> None:
    """Raise UsageError on all ranks if options, a fact or the code differ between them. All must call it first.

    Otherwise collectives would hang or abort, or the ranks would train different things without a word. facts: by name,
    functions of what to compare; they are called only where there are several ranks.
    """
    if distributed.world_size() == 1:
        return
    mine = {name: str(value) for name, value in shared.items()}
    mine |= {name: str(fact()) for name, fact in facts.items()}
    mine |= {"PyTorch": torch.__version__, "the code": f"version {code_version()}"}
    everyone = distributed.gather_lists([(socket.gethostname(), mine)])
    names = dict.fromkeys(name for _, own in everyone for name in own)
    found = [(name, [own.get(name, "not given") for _, own in everyone]) for name in names]
    differing = [f"{name} is {_by_rank(values, everyone)}" for name, values in found if len(set(values)) > 1]
    if differing:
        raise UsageError(
            f"the processes of this run do not agree: {'; '.join(differing)}; start all of them with the same options,"
            " data and code"
        )


def _by_rank(values: Sequence[str], everyone: Sequence[tuple[str, dict]]) -> str:
    parts = []
    for value in dict.fromkeys(values):
        ranks = [rank for rank, other in enumerate(values) if other == value]
        hosts = dict.fromkeys(everyone[rank][0] for rank in ranks)
        more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
        parts.append(f"{value} on rank {', '.join(map(str, ranks[:SHOWN]))}{more} ({', '.join(list(hosts)[:SHOWN])})")
    return ", but ".join(parts)


def code_version() -> str:
    """A digest of this project's code, as it is on this node's disk: of moco/ and of the script that runs."""
    package = Path(__file__).parent
    script = Path(sys.modules["__main__"].__file__ if hasattr(sys.modules["__main__"], "__file__") else __file__)
    sources = [*sorted(package.glob("*.py")), script]
    return digest([(source.name, source.read_bytes()) for source in sources])


def describe_files(paths: Sequence[str]) -> str:
    """Count and digest of a list of files, wherever their folder is."""
    return f"{len(paths)} files ({digest(paths)})"


def describe_classes(classes: Sequence[str]) -> str:
    """Count and digest of a class list."""
    return f"{len(classes)} classes ({digest(list(classes))})"


def describe_checkpoint(saved: Mapping) -> str:
    """Epoch, step and digest of what was loaded from a checkpoint."""
    if not saved:
        return "none"
    return f"epoch {saved.get('epoch')}, step {saved.get('step', 0)} ({digest(saved)})"


def digest(value: object) -> str:
    """Eight characters that differ for different values: tensors, arrays, paths, and containers of them."""
    state = hashlib.blake2b(digest_size=4)
    for part in _bytes_of(value):
        state.update(part)
    return state.hexdigest()


def _bytes_of(value: object) -> Iterable[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, PathArray):
        yield "\0".join(value.names()).encode(errors="surrogateescape")
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield b"{"
        for name, item in value.items():
            yield repr(name).encode()
            yield from _bytes_of(item)
        yield b"}"
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, (list, tuple)):
        yield b"["
        for item in value:
            yield from _bytes_of(item)
            yield b","
        yield b"]"
    else:
        yield repr(value).encode(errors="surrogateescape")
