"""Signals that stop a run: finish the current step, save, leave. Imports no PyTorch."""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator

# SIGUSR1 is what Slurm is asked to send; SIGHUP comes from a terminal that is closed, unless nohup has it ignored.
# Native Windows, where preprocess/ works, has only the first two.
STOP_SIGNALS = tuple(each for each in signal.Signals if each.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"))
END_SIGNALS = tuple(signum for signum in STOP_SIGNALS if signum.name in ("SIGTERM", "SIGHUP"))  # SIGINT has a handler
PR_SET_PDEATHSIG = 1  # of prctl


def handle_stop_signals(handler: Callable | int, signals: Collection[int] = STOP_SIGNALS) -> None:
    """Set the handler of these signals; an ignored SIGHUP stays ignored, as nohup promises."""
    for signum in signals:
        if signum != getattr(signal, "SIGHUP", None) or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Block STOP_SIGNALS in this thread and in processes started inside the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Get SIGTERM once the program that started this process has ended, even if it was killed."""

    def wait(program: multiprocessing.Process) -> None:
        program.join()
        os.kill(os.getpid(), signal.SIGTERM)

    if program := multiprocessing.parent_process():  # not the one that forked this: that is the fork server
        threading.Thread(target=wait, args=(program,), daemon=True).start()


def signal_when_parent_ends(signum: int) -> None:
    """On Linux, get this signal when the thread that forked this process ends, even if its process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
        parent = multiprocessing.parent_process()
        if parent and not parent.is_alive():  # it ended before that
            os.kill(os.getpid(), signum)


class StopWaiting(BaseException):
    """A signal came while the process waited for data, which may never come."""


class StopSignal:
    """Remembers which of STOP_SIGNALS this process received. A second SIGINT ends the process at once.

    PyTorch raises an error wherever the process is when one of its loading processes ends; that is put off until the
    next `interruptible` block, where the run can be saved.
    """

    def __init__(self):
        self.signum = 0  # the signal's number; 0 if there was none
        self._waiting = False
        self._report_children: Callable | None = None  # PyTorch's handler of SIGCHLD
        handle_stop_signals(self._remember)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """While this block waits for data: a signal raises StopWaiting, also one that came before."""
        self._waiting = True
        try:
            if self.signum:
                raise StopWaiting
            if self._report_children:
                signal.signal(signal.SIGCHLD, self._report_children)
                self._report_children(signal.SIGCHLD, None)  # raises if one has ended since the last block
            yield
        finally:
            self._waiting = False
            if callable(handler := signal.getsignal(signal.SIGCHLD)):
                self._report_children = handler
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    @contextlib.contextmanager
    def no_broken_pipe(self) -> Iterator[None]:
        """If the reader of stdout has ended, that counts as SIGPIPE: the step is finished and saved."""
        try:
            yield
        except BrokenPipeError:
            self.signum = signal.SIGPIPE

    def _remember(self, signum, frame) -> None:
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._waiting:
            self._waiting = False
            raise StopWaiting


def leave_signals_to_trainer() -> None:
    """Ignore STOP_SIGNALS in a data loading process, which the training process needs to finish its step."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # they are blocked while a process starts
    sys.excepthook = _without_lost_connections


def _without_lost_connections(kind, error, trace) -> None:
    """A signal may stop the training process while it takes over a batch: the other end of that is no error."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


@atexit.register
def kill_loading() -> list[multiprocessing.Process]:
    """Kill the data loading processes, which ignore SIGTERM or are stopped. Returns them."""
    loading = [process for process in multiprocessing.active_children() if process.daemon]
    if loading:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error for each
    for process in loading:
        process.kill()
    return loading
