"""Where the processes of a run meet: addresses, ports, and the store that connects them."""

import contextlib
import datetime
import os
import re
import socket
import subprocess
import time
from urllib.parse import urlsplit

import torch.distributed as dist

from moco.distributed import DistContext
from moco.environment import Launched
from moco.errors import RunError, UsageError, first_line
from moco.limits import JOIN_SECONDS

MULTICAST_DEFAULT = "tcp://224.66.41.62:23456"  # the published default; PyTorch no longer supports multicast


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
