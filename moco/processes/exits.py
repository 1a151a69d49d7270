"""How a script ends when it cannot continue: one line on stderr and an exit code. A traceback is a bug of ours.

Exit codes: 2 for bad input, before anything is built; 1 for a run that cannot continue; 128 + N for signal N; 0 also if
a run has nothing left to do.
"""

import contextlib
import errno
import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from moco.errors import Finished, PeerError, RunError, UsageError, first_line, one_line
from moco.processes.environment import (
    COLLECTIVE_SECONDS,
    LOADERS_END_SECONDS,
    end_with_torchrun,
    is_local_main,
    is_main,
)

WORKER_KILLED = (
    "a data loading process was killed from outside; if memory ran out, use a smaller -j or --batch-size;"
    " continue with --resume auto"
)
SHARED_MEMORY_FULL = (
    "the data loading processes have no shared memory left: /dev/shm is full; make it larger (docker: --shm-size),"
    " use a smaller -j, or -j 0; continue with --resume auto"
)
NO_PROCESS_LEFT = (
    "the system allows no further process or thread (ulimit -u, or the limit of the container or job); use a smaller"
    " -j, or -j 0; continue with --resume auto"
)
NO_PROCESS_SIGNS = ("can't start new thread", "Resource temporarily unavailable", "std::system_error")
DATA_GONE = {errno.EIO, errno.ENODEV, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT}
SHARED_MEMORY_SIGNS = ("Bus error", "shared memory", "No space left", "unable to write", "unable to resize")


def cli_main(main: Callable[[], object]) -> None:
    """Call main(), and turn what it raises into one line on stderr and an exit code."""
    _repair_streams()
    end_with_torchrun()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts changed it while they imported
    try:
        main()
        sys.stdout.flush()
        code = 0
    except BaseException as error:
        code = _exit_code(error)
        if code is None:
            _kill_loading()  # Python would wait for a stopped one
            raise
    _end_loading(code)
    if code:
        sys.exit(code)


def _exit_code(error: BaseException) -> int | str | None:
    """The exit code for what ended a script, once its one line is printed. None if it may be a bug of ours."""
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        _flush_stdout()
        return 130 if isinstance(error, KeyboardInterrupt) else error.code or 0
    # PyTorch reports a dead loading process from its SIGCHLD handler, which could fire again during this one.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if isinstance(error, BrokenPipeError) and (broken := [each for each in (sys.stdout, sys.stderr) if _unread(each)]):
        for stream in broken:
            _discard(stream)
        return 128 + signal.SIGPIPE  # silent, like a program that SIGPIPE ends
    if isinstance(error, Finished) and is_main():
        print(error)
    _flush_stdout()
    if isinstance(error, Finished):
        return 0
    if isinstance(error, UsageError):
        if is_local_main():
            _print_error(error)
        return 2
    known = error if isinstance(error, RunError) else translate_error(error)
    if known is None:
        return None
    _print_error(known)
    return 1


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # no reader, or a full disk: Python would try again when it exits, and complain
        _discard(sys.stdout)


def _repair_streams() -> None:
    """Make print() work whatever the streams are: closed ones are discarded, and what they cannot encode is escaped.

    A closed stdout or stderr would otherwise be replaced by the next file that is opened, a checkpoint for example.
    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
        elif hasattr(getattr(sys, name), "reconfigure"):
            with contextlib.suppress(OSError):  # it writes what the stream still holds
                getattr(sys, name).reconfigure(errors="backslashreplace")


def _unread(stream) -> bool:
    """Whether the stream is a pipe whose reader has ended, as in `… | head -1`."""
    try:
        polled = select.poll()
        polled.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in polled.poll(0))
    except (OSError, ValueError):  # no descriptor behind it
        return False


def _discard(stream) -> None:
    """Let what the stream still holds go nowhere, so that Python does not complain about it when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end_loading(code: int | str | None) -> None:
    """End the loading processes of this one, also stopped ones; Python would wait for them without a limit.

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


def translate_error(error: BaseException) -> RunError | None:
    """The RunError for an error raised by PyTorch or the system; None if it may be a bug of ours.

    PyTorch has exception types for few of these, so most are recognised by their text.
    """
    text = str(error)
    if re.search("connectFullMesh failed|Unable to find address for", text):  # of gloo, at the start
        return RunError(
            f"the processes cannot connect to each other over gloo ({first_line(text)[-120:]}): set GLOO_SOCKET_IFNAME"
            " on every node to the network interface that leads to the others (listed by: ip -brief address), or see"
            " that no node's own name stands for 127.0.1.1 in /etc/hosts; NCCL_SOCKET_IFNAME is the same for NCCL"
        )
    if "gloo" in text and re.search("closed by peer|reset by peer|Broken pipe|Connection refused", text):
        return PeerError(
            "another process of this run has ended; see its message; continue from the last checkpoint with --resume"
            " auto"
        )
    if re.search("gloo|NCCL", text) and re.search("[Tt]imed out|Timeout waiting", text):
        return PeerError(
            f"another process of this run has not answered for {COLLECTIVE_SECONDS} s: it has stopped, or its machine"
            " or the network is gone; continue from the last checkpoint with --resume auto"
        )
    if shared := re.search(r"Duplicate GPU detected *: *(rank \d+ and rank \d+)", text):  # of NCCL
        return RunError(
            f"{shared[1]} use the same GPU; give each process its own: with Slurm --gpus-per-task=1, with torchrun no"
            " more processes than GPUs, and no CUDA_VISIBLE_DEVICES that names one GPU for all"
        )
    if isinstance(error, dist.DistError):
        return RunError(
            f"the processes can no longer reach each other ({first_line(text)}); look for the first message of the"
            " others, then continue with --resume auto"
        )
    message = _system_message(error, text) or _loading_message(error, text)
    if message:
        return RunError(message)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return RunError(
            f"out of memory ({first_line(text) or 'MemoryError'}); use a smaller --batch-size or --moco-k,"
            " or --precision bf16"
        )
    return None


def _system_message(error: BaseException, text: str) -> str | None:
    """What a limit of the system that was reached means."""
    number = getattr(error, "errno", None)
    if number == errno.EAGAIN or any(sign in text for sign in NO_PROCESS_SIGNS):
        return NO_PROCESS_LEFT
    if number == errno.ENOSPC:
        return f"no space left ({error}): on /dev/shm or on the disk; free some, or use -j 0 if it is /dev/shm"
    if isinstance(error, OSError) and any(os.strerror(gone) in text for gone in DATA_GONE):
        return f"a file system no longer answers ({first_line(text)}); mount it again, then continue with --resume auto"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"too many open files ({first_line(text)}); raise the limit (ulimit -n), or use a smaller -j"
    return None


def _loading_message(error: BaseException, text: str) -> str | None:
    """What an error of handing over a batch means."""
    if isinstance(error, (ConnectionError, EOFError)):
        return WORKER_KILLED
    if "DataLoader worker" in text or "shared memory" in text:
        if any(sign in text for sign in SHARED_MEMORY_SIGNS):
            return SHARED_MEMORY_FULL
        if "is killed by signal" in text or "exited unexpectedly" in text:
            return WORKER_KILLED
    return None


def _print_error(error: Exception) -> None:
    # An error from a loading process arrives with that process's traceback before the message.
    message = str(error).split(f"{type(error).__name__}: ")[-1]
    try:
        sys.stderr.write(one_line(f"{os.path.basename(sys.argv[0])}: error: {message}"))
        sys.stderr.flush()
    except OSError:  # its reader has ended
        _discard(sys.stderr)
