"""Which process of a run this is, by the environment variables that its launcher has set."""

import os
import re
import signal
import threading
import time
from typing import NamedTuple

# How long processes wait for each other, in seconds; also listed in docs/reliability.md.
JOIN_SECONDS = 300  # at the start, for ranks that are not there yet; torchrun has limits of its own
COLLECTIVE_SECONDS = 900  # in a step, for a rank that is cut off, or waits for its data: gloo's and NCCL's own limit
DATA_SECONDS = 600  # for a batch, after which the run is saved and ends; less than COLLECTIVE_SECONDS
LISTING_SECONDS = 600  # for the list of files that the first process of a node makes; then each lists for itself
GRACE_SECONDS = 30  # for spawned ranks to save once one of them has failed; torchrun and Slurm give 30 s, too
LOADERS_END_SECONDS = 5  # for the loading processes, when a script ends
PARENT_SECONDS = 1  # between two looks at whether torchrun is still there

TORCHRUN_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
PORTS = range(15000, 30000)  # for a Slurm step's rank 0: below those that the system gives to clients
SHELL_STEPS = 0xFFFFFFF0  # Slurm's step numbers from here on are of batch and interactive shells
_spawned_rank = 0  # on this node, of a process that this program spawned


class Launched(NamedTuple):
    """A process that a launcher started together with others.

    local_world_size: the processes on this node. host, port: where rank 0 listens. settings: what they come from.
    """

    launcher: str  # "torchrun", "RANK and WORLD_SIZE", "srun"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    port: int
    settings: str = "MASTER_ADDR and MASTER_PORT"


def under_torchrun() -> bool:
    """Whether torchrun started this process: single variables of it may be left over in an environment."""
    return "TORCHELASTIC_RUN_ID" in os.environ and all(os.environ.get(name, "").isdecimal() for name in TORCHRUN_RANKS)


def launched() -> Launched | None:
    """What torchrun, an operator that sets RANK and WORLD_SIZE, or srun says of this process; None if it is alone.

    In this order, as `srun torchrun` is common. A single process of theirs counts as alone, except torchrun's. Raises
    ValueError with what is missing or contradicts; a run that is one of several must not take itself for the only one.
    """
    if under_torchrun():
        ranks = (int(os.environ[name]) for name in TORCHRUN_RANKS[:4])
        return Launched("torchrun", *ranks, os.environ.get("MASTER_ADDR", ""), int(os.environ["MASTER_PORT"]))
    found = _by_rank_variables() or _by_slurm()
    if found is None:
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
            if _number(name, 1) > 1:
                raise ValueError(
                    f"mpirun started {os.environ[name]} processes ({name}), each of which would be a run of its own;"
                    " set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each, or use torchrun or srun"
                )
    elif not 0 <= found.rank < found.world_size or not 0 <= found.local_rank < found.local_world_size:
        raise ValueError(
            f"{found.launcher}: rank {found.rank} of {found.world_size}, {found.local_rank} of"
            f" {found.local_world_size} on this node: a rank must be below their number"
        )
    return found if found and found.world_size > 1 else None


def end_with_torchrun() -> None:
    """From now on, get SIGTERM once torchrun has ended, even if it was killed, whatever this process is waiting for.

    A rank that outlives torchrun would write beside the resumed run. Does nothing without torchrun.
    """
    if under_torchrun():
        threading.Thread(target=_wait_for_end_of, args=(os.getppid(),), daemon=True).start()


