"""The data loader's processes: how they are started, and how they end.

They are forked, whatever multiprocessing's default is (Python 3.14's is a fork server): a forked process shares the
list of files and all imported modules with the training process, and starts in milliseconds. Others import PyTorch
anew, which takes seconds and 200 MB each, and hold their own copy of the list. All are forked before the training
process's first batch and live as long as it does. macOS, whose libraries do not survive a fork, spawns them.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.context import BaseContext, ForkContext, ForkProcess

from moco.signals import STOP_SIGNALS

PR_SET_PDEATHSIG = 1  # of prctl


class LoadingProcess(ForkProcess):
    """A process that starts with STOP_SIGNALS blocked, until it has set its own handlers, and dies with its parent.

    A signal that came earlier would raise the training process's StopWaiting in it. The kernel ends it even if it is
    stopped, or if its parent was killed.
    """

    def start(self) -> None:
        self._parent_thread_lasts = threading.current_thread() is threading.main_thread()
        with _blocked():
            super().start()

    def run(self) -> None:
        if self._parent_thread_lasts and sys.platform == "linux":  # its end would count as the parent's
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != multiprocessing.parent_process().pid:  # it ended before that
                os._exit(1)
        super().run()


class LoadingContext(ForkContext):
    """multiprocessing's fork context, for LoadingProcesses."""

    Process = LoadingProcess


def context() -> BaseContext:
    return multiprocessing.get_context("spawn") if sys.platform == "darwin" else LoadingContext()


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Put off STOP_SIGNALS in this thread; a process that it starts meanwhile inherits that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
