import errno
import os
import re
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import TORCHRUN_RANK

from moco.errors import Finished, PeerError, RunError, UsageError, note_reading
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


NCCL = (
    "NCCL error in: /NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version"
    " 2.27.3\nncclSystemError: System call or external library call failed or device error. \nLast error:\n"
)
DUPLICATE = dist.DistBackendError(f"{NCCL}Duplicate GPU detected : rank 3 and rank 2 both on CUDA device 1a000")
SEGMENT = (
    "Error while creating shared memory segment /dev/shm/nccl-Xy (size 9637888), error: No space left on device (28)"
)
PEER, WORKER, MEMORY = "another process of this run has ended", "a data loading process has ended", "out of memory"
IFNAME = "cannot connect to each other over gloo .*GLOO_SOCKET_IFNAME"


@pytest.mark.parametrize(
    "error, kind, wanted",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:30"), PeerError, PEER),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms"), PeerError, PEER),
        (RuntimeError("Gloo connectFullMesh failed with [gloo/pair.cc:152] timed out connecting"), RunError, IFNAME),
        (RuntimeError("Cannot resolve 127.0.0.1 to a (local) address"), RunError, IFNAME),
        (RuntimeError("[gloo/device.cc:84] ifa. Unable to find address for: eth9"), RunError, "eth9.*IFNAME"),
        (DUPLICATE, RunError, "NCCL, .* failed .Duplicate GPU detected.*rank 3 and rank 2.*; see the first message"),
        (dist.DistStoreError("wait timeout"), RunError, "their store failed .wait timeout"),
        (OSError(errno.EMFILE, "Too many open files"), RunError, "too many open files .*raise .* ulimit -n, then"),
        (RuntimeError("received 0 items of ancdata"), RunError, "too many open files"),
        (OSError(errno.ENOSPC, "No space left"), RunError, "No space left.*free some space, then continue"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), RunError, "a.png.; see that it is there"),
        (ConnectionResetError("reset"), RunError, WORKER),
        (EOFError(), RunError, WORKER + " .EOFError"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), RunError, WORKER + ".*smaller -j"),
        (RuntimeError("unable to write to file </torch_1>: No space left; shared memory"), RunError, "--shm-size"),
        (MemoryError(), RunError, MEMORY + " .MemoryError.*smaller batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), RunError, MEMORY),
    ],
)
def test_errors_of_pytorch_and_the_system_are_translated(error, kind, wanted):
    translated = exits.translate_error(error)
    assert type(translated) is kind
    with pytest.raises(kind, match=wanted):
        raise translated


def test_the_file_that_a_lost_loading_process_read_is_named():
    if not (pid := os.fork()):
        note_reading("of another image")
        note_reading("a b \udcff.png")
        os._exit(0)
    os.waitpid(pid, 0)
    for lost in f"(pid {pid}) is killed by signal: Segmentation fault.", f"(pid(s) {pid}, 7) exited unexpectedly":
        assert "reading a b \udcff.png);" in str(exits.translate_error(RuntimeError(f"DataLoader worker {lost}")))
    assert "reading an unknown file" in str(exits.translate_error(RuntimeError(f"DataLoader worker (pid {pid + 256})")))


CUDA_ASIDE = (
    "\nSearch for `cudaErrorX' in https://docs.nvidia.com for more information.\nCUDA kernel errors might be"
    " asynchronously reported at some other API call, so the stacktrace below might be incorrect.\nFor debugging"
    " consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
GPU, AGAIN = "the GPU failed", "continue with --resume auto"


@pytest.mark.parametrize(
    "text, wanted",
    [
        *[
            (f"CUDA error: {cause}{CUDA_ASIDE}", rf"{GPU} \(CUDA error: {cause}\); {AGAIN}, and on another GPU if")
            for cause in (
                "uncorrectable ECC error encountered", "device-side assert triggered", "unspecified launch failure",
                "an illegal memory access was encountered", "CUDA-capable device\\(s\\) is/are busy or unavailable",
                "the launch timed out and was terminated", "GPU is lost", "no CUDA-capable device is detected",
            )
        ],
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", f"{GPU} .cuDNN error: CUDNN_STATUS_EXECUTION_FAILED.; {AGAIN}"),
        (f"CUDA error: out of memory{CUDA_ASIDE}", f"^{MEMORY} .CUDA error: out of memory.; use .*, then {AGAIN}$"),
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB", f"^{MEMORY}.*16-bit"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", f"^{MEMORY} .*smaller batch"),
        (f"{NCCL}Cuda failure 2 'out of memory'", f"^{MEMORY} .Cuda failure 2 'out of memory'.; use a smaller"),
        (f"{NCCL}{SEGMENT}", "^NCCL has too little shared memory .Error while.*--shm-size, then continue with"),
        (f"{NCCL}socketProgress: Connection closed by remote peer", "NCCL, .* failed .socketProgress: .*; see"),
        ("out of resource: shared memory, Required: 180224, Hardware limit: 101376.", "too large for .*--compile"),
    ],
)  # fmt: skip
def test_faults_of_gpus_are_named_and_nothing_else_is_advised(text, wanted):
    error = getattr(torch, "AcceleratorError", RuntimeError) if text.startswith("CUDA error") else RuntimeError
    translated = str(exits.translate_error(error(text.replace("\\", "")), AGAIN))
    assert re.search(wanted, translated)
    assert not re.search("--(batch|moco|precision)|might be asynchronously|TORCH_USE_CUDA_DSA|\n", translated)
