"""End of a script: one line on stderr and an exit code instead of a traceback. Imports no PyTorch.

Exit codes: 2 for bad input, before anything is built; 1 for a run that cannot continue; 128 + N for signal N; 0 also if
a run has nothing left to do. A traceback is a bug of ours.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from moco.errors import Finished, PeerError, RunError, UsageError, one_line, read_last
from moco.processes import signals
from moco.processes.environment import is_local_main, is_main, under_torchrun

LOADERS_END_SECONDS = 5  # for all loading processes together, when a script ends
PEER = "gloo.*(closed by peer|reset by peer|Broken pipe|Connection refused|[Tt]imed out|Timeout waiting)"
ASIDE = "^.*Last error: | (Search for `|CUDA kernel errors might).*"  # what NCCL and CUDA say around the cause
# What errors of PyTorch and the system mean, by name or text, since PyTorch has few types. The first that fits counts.
TRANSLATIONS = {
    "connectFullMesh|Unable to find address|Cannot resolve": "the processes cannot connect to each other over gloo"
    " ({reason}): set GLOO_SOCKET_IFNAME, and for NCCL NCCL_SOCKET_IFNAME, to the network interface between the nodes",
    PEER: "another process of this run has ended or does not answer ({reason}); see the first message of the others,"
    " then {again}",
    "Too many open files|ancdata": "too many open files ({reason}); raise the limit with ulimit -n, then {again}",
    "DataLoader timed out": "{reason}: the data's file system does not answer, or the loading processes were stopped;"
    " {again}",
    "DataLoader worker|unable to .*shared memory|^(Connection|EOF)": "a data loading process has ended ({reason}); use"
    " a smaller -j or batch if memory ran out, -j 0 or docker's --shm-size if /dev/shm is full, another file if it"
    " crashes there again; then {again}",
    "/dev/shm/nccl": "NCCL has too little shared memory ({reason}); raise docker's --shm-size, then {again}",
    "out of resource": "a compiled kernel is too large for this GPU ({reason}); leave out --compile, then {again}",
    "out of memory|t allocate memory|ALLOC_FAILED|^(OutOf)?Memory": "out of memory ({reason}); use a smaller"
    " batch or 16-bit precision, then {again}",
    "NCCL|^Dist": "NCCL, gloo or their store failed ({reason}); see the first message of the others, then {again}",
    "(CUDA|cuDNN) error|^Accelerator": "the GPU failed ({reason}); {again}, and on another GPU if it fails again",
    "No space left|quota exceeded": "{reason}; free some space, then {again}",
    "^OSError": "{reason}; see that it is there and can be used, then {again}",
}


def cli_main(main: Callable[[], int | None], again: str = "continue with --resume auto") -> None:
    """Call main(), and turn its code, or what it raises, into one line on stderr and an exit code.

    again: what the user does after an interruption that is not the input's fault.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the next file would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(OSError, AttributeError):  # it writes what the stream still holds
            getattr(sys, name).reconfigure(errors="backslashreplace")
    signals.end_with_parent()
    if under_torchrun():  # which may be killed; a rank that outlives it would write beside the resumed run
        signals.signal_when_parent_ends(signal.SIGTERM)
    if os.getpid() == 1:  # in a container, where the kernel ignores signals without a handler
        signals.handle_stop_signals(lambda signum, frame: sys.exit(128 + signum), signals.END_SIGNALS)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts changed it while they imported
    try:
        code = main() or 0
        print(end="", flush=True)
    except BaseException as error:
        signals.kill_loading()
        code = _exit_code(error, again)
        if code is None:
            raise
    loading = signals.kill_loading()
    for process in loading:
        process.join(LOADERS_END_SECONDS / len(loading))
    if any(process.is_alive() for process in loading):  # its file system does not answer: Python would wait for it
        exit_now(code if isinstance(code, int) else 1)
    if code:
        sys.exit(code)


def _exit_code(error: BaseException, again: str) -> int | str | None:
    """The exit code for what ended a script, once its one line is printed; None if it may be a bug of ours."""
    _print(f"{error}\n" if isinstance(error, Finished) and is_main() else "", sys.stdout)
    if isinstance(error, BrokenPipeError):  # the reader of stdout has ended, as in `… | head -1`
        _print("", sys.stderr)
        return 128 + signal.SIGPIPE  # silent, like a program that SIGPIPE ends
    if isinstance(error, (Finished, SystemExit)):
        return getattr(error, "code", 0) or 0
    interrupted = isinstance(error, KeyboardInterrupt)
    if isinstance(error, UsageError) or interrupted:  # the same in all processes of a node
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
    cause = re.sub(ASIDE, "", text) or names[0]
    reason = cause if len(cause) < 300 else f"{cause[:150]} … {cause[-150:]}"
    if lost := re.match(r"DataLoader worker \D*(\d+)", cause):  # (pid 7) is killed by signal, or (pid(s) 7, 8) exited
        reason += f", reading {read_last(int(lost[1]))}"
    for pattern, message in TRANSLATIONS.items():
        if any(re.search(pattern, each) for each in (text, *names)):
            return (PeerError if pattern == PEER else RunError)(message.format(reason=reason, again=again))
    return None


def _print_error(message: str) -> None:
    _print(one_line(f"{os.path.basename(sys.argv[0])}: error: {message}"), sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    """Write the text, and what the stream still holds. Without a reader, or on a full disk, both go nowhere."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:  # Python would try again when it exits, and complain
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_now(code: int) -> NoReturn:
    """Exit without waiting for anything, the loading processes neither: they may never end."""
    signals.kill_loading()
    _print("", sys.stdout)
    _print("", sys.stderr)
    os._exit(code)
