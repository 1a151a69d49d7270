"""Run a script with a fault put into it:  python tests/faults.py FAULT SCRIPT ARGUMENT…

Faults that kill write the time to the file that the variable KILLED_AT names, if it is set.
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

from moco import errors, options  # noqa: E402
from moco.builder import MoCo  # noqa: E402
from moco.data import folders, images, loader  # noqa: E402
from moco.processes import launch  # noqa: E402
from moco.training import checkpoint  # noqa: E402
from moco.training.run import Run  # noqa: E402

RANK = int(os.environ.get("RANK", 0))


def die():
    if "KILLED_AT" in os.environ:
        Path(os.environ["KILLED_AT"]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("put in by a test")


def pause():
    print("pausing", flush=True)
    time.sleep(100)


def at_start(rank, action):
    original = launch._join_and_run

    def join_and_run(*args):
        if rank == RANK:
            action()
        return original(*args)

    launch._join_and_run = join_and_run


def in_step(rank, action, step=3):
    """Before the forward pass of a step of the run, counted from 1."""
    forward, calls = MoCo.forward, []

    def forward_until(self, *views):
        calls.append(1)
        if rank == RANK and len(calls) == step:
            action()
        return forward(self, *views)

    MoCo.forward = forward_until


def after_step(action, step):
    """After the optimizer's step, before the run counts it; in both training scripts."""
    after, calls = Run.after_step, []

    def after_until(self, **values):
        calls.append(1)
        if len(calls) == step:
            action()
        after(self, **values)

    Run.after_step = after_until


def in_saving(action):
    """When the file is written, but not yet in its place; rank 0 alone saves."""
    checkpoint.os.replace = lambda old, new: action()


def impatient(seconds=3):
    launch.JOIN_SECONDS = launch.COLLECTIVE_SECONDS = errors.COLLECTIVE_SECONDS = seconds


def impatient_for_batches(seconds=2):
    loader.DATA_SECONDS, loader.WAIT_SLICE = seconds, 1


def workers_as_asked():
    options.workers_per_rank = lambda total, ranks: -(-total // ranks)  # not at most one per core,
    warnings.filterwarnings("ignore", "This DataLoader will create")  # which PyTorch does not like


def report_listings():
    """Print each folder that is listed."""
    original = folders.list_images

    def list_images(directory, **options):
        print(f"listed {directory}", flush=True)
        return original(directory, **options)

    folders.list_images = list_images


FAULTS = {
    "killed at the start": lambda: at_start(2, die),
    "killed in a step": lambda: in_step(2, die),
    "killed in saving": lambda: in_saving(die),
    "wrong in a step": lambda: in_step(2, fail),
    "slow in a step": lambda: in_step(0, pause),
    "killed after step 9": lambda: after_step(die, 9),
    "SIGTERM in step 3": lambda: after_step(lambda: os.kill(os.getpid(), signal.SIGTERM), 3),
    "SIGTERM in step 8": lambda: after_step(lambda: os.kill(os.getpid(), signal.SIGTERM), 8),
    "impatient": impatient,
    "impatient for batches": impatient_for_batches,
    "workers as asked": workers_as_asked,
    "no fast JPEG decoder": lambda: setattr(images, "has_fast_jpeg", lambda: False),
    "report listings": report_listings,
}

if __name__ == "__main__":
    fault, script, *arguments = sys.argv[1:]
    FAULTS[fault]()
    sys.argv = [script, *arguments]
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")
