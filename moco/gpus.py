"""The GPUs of this machine: whether PyTorch can use them, and what they can do."""

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from moco.environment import is_local_main
from moco.errors import UsageError, first_line

PROC = Path("/proc/driver/nvidia")


def usable_gpus() -> int:
    """How many GPUs PyTorch can use. Raises UsageError if it sees some and can use none."""
    seen = torch.cuda.device_count()
    if not seen:
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return seen
    reasons = [_short(str(warning.message)) for warning in caught if "CUDA" in str(warning.message)]
    raise UsageError(
        f"this machine has {seen} GPUs that PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot"
        f" use: {'; '.join([*reasons, _driver()])}; update the driver or install a PyTorch for an older CUDA; to run on"
        " the CPU nevertheless, set CUDA_VISIBLE_DEVICES= (empty)"
    )


def say_why_on_cpu() -> None:
    """Print why this run is on the CPU although the machine has a GPU, if that is so, once per node."""
    if not torch.cuda.is_available() and (reason := _why_on_cpu()) and is_local_main():
        print(reason, file=sys.stderr, flush=True)


def _why_on_cpu() -> str:
    present = len(list((PROC / "gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if present and torch.version.cuda is None:
        reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
    elif present and visible is not None:
        reason = f"CUDA_VISIBLE_DEVICES={visible} hides them"
    elif present:
        reason = f"PyTorch sees none of them ({_driver()}); does nvidia-smi list them?"
    elif torch.backends.mps.is_available():
        return "running on the CPU: this machine has an Apple GPU, which is not supported"
    else:
        return ""
    return f"running on the CPU, although this machine has {present} NVIDIA GPUs: {reason}"


def _driver() -> str:
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", (PROC / "version").read_text())
    except OSError:
        found = None
    return f"the driver is {found[0]}" if found else "the driver's version is unknown"


def _short(message: str) -> str:
    """PyTorch's reason, without the advice that follows it."""
    return re.split(r"\. |\s*\(Triggered", first_line(message).removeprefix("CUDA initialization: "))[0]


def check_options(devices: Sequence[torch.device], precision: str, compiled: bool = False) -> None:
    """Raise UsageError unless the devices can compute in this precision and, with `compiled`, run compiled code."""
    for device in devices:
        if device.type != "cuda":
            continue
        capability = torch.cuda.get_device_capability(device)
        what = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        if precision == "bf16" and capability < (8, 0):
            raise UsageError(
                f"--precision bf16: {what} would only emulate it, slowly; use fp16, or a GPU of 8.0 or more"
            )
        if compiled and capability < (7, 0):
            raise UsageError(f"--compile: {what} is too old for it, it needs 7.0 or more; leave it out")
    if compiled:
        _check_compiler(any(device.type == "cuda" for device in devices))


def _check_compiler(on_gpu: bool) -> None:
    """Raise UsageError unless torch.compile finds the compiler that it needs."""
    if not on_gpu:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UsageError("--compile: on a CPU it needs a C++ compiler, and there is no g++; leave it out")
        return
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "--compile: on a GPU it needs Triton, which is not installed (pip install triton); leave it out"
        )
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        missing = f"CC={named} is none" if named else "there is no gcc or clang"
        raise UsageError(f"--compile: on a GPU it needs a C compiler, and {missing}; install one, or leave it out")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise UsageError(
            f"--compile: on a GPU it needs Python's headers, and there is no {header}; install them (Debian, Ubuntu:"
            " apt install python3-dev), or leave it out"
        )
