"""Run a script with a fault put into it:  python tests/faults.py FAULT SCRIPT ARGUMENT…

Faults that kill write the time to the file that the variable KILLED_AT names.
"""

import os
import runpy
import signal
import sys
import time
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from moco import checkpoint, launch, options  # noqa: E402
from moco.builder import MoCo  # noqa: E402

RANK = int(os.environ.get("RANK", 0))


def die():
    Path(os.environ["KILLED_AT"]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("put in by a test")


def dawdle():
    print("dawdling", flush=True)
    time.sleep(100)


def at_start(rank, action):
    joined = launch._join_and_run

    def join_and_run(*args):
        if rank == RANK:
            action()
        return joined(*args)
    launch._join_and_run = join_and_run


def in_step(rank, action, step=3):
    forward, calls = MoCo.forward, []

    def forward_until(self, *views):
        calls.append(1)
        if rank == RANK and len(calls) == step:
            action()
        return forward(self, *views)
    MoCo.forward = forward_until


def in_saving(action):
    """When the file is written, but not yet in its ctx; rank 0 alone saves."""
    checkpoint.os.replace = lambda old, new: action()


def impatient(seconds=3):
    launch.JOIN_SECONDS = seconds


def workers_as_asked():
    options.workers_per_rank = lambda total, processes: total     # not at most one a core,
    warnings.filterwarnings("ignore", "This DataLoader will create")  # which PyTorch does not like


FAULTS = {
    "killed at the start": lambda: at_start(2, die),
    "killed in a step": lambda: in_step(2, die),
    "killed in saving": lambda: in_saving(die),
    "wrong in a step": lambda: in_step(2, fail),
    "slow in a step": lambda: in_step(0, dawdle),
    "impatient": impatient,
    "workers as asked": workers_as_asked,
}

if __name__ == "__main__":
    fault, script, *arguments = sys.argv[1:]
    FAULTS[fault]()
    sys.argv = [script, *arguments]
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")