def _wait_for_end_of(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def set_spawned_rank(local_rank: int) -> None:
    global _spawned_rank
    _spawned_rank = local_rank


def is_local_main() -> bool:
    """Whether this is the first process of its node. All of them find the same bad input; one reports it."""
    return not _spawned_rank and _is_first("local_rank")


def is_main() -> bool:
    """Whether this is the first process of those a launcher started; of use before they connect."""
    return not _spawned_rank and _is_first("rank")


def _is_first(rank: str) -> bool:
    try:
        found = launched()
    except ValueError:  # reported by each, since none knows which it is
        return True
    return found is None or getattr(found, rank) == 0


def _by_rank_variables() -> Launched | None:
    """PyTorch's own convention, as Kubernetes operators use it: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    if "RANK" not in os.environ or _number("WORLD_SIZE", 1) < 2:
        return None
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if not os.environ.get(name)]:
        raise ValueError(
            f"the environment has RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']}, but not"
            f" {' and '.join(missing)}, where rank 0 listens: set it, or unset RANK and WORLD_SIZE for a single process"
        )
    in_step = _in_slurm_step()
    local_rank = _number("LOCAL_RANK", _number("SLURM_LOCALID", 0) if in_step else 0)
    known = _slurm_tasks_here() if in_step else 0
    local_world_size = _number("LOCAL_WORLD_SIZE", known or (1 if local_rank == 0 else 0))
    if not local_world_size:
        raise ValueError(
            f"the environment has LOCAL_RANK={local_rank}, but not LOCAL_WORLD_SIZE: set it to the number of processes"
            " on this node"
        )
    rank, world_size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    host = os.environ["MASTER_ADDR"]
    return Launched("RANK and WORLD_SIZE", rank, world_size, local_rank, local_world_size, host, port)


def _by_slurm() -> Launched | None:
    """A task of `srun python …`, with ranks as Slurm gives them."""
    world_size = _number("SLURM_STEP_NUM_TASKS", _number("SLURM_NTASKS", 1))
    if not _in_slurm_step() or world_size < 2:
        return None
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    local_world_size = _slurm_tasks_here()
    host = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if local_world_size == world_size else first_host(nodes))
    job, step = (_number(name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = _number("MASTER_PORT", PORTS[(7 * job + step) % len(PORTS)])  # all tasks of a step compute the same
    rank, local_rank = _number("SLURM_PROCID"), _number("SLURM_LOCALID")
    settings = "from Slurm's variables; MASTER_ADDR and MASTER_PORT change them"
    return Launched("srun", rank, world_size, local_rank, local_world_size, host, port, settings)


def _in_slurm_step() -> bool:
    """Whether srun started this process. Batch scripts and shells have a rank, too, and are alone."""
    if "SLURM_PROCID" not in os.environ or "SLURM_LOCALID" not in os.environ:
        return False
    if _number("SLURM_STEP_ID", 0) >= SHELL_STEPS:
        return False
    return "SLURM_STEP_ID" in os.environ or "SLURM_JOB_ID" not in os.environ or os.environ["SLURM_PROCID"] != "0"


def _slurm_tasks_here() -> int:
    """The tasks of this step on this node. Raises ValueError if Slurm does not say."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE")
    if not counts:
        if _number("SLURM_NNODES", 1) > 1:
            raise ValueError("srun: SLURM_STEP_TASKS_PER_NODE is not set, so that the tasks on this node are not known")
        return _number("SLURM_STEP_NUM_TASKS", _number("SLURM_NTASKS", 1))
    per_node = tasks_per_node(counts)
    node = _number("SLURM_NODEID", 0)
    if node >= len(per_node):
        raise ValueError(f"srun: SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={counts}")
    return per_node[node]


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's compressed list of task counts, "2(x3),1", as one number per node: [2, 2, 2, 1]."""
    result = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ValueError(f"srun: SLURM_STEP_TASKS_PER_NODE={counts} is no list of numbers such as 2(x3),1")
        result += [int(match[1])] * int(match[2] or 1)
    return result


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list: "gpu[003-005,9],login1" gives "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodes)
    if not match:
        raise ValueError(f"srun: SLURM_STEP_NODELIST={nodes} names no host; set MASTER_ADDR to the first node's")
    return match[1] + (match[2] or "") + (match[3] if match[2] else "")


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise ValueError(f"the environment has {name}={text or 'nothing'}: it must be a whole number, 0 or more")
    return int(text)
