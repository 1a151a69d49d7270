"""How a script ends when it cannot continue: one line on stderr and an exit code. A traceback is a bug of ours.

Exit codes: 2 for bad input, before anything is built; 1 for a run that cannot continue; 128 + N for signal N.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

WORKER_KILLED = (
    "a data loading process was killed from outside; if memory ran out, use a smaller -j or --batch-size;"
    " continue with --resume auto"
)
SHARED_MEMORY_FULL = (
    "the data loading processes have no shared memory left: /dev/shm is full; make it larger (docker: --shm-size),"
    " use a smaller -j, or -j 0; continue with --resume auto"
)
SHARED_MEMORY_SIGNS = ("Bus error", "shared memory", "No space left", "unable to write", "unable to resize")


class UsageError(Exception):
    """The user's input cannot work. The message names the value, why it is wrong, and one that would work."""


class RunError(Exception):
    """The run cannot continue, and the input is not to blame. The message says what happened and what to do."""


class PeerError(RunError):
    """Another process of this run has ended; that process reports the cause."""


def cli_main(main: Callable[[], object]) -> None:
    """Call main(), and turn what it raises into one line on stderr and an exit code."""
    try:
        main()
    except UsageError as error:
        if is_local_main():
            _print_error(error)
        sys.exit(2)
    except RunError as error:
        _print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        # PyTorch reports a dead loading process from its SIGCHLD handler, which could fire again during this one.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        translated = translate_error(error)
        if translated is None:
            raise
        _print_error(translated)
        sys.exit(1)


def translate_error(error: BaseException) -> RunError | None:
    """The RunError for an error raised by PyTorch or the system; None if it may be a bug of ours.

    PyTorch has exception types for few of these, so most are recognised by their text.
    """
    text = str(error)
    if "gloo" in text and re.search("closed by peer|reset by peer|Broken pipe|Connection refused", text):
        return PeerError(
            "another process of this run has ended; see its message; continue from the last checkpoint with --resume"
            " auto"
        )
    if isinstance(error, dist.DistError):
        return RunError(
            f"the processes can no longer reach each other ({first_line(text)}); look for the first message of the"
            " others, then continue with --resume auto"
        )
    if getattr(error, "errno", None) == errno.ENOSPC:
        return RunError(
            f"no space left ({error}): on /dev/shm or on the disk; free some, or use -j 0 if it is /dev/shm"
        )
    if isinstance(error, (ConnectionError, EOFError)):  # while a worker was handing over a batch
        return RunError(WORKER_KILLED)
    if "DataLoader worker" in text or "shared memory" in text:
        if any(sign in text for sign in SHARED_MEMORY_SIGNS):
            return RunError(SHARED_MEMORY_FULL)
        if "is killed by signal" in text or "exited unexpectedly" in text:
            return RunError(WORKER_KILLED)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return RunError(
            f"out of memory ({first_line(text) or 'MemoryError'}); use a smaller --batch-size or --moco-k,"
            " or --precision bf16"
        )
    return None


def first_line(text: object) -> str:
    return next(iter(str(text).strip().splitlines()), "")


def one_line(message: str) -> str:
    return " ".join(message.split()) + "\n"


def _print_error(error: Exception) -> None:
    # An error from a loading process arrives with that process's traceback before the message.
    message = str(error).split(f"{type(error).__name__}: ")[-1]
    sys.stderr.write(one_line(f"{os.path.basename(sys.argv[0])}: error: {message}"))


def is_local_main() -> bool:
    """Whether this is the first process of its node. All of them find the same bad input; one reports it."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
