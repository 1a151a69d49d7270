"""The data loader's processes: how they are started, and how they end.

They are forked, whatever multiprocessing's default is (Python 3.14's is a fork server): a forked process shares the
list of files and all imported modules with the training process, and starts in milliseconds. Others import PyTorch
anew, which takes seconds and 200 MB each, and hold their own copy of the list. All are forked before the training
process's first batch and live as long as it does. macOS, whose libraries do not survive a fork, spawns them.
"""

import multiprocessing
import signal
import sys
import threading
from multiprocessing.context import BaseContext, ForkContext, ForkProcess

from moco.signals import blocked, signal_when_parent_ends


class LoadingProcess(ForkProcess):
    """A process that starts with STOP_SIGNALS blocked, until it has set its own handlers, and dies with its parent.

    A signal that came earlier would raise the training process's StopWaiting in it. The kernel ends it even if it is
    stopped, or if its parent was killed.
    """

    def start(self) -> None:
        self._parent_thread_lasts = threading.current_thread() is threading.main_thread()
        with blocked():
            super().start()

    def run(self) -> None:
        if self._parent_thread_lasts:  # its end would count as the parent's
            signal_when_parent_ends(signal.SIGKILL)
        super().run()


class LoadingContext(ForkContext):
    """multiprocessing's fork context, for LoadingProcesses."""

    Process = LoadingProcess


def context() -> BaseContext:
    return multiprocessing.get_context("spawn") if sys.platform == "darwin" else LoadingContext()
