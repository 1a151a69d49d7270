"""How much memory a training takes, and, on a CPU, keeping it from one step to the next."""

import ctypes
import os

import torch

from moco.failures import BadInput

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                                # names and numbers of glibc's malloc.h


def keep_freed(device):
    """Let malloc keep what PyTorch frees, if this process trains on the CPU. Only glibc is told; others stay as they are.

    A step takes and frees gigabytes of activations. By default glibc returns each large block to the kernel, which
    zeroes the pages again when the next step asks for them: a sixth of a ResNet-50 step's time in fp32.
    """
    libc = ctypes.CDLL(None)
    if device.type == "cpu" and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)                                  # no mapping of its own for a large block
        libc.mallopt(M_TRIM_THRESHOLD, -1)                           # and the end of the heap is never cut off


def check(build, arch, batch_size, image_size, crops, itemsize, device, processes):
    """What one of a machine's `processes` takes to train the MoCo that `build` builds on `device`, as a text.

    crops: how many an image has (query, key, NS); itemsize: bytes of an activation. BadInput where that is more memory
    than there is, and where the network refuses such batches or images.
    """
    try:
        with torch.device("meta"):
            parts = needed(build(), torch.empty(batch_size, 3, image_size, image_size), crops, itemsize)
    except (RuntimeError, ValueError) as error:                      # shapes are all that can be wrong here
        reason = str(error).splitlines()[0]
        raise BadInput(f"--arch {arch} cannot be built or does not take {batch_size} images of {image_size} px a process"
                       f" ({reason}); 32 images of 224 px work") from error
    there = available(device, processes)
    text = f"{gigabytes(sum(parts.values()))} of {gigabytes(there)}, estimated: " + ", ".join(
        f"{name} {gigabytes(size)}" for name, size in parts.items())
    if sum(parts.values()) > there:
        raise BadInput(f"a process would take {text}; use a smaller --batch-size, --moco-k or --image-size")
    return text


def needed(model, images, crops, itemsize):
    """Bytes that training takes, by part; an estimate, without what libraries take for themselves.

    images: a batch (N, 3, S, S) on the meta device, which the query encoder runs on.
    """
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor              # kept, so that no other takes its address
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.encoder_q(images)
    own = {weight.untyped_storage()._cdata for weight in model.encoder_q.parameters()}
    activations = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
    weights = sum(weight.nbytes for weight in model.encoder_q.parameters())
    return {
        "activations": activations * itemsize // 4,
        "weights, gradients, momenta, key encoder": 4 * weights,
        "queue": 2 * model.queue.nbytes,                             # a step keeps it as it was
        "logits": 3 * 4 * len(features) * (model.K + crops),
        "crops": images.nbytes * crops * 2,
    }


def available(device, processes):
    """Bytes of memory there are for one of the `processes` that this machine runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def gigabytes(count):
    return f"{count / 1e9:.3g} GB"
