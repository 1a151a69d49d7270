"""Run a script with a fault put into it:  python tests/faults/inject.py FAULT SCRIPT ARGUMENT…

FAULT: one of SETTINGS, or "ACTION in PLACE [CALL] [of rank R]", for example "SIGTERM in step 3" or "killed in saving":
at the so many-th call of a function, the first by default, on one rank of torchrun's or on all. "at" may stand for
"in". Loading processes have the fault, too. A kill writes its time to the file that KILLED_AT names.
"""

import errno
import fcntl
import importlib
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from moco.errors import RunError  # noqa: E402

PLACES = {  # where a fault can be: a function that the scripts call there
    "the start": "moco.processes.launch:_join_and_run",
    "listing": "moco.data.folders:list_images",
    "building": "moco.training.run:Run.__init__",
    "resuming": "moco.training.run:Run.resume",
    "item": "moco.data.datasets:RetryDataset.__getitem__",
    "test item": "moco.data.datasets:ImageList.__getitem__",
    "decoding": "PIL.Image:open",
    "views": "moco.views:training_views",
    "step": "moco.training.run:Run.after_step",  # after the optimizer's step, before the run counts it
    "report": "moco.training.metrics:Progress.report",
    "saving": "moco.training.checkpoint:save",
    "replacing": "os:replace",  # a file is written, but not yet in its place
    "logging": "moco.training.metrics:log_epoch",
    "evaluating": "moco.evaluation.classifier:evaluate",
    "kNN": "moco.evaluation.knn:accuracy",
    "options": "moco.options:OptionParser.parse_args",
}


def killed():
    if "KILLED_AT" in os.environ:
        Path(os.environ["KILLED_AT"]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def fails(error):
    def fail(*args):
        raise error

    return fail


def hangs(how):
    """Hang for good, like a mount that does not answer or a stopped process."""

    def hang():
        print("hanging", flush=True)
        how()

    return hang


def unread():
    """The reader of stdout has ended, as in `… | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)


ACTIONS = {
    "killed": killed,
    "a bug": fails(ValueError("put in by a test")),
    "data gone": fails(RunError("data are gone")),
    "stale files": fails(OSError(errno.ESTALE, "Stale file handle")),
    "no memory": fails(MemoryError()),
    "hanging": hangs(lambda: os.read(os.pipe()[0], 1)),
    "stopped": hangs(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "unread": unread,
    **{number.name: lambda number=number: os.kill(os.getpid(), number) for number in signal.Signals},
}


def both_closed():
    os.closerange(1, 3)
    sys.stdout = sys.stderr = None


def sets(module, **values):
    return lambda: vars(importlib.import_module(module)).update(values)


def windows():
    """Take away what Windows lacks; os.name stays, since pathlib would look for Windows' own modules."""
    sys.platform = "win32"
    kept = ["SIG_DFL", "SIG_IGN", "SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"]
    gone = [name for name in dir(signal) if name.startswith("SIG") and name not in kept]
    for name in [*gone, "pthread_sigmask", "pthread_kill", "alarm", "setitimer"]:
        delattr(signal, name)
    for name in ("fork", "killpg", "setsid", "sched_getaffinity", "O_NOFOLLOW"):
        delattr(os, name)
    for name in [each for each in sys.modules if each.partition(".")[0] == "moco"]:
        del sys.modules[name]
    sys.modules |= dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios", "tty", "pty"])  # not to be imported


SETTINGS = {
    "fork server": lambda: multiprocessing.set_start_method("forkserver", force=True),
    "impatient": sets("moco.processes.launch", JOIN_SECONDS=3, COLLECTIVE_SECONDS=3),
    "impatient for batches": sets("moco.data.loader", DATA_SECONDS=2),
    "workers as asked": sets("moco.options", workers_per_rank=lambda total, ranks: -(-total // ranks)),  # on any cores
    "two GPUs": sets("moco.processes.launch", usable_gpus=lambda: 2),  # whose processes find none, and use the CPU
    "unread stdout": unread,
    "stdout is full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "stdout cannot encode": lambda: sys.stdout.reconfigure(encoding="ascii", errors="strict"),
    "stderr cannot encode": lambda: sys.stderr.reconfigure(encoding="ascii", errors="strict"),
    "both are closed": both_closed,
    "Windows": windows,
    "no locks": lambda: setattr(fcntl, "flock", fails(OSError(errno.ENOLCK, "No locks available"))),
    "no flushing": lambda: setattr(os, "fsync", fails(OSError(errno.EOPNOTSUPP, "Operation not supported"))),
    "a failing disk": lambda: setattr(os, "fsync", fails(OSError(errno.EIO, "Input/output error"))),
    "no home": lambda: os.environ.update(HOME="/proc/nobody", XDG_CACHE_HOME="/proc/nobody"),
}


def put(action, place, call, rank):
    """Let the action happen in a place, at a call that is counted from 1; rank: None for all."""
    module, _, path = PLACES[place].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), []

    def changed(*args, **settings):
        calls.append(1)
        if len(calls) == call and rank in (None, os.environ.get("RANK", "0")):
            ACTIONS[action]()
        return original(*args, **settings)

    setattr(owner, name, changed)


if __name__ == "__main__":
    fault, *sys.argv = sys.argv[1:]
    multiprocessing.set_start_method("fork", force=True)  # so that loading processes have the fault, too
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    if fault in SETTINGS:
        SETTINGS[fault]()
    else:
        parts = re.fullmatch(r"(.+?) (?:in|at) (.+?)(?: (\d+))?(?: of rank (\d+))?", fault)
        put(parts[1], parts[2], int(parts[3] or 1), parts[4])
    runpy.run_path(str(REPOSITORY / sys.argv[0]), run_name="__main__")
