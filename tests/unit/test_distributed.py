"""Collectives of a single rank, seeds, and small arrays on their way to a device; several ranks: test_ranks.py."""

import numpy as np
import torch

from moco import distributed


def test_a_single_rank_is_rank_0_of_1_and_keeps_what_it_has():
    x = torch.arange(6.0).view(3, 2)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    shuffled = distributed.exchange_rows(x, distributed.draw_shuffle(3))
    for result in (shuffled, distributed.gather(x), distributed.gather_in_order(x)):
        assert torch.equal(result, x)
    assert torch.equal(distributed.all_reduce(x.clone()), x)
    assert distributed.all_reduce_max(3, -1) == [3, -1] and distributed.gather_lists(["a"]) == ["a"]


def test_a_seed_is_given_or_saved_or_random():
    assert distributed.resolve_seed(3, {"seed": 4}) == 3
    assert distributed.resolve_seed(None, {"seed": 4}) == 4
    assert distributed.resolve_seed(None, {}) != distributed.resolve_seed(None, {})


def test_seeds_differ_by_every_part():
    parts = [(), (0,), (0, 0), (0, 1), (1, 0), (1,), (10, 1), (1, 1, 0), ("order", 0)]
    assert len({distributed.derive_seed(*part) for part in parts}) == len(parts)
    assert all(0 <= distributed.derive_seed(*part) < 2**63 for part in parts)


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
