"""End of a script: one line on stderr and an exit code instead of a traceback. Imports no PyTorch.

Exit codes: 2 for bad input, before anything is built; 1 for a run that cannot continue; 128 + N for signal N; 0 also if
a run has nothing left to do. A traceback is a bug of ours.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from moco.errors import Finished, PeerError, RunError, UsageError, one_line
from moco.processes.environment import is_local_main, is_main
from moco.processes.signals import end_with_parent

LOADERS_END_SECONDS = 5  # for the loading processes, when a script ends
# What errors of PyTorch and the system mean, by name or text, since PyTorch has few types. The first that fits counts.
TRANSLATIONS = (
    (
        "connectFullMesh failed|Unable to find address for",
        RunError,
        "the processes cannot connect to each other over gloo ({reason}): set GLOO_SOCKET_IFNAME, and for NCCL"
        " NCCL_SOCKET_IFNAME, on every node to the network interface that leads to the others (ip -brief address)",
    ),
    (
        "gloo.*(closed by peer|reset by peer|Broken pipe|Connection refused|[Tt]imed out|Timeout waiting)",
        PeerError,
        "another process of this run has ended or does not answer ({reason}); see the first message of the others, then"
        " {again}",
    ),
    (
        "NCCL|^Dist",
        RunError,
        "the processes can no longer reach each other ({reason}); see the first message of the others, then {again}",
    ),
    (
        "DataLoader worker|unable to .*shared memory|^(Connection|EOF)",
        RunError,
        "a data loading process has ended ({reason}); if memory ran out, use a smaller -j or --batch-size; if /dev/shm"
        " is full, make it larger (docker: --shm-size) or use -j 0; then {again}",
    ),
    (
        "can't allocate memory|^(OutOf)?Memory",
        RunError,
        "out of memory ({reason}); use a smaller --batch-size or --moco-k, or --precision bf16",
    ),
    ("^OSError", RunError, "{reason}; see that the disk is there and not full, then {again}"),
)


def cli_main(main: Callable[[], int | None], again: str = "continue with --resume auto") -> None:
    """Call main(), and turn its code, or what it raises, into one line on stderr and an exit code.

    again: what the user does after an interruption that is not the input's fault.
    """
    _repair_streams()
    end_with_parent()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts changed it while they imported
    try:
        code = main() or 0
        sys.stdout.flush()
    except BaseException as error:
        _kill_loading()
        code = _exit_code(error, again)
        if code is None:
            raise
    _end_loading(code)
    if code:
        sys.exit(code)


def _exit_code(error: BaseException, again: str) -> int | str | None:
    """The exit code for what ended a script, once its one line is printed; None if it may be a bug of ours."""
    if isinstance(error, BrokenPipeError):  # the reader of stdout has ended, as in `… | head -1`
        _discard(sys.stdout)
        _discard(sys.stderr)
        return 128 + signal.SIGPIPE  # silent, like a program that SIGPIPE ends
    if isinstance(error, Finished) and is_main():
        print(error)
    try:
        sys.stdout.flush()
    except OSError:  # no reader, or a full disk: Python would try again when it exits, and complain
        _discard(sys.stdout)
    if isinstance(error, SystemExit):
        return error.code or 0
    if isinstance(error, Finished):
        return 0
    if isinstance(error, (UsageError, KeyboardInterrupt)):  # the same in all processes of a node
        interrupted = isinstance(error, KeyboardInterrupt)
        if is_local_main():
            _print_error(f"interrupted; {again}" if interrupted else str(error))
        return 128 + signal.SIGINT if interrupted else 2
    known = error if isinstance(error, RunError) else translate_error(error, again)
    if known is None:
        return None
    # An error from a loading process arrives with that process's traceback before the message.
    _print_error(str(known).split(f"{type(known).__name__}: ")[-1])
    return 1


def translate_error(error: BaseException, again: str = "continue with --resume auto") -> RunError | None:
    """The RunError for an error raised by PyTorch or the system; None if it may be a bug of ours."""
    names = [base.__name__ for base in type(error).__mro__]
    text = " ".join(str(error).split())
    reason = (text if len(text) < 300 else f"{text[:150]} … {text[-150:]}") or names[0]
    for pattern, kind, message in TRANSLATIONS:
        if any(re.search(pattern, each) for each in (text, *names)):
            return kind(message.format(reason=reason, again=again))
    return None


def _print_error(message: str) -> None:
    try:
        sys.stderr.write(one_line(f"{os.path.basename(sys.argv[0])}: error: {message}"))
        sys.stderr.flush()
    except OSError:  # its reader has ended
        _discard(sys.stderr)


def _repair_streams() -> None:
    """Discard output to a closed stdout or stderr, whose place the next file would take; escape odd characters."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
        elif hasattr(getattr(sys, name), "reconfigure"):
            with contextlib.suppress(OSError):  # it writes what the stream still holds
                getattr(sys, name).reconfigure(errors="backslashreplace")


def _discard(stream) -> None:
    """Let what the stream still holds go nowhere, so that Python does not complain about it when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end_loading(code: int | str) -> None:
    """End the loading processes, also stopped ones, for which Python would wait without a limit.

    If one does not end, because it waits for a file system that does not answer, this process exits nevertheless.
    """
    loading = _kill_loading()
    deadline = time.monotonic() + LOADERS_END_SECONDS
    for process in loading:
        process.join(max(0.0, deadline - time.monotonic()))
    if any(process.is_alive() for process in loading):
        exit_now(code if isinstance(code, int) else 1)


def _kill_loading() -> list[multiprocessing.Process]:
    loading = [process for process in multiprocessing.active_children() if process.daemon]
    if loading and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error for each
    for process in loading:
        process.kill()
    return loading


def exit_now(code: int) -> NoReturn:
    """Exit without waiting for anything, the loading processes neither: they may never end."""
    _kill_loading()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
