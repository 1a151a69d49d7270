"""Small arrays from the host to the training device, together and without a CPU-GPU sync."""

from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 16  # bytes; a view of the buffer as another type must start at a multiple of its size


def to_device(groups: Sequence[Sequence[np.ndarray]], device: torch.device) -> list[list[torch.Tensor]]:
    """The arrays of each group as tensors on the device.

    To a GPU they travel as one copy from pinned memory. Each array by itself, from ordinary memory, would cost as much
    as a kernel launch, and a large one would block the host until the GPU has caught up.
    """
    arrays = [np.ascontiguousarray(array) for group in groups for array in group]
    tensors = iter(_packed(arrays, device) if device.type == "cuda" else map(torch.from_numpy, arrays))
    return [[next(tensors).to(device, non_blocking=True) for _ in group] for group in groups]


def _packed(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    if not arrays:
        return []
    starts = np.cumsum([0] + [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays])
    packed = np.empty(starts[-1], dtype=np.uint8)
    for array, start in zip(arrays, starts):
        packed[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    buffer = torch.from_numpy(packed)
    if torch.cuda.is_available():  # the tests also simulate GPUs where there are none
        buffer = buffer.pin_memory()  # its allocator reuses the memory only after the copy
    buffer = buffer.to(device, non_blocking=True)
    return [
        buffer[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, starts)
    ]
