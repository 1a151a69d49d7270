"""Small arrays reach a GPU in one copy per step, and unchanged."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco import augment, distributed
from moco.views import training_views


class Copies(TorchDispatchMode):
    """Counts the copies from the host to a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" and result.device.type == "cuda"
        return result


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU, which nothing can be pinned for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with FakeTensorMode():
        yield torch.device("cuda")


@pytest.mark.parametrize("robust, count", [("patch", 2), ("texture", 1), ("none", 0)])
@pytest.mark.parametrize("recipe", [augment.V1, augment.V2], ids=["v1", "v2"])
def test_all_parameters_of_a_step_travel_in_one_copy(gpu, recipe, robust, count):
    crops = torch.empty(4, 3, 3, 32, 32, dtype=torch.uint8, device=gpu)
    with Copies() as copies:
        rng = np.random.default_rng(0)
        training_views(crops, rng, recipe=recipe, robust=robust, num_nonsem=count, patch_ratio=(4, 10))
    assert copies.count == 1


ARRAYS = [
    np.arange(5, dtype=np.int32),
    np.array([True, False, True]),
    np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    np.zeros((2, 0), dtype=np.int64),
    np.arange(2, dtype=np.int64).reshape(2, 1, 1),
]


def test_packed_arrays_arrive_unchanged():
    for array, tensor in zip(ARRAYS, distributed._packed(ARRAYS, torch.device("cpu")), strict=True):
        expected = torch.from_numpy(np.ascontiguousarray(array))
        assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype and tensor.shape == expected.shape


def test_arrays_keep_their_groups():
    groups = distributed.to_device([ARRAYS[:2], (), ARRAYS[2:]], torch.device("cpu"))
    assert [len(group) for group in groups] == [2, 0, 3] and groups[2][0].shape == (3, 2)
    assert distributed.to_device([()], torch.device("cuda")) == [[]]  # as for runs without NS
