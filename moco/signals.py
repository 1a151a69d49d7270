"""Stopping a run from outside: the current step is finished and saved first."""

import functools
import multiprocessing.util
import os
import signal
import sys
from collections.abc import Callable

from moco import distributed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1 is what Slurm is asked to send


class StopSignal:
    """Remembers which of STOP_SIGNALS this process received. A second SIGINT ends the process at once.

    If torchrun itself ends, that counts as SIGTERM: ranks that outlive it would write beside the resumed run.
    """

    def __init__(self):
        self._signum, self._torchrun = 0, os.getppid() if distributed.under_torchrun() else None
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._remember)

    @property
    def signum(self) -> int:
        """The signal's number; 0 if there was none."""
        if self._torchrun and os.getppid() != self._torchrun:
            return signal.SIGTERM
        return self._signum

    def _remember(self, signum, frame) -> None:
        self._signum = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def exit_on_signal(signum: int, where: str) -> None:
    """End all processes with exit code 128 + signum, as shells expect, once rank 0 has saved."""
    distributed.barrier()
    if distributed.is_main():
        print(f"stopped by {signal.Signals(signum).name} {where}, saved; continue with --resume auto", flush=True)
    sys.exit(128 + signum)


def leave_signals_to_trainer() -> Callable[[int], None]:
    """A worker_init_fn for data loading processes.

    A signal sent to all processes of a job is for the training process, which still needs its workers to finish the
    step; they end on SIGTERM only once the training process is exiting.
    """
    exiting = multiprocessing.RawValue("b", 0)
    multiprocessing.util.Finalize(
        None, setattr, (exiting, "value", 1), exitpriority=0
    )  # before children are terminated
    return functools.partial(_ignore_signals, exiting)


def _ignore_signals(exiting, worker_id: int) -> None:
    def terminate(signum, frame):
        if exiting.value:
            os._exit(0)

    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
