"""What is refused or said because of the GPUs of a machine, with GPUs that are simulated."""

import warnings

import pytest
import torch
from helpers import PRETRAIN, PROBE, SMALL, SMALL_PROBE, refused

from moco import memory
from moco.errors import RunError, UsageError
from moco.processes import launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU"
    " driver by downloading and installing a new version (Triggered internally at CUDAFunctions.cpp:119.)"
)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A machine with two GPUs, of which the kernel's driver tells; CUDA_VISIBLE_DEVICES is not set."""
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "nvidia" / "gpus" / name).mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\nGCC version: 9.3.0"
    (tmp_path / "nvidia" / "version").write_text(text)
    monkeypatch.setattr(launch, "PROC", tmp_path / "nvidia")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia"


def unusable(message=TOO_OLD):
    if message:
        warnings.warn(message, stacklevel=1)
    return False


@pytest.fixture
def old_driver(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", unusable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return driver


def test_gpus_that_pytorch_cannot_use_are_refused_by_name(old_driver, data):
    for script, settings in ((PRETRAIN, SMALL), (PROBE, SMALL_PROBE)):
        for launching in ((), ("--multiprocessing-distributed",), ("--gpu", 0)):
            message = refused(script, *settings, *launching, data)
            assert "8 GPUs" in message and "driver on your system is too old (found version 11040);" in message
            assert "470.57.02" in message and "CUDA 13.0" in message and "Triggered" not in message
    with pytest.raises(UsageError, match="8 GPUs"):  # as the evaluation is launched
        launch.launch(print, (), gpu=None)


def test_a_driver_that_says_nothing_is_refused_too(old_driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: unusable(""))
    (old_driver / "version").unlink()
    with pytest.raises(UsageError, match="cannot use: the driver's version is unknown; update the driver"):
        launch.usable_gpus()


def test_gpus_that_work_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.usable_gpus() == 8


@pytest.mark.parametrize(
    "visible, cuda, reason",
    [
        ("", "13.0", "CUDA_VISIBLE_DEVICES= hides them"),
        ("7", "13.0", "CUDA_VISIBLE_DEVICES=7 hides them"),
        (None, None, "is built without CUDA"),
        (None, "13.0", "PyTorch sees none of them (the driver is 470.57.02); does nvidia-smi list them?"),
    ],
)
def test_a_run_on_the_cpu_beside_gpus_says_so(driver, monkeypatch, capfd, visible, cuda, reason):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch.launch(lambda ctx: print("worker"), ())
    out, err = capfd.readouterr()
    assert out == "worker\n" and err.count("\n") == 1
    assert err.startswith("running on the CPU, although this machine has 2 NVIDIA GPUs: ") and reason in err


def test_an_apple_gpu_is_not_used_and_one_line_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launch, "PROC", tmp_path)
    monkeypatch.setattr(launch.Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    ctx = launch.launch(lambda ctx: ctx, ())
    assert ctx.device == CPU and "an Apple GPU, which is not supported" in capfd.readouterr().err


def test_without_a_gpu_nothing_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launch, "PROC", tmp_path)
    monkeypatch.setattr(launch.Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch.launch(lambda ctx: ctx, ())
    assert capfd.readouterr() == ("", "")


def capability(monkeypatch, *versions):
    """GPUs 0, 1, … of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: versions[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    return [torch.device("cuda", index) for index in range(len(versions))]


def test_bf16_is_refused_where_a_gpu_only_emulates_it(monkeypatch):
    devices = capability(monkeypatch, (8, 0), (7, 5))
    with pytest.raises(UsageError, match=r"--precision bf16: Card 1 \(compute capability 7.5\)"):
        launch.check_options(devices, "bf16")
    launch.check_options(devices, "fp16")
    launch.check_options(devices[:1], "bf16")
    launch.check_options([CPU], "bf16")


def test_compiling_on_a_gpu_needs_a_c_compiler_and_headers(monkeypatch, tmp_path):
    devices = capability(monkeypatch, (9, 0))
    which, found = launch.shutil.which, launch.importlib.util.find_spec
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name == "triton" or found(name))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(launch.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    monkeypatch.setattr(launch.shutil, "which", lambda name: name if name == "clang" else None)
    launch.check_options(devices, "fp32", compiled=True)
    monkeypatch.setattr(launch.shutil, "which", lambda name: name if name == "g++" else None)
    with pytest.raises(UsageError, match="--compile: on a GPU it needs a C compiler, and there is no gcc or clang"):
        launch.check_options(devices, "fp32", compiled=True)
    launch.check_options(devices, "fp32")
    monkeypatch.setenv("CC", "mycc")
    with pytest.raises(UsageError, match="CC=mycc is none"):
        launch.check_options(devices, "fp32", compiled=True)
    monkeypatch.setattr(launch.shutil, "which", which)
    monkeypatch.setenv("CC", "sh")
    (tmp_path / "Python.h").unlink()
    with pytest.raises(UsageError, match="--compile: on a GPU it needs Python's headers"):
        launch.check_options(devices, "fp32", compiled=True)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--compile: on a GPU it needs Triton"):
        launch.check_options(devices, "fp32", compiled=True)
    with pytest.raises(UsageError, match="--compile: Card 0 .compute capability 6.1. is too old"):
        launch.check_options(capability(monkeypatch, (6, 1)), "fp32", compiled=True)


def test_compiling_on_a_cpu_needs_a_c_plus_plus_compiler(monkeypatch, data):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "--compile: on a CPU it needs a C++ compiler" in refused(PRETRAIN, *SMALL, "--compile", data)


def test_memory_that_others_use_on_the_ranks_own_gpu_counts(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (5 * 10**9, 80 * 10**9))
    memory.check_free({"weights": 2 * 10**9, "queue": 2 * 10**9}, CUDA)
    with pytest.raises(RunError, match="GPU 1: 5 GB of 80 GB are free, and this process needs 6 GB"):
        memory.check_free({"weights": 6 * 10**9}, CUDA)
    assert asked == [CUDA, CUDA]
    memory.check_free({"weights": 10**15}, CPU)  # checked with the machine's, before the processes start
