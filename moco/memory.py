"""Host memory: kept from one training step to the next instead of fetched from the kernel anew."""

import ctypes

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
