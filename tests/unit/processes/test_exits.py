import errno
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import TORCHRUN_RANK

from moco.errors import Finished, PeerError, RunError, UsageError
from moco.processes import exits


@pytest.fixture(autouse=True)
def script(monkeypatch, no_launcher):
    """cli_main names the script, and ignores SIGCHLD after an error of PyTorch."""
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)


def ended(error, **settings):
    """The exit code of a script whose main raises this."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        exits.cli_main(main, **settings)
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


def test_the_code_of_main_and_of_an_exit_is_kept(capsys):
    exits.cli_main(lambda: None)
    with pytest.raises(SystemExit) as stop:
        exits.cli_main(lambda: 3)
    assert stop.value.code == 3 and ended(SystemExit(5)) == 5 and capsys.readouterr().err == ""


def test_a_run_that_is_finished_says_so_and_ends_well(capsys):
    def main():
        raise Finished("already finished")

    exits.cli_main(main)
    assert capsys.readouterr() == ("already finished\n", "")


def test_an_interrupt_ends_with_130_and_says_what_to_do(capsys):
    assert ended(KeyboardInterrupt(), again="run the same command again to resume") == 130
    assert capsys.readouterr().err == "train.py: error: interrupted; run the same command again to resume\n"


def test_bad_input_is_reported_once_per_node(capsys, monkeypatch):
    for name, value in {**TORCHRUN_RANK, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert ended(UsageError("no")) == 2 and capsys.readouterr().err == ""
    assert ended(RunError("no")) == 1 and "no" in capsys.readouterr().err  # it may be of this rank alone


def test_a_workers_traceback_is_cut_to_its_message(capsys):
    assert ended(RunError("Caught RunError in worker 0.\nTraceback …\nmoco.errors.RunError: a.png is gone")) == 1
    assert capsys.readouterr().err == "train.py: error: a.png is gone\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    assert exits.translate_error(error) is None
    with pytest.raises(type(error), match="a bug"):
        exits.cli_main(main)


DUPLICATE = dist.DistBackendError(
    "NCCL error in: NCCLUtils.hpp:268, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.21.5\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library, which is a long story in full, as it"
    " goes on.\nLast error:\nDuplicate GPU detected : rank 3 and rank 2 both on CUDA device e2000"
)
PEER, WORKER, MEMORY = "another process of this run has ended", "a data loading process has ended", "out of memory"
IFNAME = "cannot connect to each other over gloo .*GLOO_SOCKET_IFNAME"


@pytest.mark.parametrize(
    "error, kind, wanted",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:30"), PeerError, PEER),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms"), PeerError, PEER),
        (RuntimeError("Gloo connectFullMesh failed with [gloo/pair.cc:152] timed out connecting"), RunError, IFNAME),
        (
            RuntimeError("[gloo/device.cc:84] ifa != nullptr. Unable to find address for: eth9"),
            RunError,
            "eth9.*IFNAME",
        ),
        (DUPLICATE, RunError, "no longer reach each other .*rank 3 and rank 2 both on CUDA device"),
        (dist.DistStoreError("wait timeout"), RunError, "no longer reach each other .wait timeout"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            RunError,
            "No space left on device.*not full, then continue",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), RunError, "No such file.*a.png"),
        (ConnectionResetError("reset"), RunError, WORKER),
        (EOFError(), RunError, WORKER + " .EOFError"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), RunError, WORKER + ".*smaller -j"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."), RunError, WORKER + ".*--shm-size"),
        (RuntimeError("unable to write to file </torch_1>: No space left; shared memory"), RunError, "--shm-size"),
        (MemoryError(), RunError, MEMORY + " .MemoryError.*--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), RunError, MEMORY),
    ],
)
def test_errors_of_pytorch_and_the_system_are_translated(error, kind, wanted):
    translated = exits.translate_error(error)
    assert type(translated) is kind
    with pytest.raises(kind, match=wanted):
        raise translated
