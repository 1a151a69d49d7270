import errno
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import TORCHRUN_RANK

from moco.errors import PeerError, RunError, UsageError
from moco.processes import exits


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """cli_main names the script, and ignores SIGCHLD after an error of PyTorch."""
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)


def ended(error):
    """The exit code of a script whose main raises this."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        exits.cli_main(main)
    return stop.value.code


@pytest.mark.parametrize(
    "error, code",
    [
        (UsageError("--lr 0:\n  too small"), 2),
        (RunError("--lr 0:\n  too small"), 1),
        (torch.OutOfMemoryError("--lr 0: too small"), 1),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code):
    assert ended(error) == code
    message = capsys.readouterr().err
    assert message.startswith("train.py: error: ") and "--lr 0: too small" in message and message.count("\n") == 1


def test_bad_input_is_reported_once_per_node(capsys, monkeypatch):
    for name, value in {**TORCHRUN_RANK, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ended(UsageError("no")) == 2 and capsys.readouterr().err == ""
    assert ended(RunError("no")) == 1 and "no" in capsys.readouterr().err  # it may be of this rank alone


def test_an_interrupt_ends_with_130_and_without_a_word(capsys):
    assert ended(KeyboardInterrupt()) == 130 and capsys.readouterr().err == ""


def test_a_workers_traceback_is_cut_to_its_message(capsys):
    assert ended(RunError("Caught RunError in worker 0.\nTraceback …\nmoco.errors.RunError: a.png is gone")) == 1
    assert capsys.readouterr().err == "train.py: error: a.png is gone\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), KeyError("a bug"), OSError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error), match="a bug"):
        exits.cli_main(main)


@pytest.mark.parametrize(
    "error, kind, wanted",
    [
        (RuntimeError("[gloo/transport] Connection closed by peer"), PeerError, "another process .* has ended"),
        (
            dist.DistBackendError(
                "NCCL error in: NCCLUtils.hpp:268, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version"
                " 2.21.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
                "Duplicate GPU detected : rank 3 and rank 2 both on CUDA device e2000"
            ),
            RunError,
            "^rank 3 and rank 2 use the same GPU; .*--gpus-per-task=1",
        ),
        (dist.DistBackendError("NCCL watchdog timeout"), RunError, "can no longer reach each other .NCCL watchdog"),
        (OSError(errno.ENOSPC, "No space left on device"), RunError, "/dev/shm or on the disk"),
        (ConnectionResetError("reset"), RunError, "loading process was killed"),
        (EOFError(), RunError, "loading process was killed"),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."),
            RunError,
            "loading process was killed",
        ),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."), RunError, "--shm-size"),
        (RuntimeError("unable to write to file </torch_1>: No space left; shared memory"), RunError, "--shm-size"),
        (MemoryError(), RunError, "out of memory .MemoryError.*--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), RunError, "out of memory"),
    ],
)
def test_errors_of_pytorch_and_the_system_are_translated(error, kind, wanted):
    translated = exits.translate_error(error)
    assert type(translated) is kind
    with pytest.raises(kind, match=wanted):
        raise translated


def test_an_error_that_may_be_a_bug_is_not_translated():
    assert exits.translate_error(RuntimeError("size mismatch")) is None
    assert exits.translate_error(OSError(errno.EACCES, "denied")) is None
