"""Rank of this process, from the variables that torchrun, srun or an operator has set. Imports no PyTorch."""

import argparse
import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

TORCHRUN_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE")
PORTS = range(15000, 30000)  # for rank 0 of a Slurm step: below those that the system gives to clients
SHELL_STEPS = 0xFFFFFFF0  # Slurm's step numbers from here on are of batch and interactive shells
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
spawned_rank = 0  # set by `launch` in the processes that it starts: their rank on this node


class Launched(NamedTuple):
    """A process that a launcher started together with others."""

    launcher: str  # "torchrun", "RANK and WORLD_SIZE", "srun"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int  # processes on this node
    host: str = ""  # where rank 0 listens; torchrun has an address of its own
    port: int = 0


def under_torchrun() -> bool:
    """Whether torchrun started this process; an environment may hold single variables of another's."""
    return "TORCHELASTIC_RUN_ID" in os.environ and all(os.environ.get(name, "").isdecimal() for name in TORCHRUN_RANKS)


def restarted() -> bool:
    """Whether torchrun started this process again after a failure (--max-restarts)."""
    return under_torchrun() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def launched() -> Launched | None:
    """The rank set by torchrun, by RANK and WORLD_SIZE, or by srun, in this order; None for a single process.

    A process that belongs to a multi-process launch must never run as a single process: ValueError if variables are
    missing or do not fit.
    """
    if under_torchrun():
        found = Launched("torchrun", *(int(os.environ[name]) for name in TORCHRUN_RANKS[:4]))
    elif "RANK" in os.environ and number("WORLD_SIZE", 1) > 1:  # PyTorch's convention, as of Kubernetes' operators
        tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE")  # under srun; else a rank on its node says of how many
        share = int(tasks.removesuffix(")").split("(x")[0]) if tasks else None if "LOCAL_RANK" in os.environ else 1
        local = number("LOCAL_RANK", number("SLURM_LOCALID", 0)), number("LOCAL_WORLD_SIZE", share)
        ranks = number("RANK"), number("WORLD_SIZE"), *local
        found = Launched("RANK and WORLD_SIZE", *ranks, text("MASTER_ADDR"), number("MASTER_PORT"))
    elif "SLURM_PTY_PORT" in os.environ:  # the shell of srun --pty
        return None
    elif number("SLURM_STEP_ID", SHELL_STEPS) < SHELL_STEPS and number("SLURM_STEP_NUM_TASKS") > 1:
        found = _from_slurm()
    elif (size := max(number(name, 1) for name in MPI_SIZES)) > 1:
        raise ValueError(
            f"mpirun (or alike) started {size} processes without RANK and WORLD_SIZE: use torchrun or srun"
        )
    else:
        return None
    if not found.rank < found.world_size or not found.local_rank < found.local_world_size:
        ranks = f"rank {found.rank} of {found.world_size}, {found.local_rank} of {found.local_world_size} on this node"
        raise ValueError(f"{found.launcher}: {ranks}: a rank must be below the number of processes")
    return found


def _from_slurm() -> Launched:
    """A task of `srun python …`. MASTER_ADDR and MASTER_PORT may name another address of rank 0."""
    world_size, counts = number("SLURM_STEP_NUM_TASKS"), text("SLURM_STEP_TASKS_PER_NODE")
    if not (equal := re.fullmatch(r"(\d+)(\(x\d+\))?", counts)):
        raise ValueError(f"srun: SLURM_STEP_TASKS_PER_NODE={counts}: start equally many per node (--ntasks-per-node)")
    local_world_size = int(equal[1])
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", text("SLURM_STEP_NODELIST")).split(",")[0]  # n03 of n[03-05,9],m1
    host = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if local_world_size == world_size else first)
    port = PORTS[(7 * number("SLURM_JOB_ID", 0) + number("SLURM_STEP_ID")) % len(PORTS)]  # the same in all tasks
    ranks = number("SLURM_PROCID"), world_size, number("SLURM_LOCALID"), local_world_size
    return Launched("srun", *ranks, host, number("MASTER_PORT", port))


def usable_cores() -> int:
    """The number of cores that this process may use, by its affinity and by the quota of its container (cgroup 2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # without a quota its first word is "max"
        quota, period = map(int, CPU_MAX.read_text().split())
        cores = min(cores, -(-quota // period))
    return cores


def number(name: str, default: int | None = None) -> int:
    """An environment variable as a number. ValueError if it is none, or not set without a default."""
    value = os.environ.get(name) or ("nothing" if default is None else str(default))
    if not value.isdecimal():
        raise ValueError(f"the environment has {name}={value}: it must be a whole number, 0 or more")
    return int(value)


def text(name: str) -> str:
    """An environment variable. ValueError if it is not set."""
    if not os.environ.get(name):
        raise ValueError(f"{name} is not set in the environment; a launcher sets it, and --dist-url env:// needs it")
    return os.environ[name]


def is_local_main() -> bool:
    """Whether this is the first process of its node. All of them find the same bad input; one reports it."""
    return not spawned_rank and _is_zero("local_rank")


def is_main(args: argparse.Namespace | None = None) -> bool:
    """Whether this is the first process of its run, by a launcher or by --rank of `args`; works before they connect."""
    return not spawned_rank and _is_zero("rank") and getattr(args, "rank", -1) < 1


def _is_zero(rank: str) -> bool:
    try:
        return getattr(launched(), rank, 0) == 0
    except ValueError:  # reported by each, since none knows which it is
        return True
