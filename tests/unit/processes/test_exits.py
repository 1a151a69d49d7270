import errno
import sys

import pytest
import torch.distributed as dist
from helpers import TORCHRUN_RANK

from moco.errors import Finished, PeerError, RunError, UsageError
from moco.processes import exits


@pytest.fixture(autouse=True)
def script(monkeypatch, no_launcher):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])


def raising(error):
    def main():
        raise error

    return main


def ended(error):
    """The exit code of a script whose main raises this."""
    with pytest.raises(SystemExit) as stop:
        exits.cli_main(raising(error))
    return stop.value.code


@pytest.mark.parametrize(
    "error, code, wanted",
    [
        (UsageError("--lr 0:\n  too small"), 2, "--lr 0: too small"),
        (RunError("Caught RunError in worker 0.\nTrace…\nmoco.errors.RunError: a.png is gone"), 1, "a.png is gone"),
        (KeyboardInterrupt(), 130, "interrupted; continue with --resume auto"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, wanted):
    assert ended(error) == code
    assert capsys.readouterr().err == f"train.py: error: {wanted}\n"


def test_the_code_of_main_and_of_an_exit_is_kept(capsys):
    exits.cli_main(lambda: None)
    with pytest.raises(SystemExit) as stop:
        exits.cli_main(lambda: 3)
    assert stop.value.code == 3 and ended(SystemExit(5)) == 5 and capsys.readouterr().err == ""


def test_a_run_that_is_finished_says_so_and_ends_well(capsys):
    exits.cli_main(raising(Finished("already finished")))
    assert capsys.readouterr() == ("already finished\n", "")


def test_bad_input_is_reported_once_per_node(capsys, under):
    under({**TORCHRUN_RANK, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert ended(UsageError("no")) == 2 and capsys.readouterr().err == ""
    assert ended(RunError("no")) == 1 and "no" in capsys.readouterr().err  # it may be of this rank alone


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError])
def test_a_bug_keeps_its_traceback(kind):
    assert exits.translate_error(kind("a bug")) is None
    with pytest.raises(kind, match="a bug"):
        exits.cli_main(raising(kind("a bug")))


DUPLICATE = dist.DistBackendError(f"NCCL error in: {200 * 'long '}\nDuplicate GPU detected : rank 3 and rank 2")
PEER, WORKER, MEMORY = "another process of this run has ended", "a data loading process has ended", "out of memory"
IFNAME = "cannot connect to each other over gloo .*GLOO_SOCKET_IFNAME"


@pytest.mark.parametrize(
    "error, kind, wanted",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:30"), PeerError, PEER),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms"), PeerError, PEER),
        (RuntimeError("Gloo connectFullMesh failed with [gloo/pair.cc:152] timed out connecting"), RunError, IFNAME),
        (RuntimeError("[gloo/device.cc:84] ifa. Unable to find address for: eth9"), RunError, "eth9.*IFNAME"),
        (DUPLICATE, RunError, "no longer reach each other .*rank 3 and rank 2"),
        (dist.DistStoreError("wait timeout"), RunError, "no longer reach each other .wait timeout"),
        (OSError(errno.ENOSPC, "No space left"), RunError, "No space left.*not full, then continue"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), RunError, "No such file.*a.png"),
        (ConnectionResetError("reset"), RunError, WORKER),
        (EOFError(), RunError, WORKER + " .EOFError"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), RunError, WORKER + ".*smaller -j"),
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
