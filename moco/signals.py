"""Stopping a run from outside: the step that runs is finished and saved first."""

import functools
import multiprocessing.util
import os
import signal
import sys

from moco import distributed

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)           # SIGUSR1 is what Slurm is told to send


class Stop:
    """Remembers which of STOPPING came to this process. A second SIGINT ends it at once.

    The end of torchrun counts as SIGTERM: ranks that outlived it would train, and write, beside the resumed run.
    """

    def __init__(self):
        self._number, self._torchrun = 0, os.getppid() if distributed.under_torchrun() else None
        for number in STOPPING:
            signal.signal(number, self._remember)

    def received(self):
        """The signal's number, 0 for none."""
        if self._torchrun and os.getppid() != self._torchrun:
            return signal.SIGTERM
        return self._number

    def _remember(self, number, frame):
        self._number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def leave(number, where):
    """End all processes with 128 + the signal's number, as a shell expects, once rank 0 has saved."""
    distributed.barrier()
    if distributed.is_main():
        print(f"stopped by {signal.Signals(number).name} {where}, saved; go on with --resume auto", flush=True)
    sys.exit(128 + number)


def left_to_the_trainer():
    """A worker_init_fn for loading processes. A signal that a job's processes all get is the training process's to
    answer, and it needs its batches for that; only once it ends does SIGTERM end them."""
    ending = multiprocessing.RawValue("b", 0)
    multiprocessing.util.Finalize(None, setattr, (ending, "value", 1), exitpriority=0)  # before it terminates its children
    return functools.partial(_leave_to_the_trainer, ending)


def _leave_to_the_trainer(ending, worker):
    def terminate(number, frame):
        if ending.value:
            os._exit(0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
