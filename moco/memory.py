"""Estimate the memory that training takes, and keep freed memory between steps on a CPU."""

import ctypes
import os
from collections.abc import Callable, Mapping

import torch
import torch.nn as nn

from moco.errors import RunError, UsageError, first_line

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc's malloc keep the memory that PyTorch frees, if this process trains on the CPU.

    A step allocates and frees gigabytes of activations. By default glibc returns each large block to the kernel, which
    zeroes the pages again for the next step: a sixth of an fp32 ResNet-50 step.
    """
    libc = ctypes.CDLL(None)
    if device.type == "cpu" and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)  # no separate mapping for a large block
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the top of the heap is never returned


def required(
    build: Callable[[], nn.Module], arch: str, batch_size: int, image_size: int, crops: int, itemsize: int
) -> dict[str, int]:
    """Bytes, by part, that a process needs to train the MoCo that `build` returns.

    crops: per image (query, key, NS); itemsize: bytes per activation value. Raises UsageError if the network does not
    accept such batches or images.
    """
    try:
        with torch.device("meta"):
            return estimate(build(), torch.empty(batch_size, 3, image_size, image_size), crops, itemsize)
    except (RuntimeError, ValueError) as error:  # only shapes can be wrong here
        raise UsageError(
            f"--arch {arch} cannot be built or does not accept {batch_size} images of {image_size} px per process"
            f" ({first_line(error)}); 32 images of 224 px work"
        ) from error


def check_memory(parts: Mapping[str, int], device: torch.device, processes: int) -> str:
    """What each of a machine's `processes` needs (as `required` tells) of what there is, as a text.

    Raises UsageError if that is more than there is.
    """
    total, limit = sum(parts.values()), available(device, processes)
    if total > limit:
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
        raise UsageError(
            f"a process would need {gigabytes(total)} of {gigabytes(limit)} (estimated: {listed}); use a smaller"
            " --batch-size, --moco-k or --image-size"
        )
    return f"{gigabytes(total)} of {gigabytes(limit)} per process, estimated"


def check_free(parts: Mapping[str, int], device: torch.device) -> None:
    """Raise RunError if this process's own GPU has less free than it needs: other programs may use it, too.

    Only the process that uses a GPU may ask: asking takes some 0.5 GB of that GPU.
    """
    if device.type != "cuda":
        return
    needed, (free, total) = sum(parts.values()), torch.cuda.mem_get_info(device)
    if needed > free:
        raise RunError(
            f"GPU {device.index}: {gigabytes(free)} of {gigabytes(total)} are free, and this process needs"
            f" {gigabytes(needed)} (estimated); end what else runs there (nvidia-smi lists it), use another GPU (--gpu,"
            " or CUDA_VISIBLE_DEVICES), or a smaller --batch-size"
        )


def estimate(model: nn.Module, images: torch.Tensor, crops: int, itemsize: int) -> dict[str, int]:
    """Bytes that training needs, by part; without what libraries allocate for themselves.

    images: a batch (N, 3, S, S) on the meta device, which the query encoder runs on.
    """
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.encoder_q(images)
    parameters = {weight.untyped_storage()._cdata for weight in model.encoder_q.parameters()}
    activations = sum(
        tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in parameters
    )
    return {
        "activations": activations * itemsize // 4,
        "weights, gradients, momenta, key encoder": 4 * sum(weight.nbytes for weight in model.encoder_q.parameters()),
        "queue": 2 * model.queue.nbytes,  # a step keeps a copy of the previous one
        "logits": 3 * 4 * len(features) * (model.K + crops),
        "crops": images.nbytes * crops * 2,
    }


def available(device: torch.device, processes: int) -> int:
    """Bytes of memory for each of the `processes` that this machine runs, whatever other programs use of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
