"""Processes that this program starts itself, one per GPU: they start together, hear of signals, and end together.

Importing PyTorch takes each of them seconds of a core. So one process, the starter, imports it and forks the others. It
does nothing else, and so has neither used CUDA nor computed in threads, neither of which survives a fork; this program
may have. On macOS, whose libraries do not survive a fork at all, the others import PyTorch themselves.
"""

import atexit
import contextlib
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch.multiprocessing as mp

from moco import environment
from moco.errors import RunError, cli_main, exit_now
from moco.limits import GRACE_SECONDS
from moco.signals import STOP_SIGNALS, blocked, handle_stop_signals, signal_when_parent_ends

METHOD = "spawn" if sys.platform == "darwin" else "fork"


def run(function: Callable[[int], object], count: int) -> None:
    """Call function(i) in process i of `count`, and wait for all; signals are forwarded to them.

    function: is pickled. If one process fails, the others are terminated, and this one exits with its code. Raises
    RunError if the starter was killed.
    """
    context = mp.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    starter = context.Process(target=_starter, args=(reader, count))
    with blocked():  # inherited: a signal to all processes must not end multiprocessing's resource tracker
        resource_tracker.ensure_running()  # it unblocks some of them
    with blocked():  # inherited: one that comes while the starter imports is kept until it can be forwarded
        starter.start()
        handle_stop_signals(lambda signum, frame: _forward(signum, [starter]))
    reader.close()
    with contextlib.suppress(BrokenPipeError), writer:  # then it has ended, with an exit code
        # Pickled here: as an argument, tensors in it would travel through /dev/shm, which containers keep small.
        writer.send_bytes(pickle.dumps(function))
    starter.join()
    if starter.exitcode < 0:
        raise _killed("the process that starts the ranks", starter.exitcode)
    if starter.exitcode:
        sys.exit(starter.exitcode)


def _starter(reader: Connection, count: int) -> None:
    """Start the processes and wait for them. Exit handlers are theirs: here they would run once more."""
    os.setpgrp()  # a terminal's signals arrive once, through the program
    try:
        cli_main(lambda: _start(reader, count))
        code = 0
    except SystemExit as stop:
        code = stop.code
    exit_now(code)


def _start(reader: Connection, count: int) -> None:
    received, processes = [], []

    def forward(signum, frame):
        received.append(signum)
        _forward(signum, processes)

    handle_stop_signals(forward)
    signal_when_parent_ends(signal.SIGTERM)
    try:
        function = pickle.loads(reader.recv_bytes())
    except EOFError:  # the program was killed
        return
    with blocked():  # until each has its own handlers
        context = mp.start_processes(_started, (function,), nprocs=count, join=False, start_method=METHOD)
        processes += context.processes
    del function  # it may hold a checkpoint, which each of them drops in time
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the program blocked them
    try:
        while not context.join(grace_period=GRACE_SECONDS):
            pass
    except mp.ProcessExitedException as error:
        if received:
            sys.exit(128 + received[-1])
        if error.exit_code < 0:
            raise _killed(f"process {error.error_index}", error.exit_code) from error
        sys.exit(error.exit_code)


def _started(local_rank: int, function: Callable[[int], object]) -> None:
    handle_stop_signals(signal.SIG_DFL)  # not the starter's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    environment.set_spawned_rank(local_rank)  # one process per node prints errors
    try:
        cli_main(lambda: function(local_rank))
    except Exception:  # printed here: the starter learns of one process only, which may not be the first to fail
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends forked processes without this


def _forward(signum: int, processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signum)


def _killed(what: str, exit_code: int) -> RunError:
    name = signal.Signals(-exit_code).name
    return RunError(f"{what} was killed by {name}; if memory ran out, use a smaller --batch-size or fewer -j")
