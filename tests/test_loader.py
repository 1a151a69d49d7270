import os

import pytest
import torch

from moco.data import datasets, folders, loader
from moco.distributed import DistContext
from moco.errors import UsageError


def test_any_number_of_ranks_sees_the_same_global_batches():
    alone = loader.GlobalBatchSampler(30, 8, seed=3, ctx=DistContext())
    ranks = [loader.GlobalBatchSampler(30, 2, seed=3, ctx=DistContext(rank, 4)) for rank in range(4)]
    for epoch in (0, 1):
        for batches in [alone, *ranks]:
            batches.epoch = epoch
        assert list(alone) == [sum(parts, []) for parts in zip(*ranks)]
        assert len(list(alone)) == len(alone) == 3
        indices = [index for batch in alone for index, _ in batch]
        assert len(set(indices)) == 24
    first = list(alone)
    alone.epoch = 0
    assert list(alone) != first


def test_a_resumed_epoch_continues_with_the_same_batches():
    sampler = loader.GlobalBatchSampler(30, 8, seed=3, ctx=DistContext())
    sampler.epoch = 2
    whole = list(sampler)
    sampler.first_step = 1
    assert list(sampler) == whole[1:] and len(whole) == 3


def test_the_global_batch_of_a_step_is_that_of_all_ranks():
    ranks = [loader.GlobalBatchSampler(30, 4, seed=3, ctx=DistContext(rank, 2)) for rank in range(2)]
    for sampler in ranks:
        sampler.epoch = 1
    indices = [index for sampler in ranks for index, _ in list(sampler)[2]]
    assert ranks[1].global_batch(2) == indices


def test_prefetching_yields_the_prepared_batches_in_order():
    batches = [("a", []), ("b", [("x.png", "empty")])]
    prepared = loader.prefetch(batches, lambda batch, step: (batch, step), torch.device("cpu"), first_step=5)
    assert list(prepared) == [(("a", 5), []), (("b", 6), [("x.png", "empty")])]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there may be cores
def test_number_of_workers_does_not_change_the_batches(data):
    paths, labels, _ = folders.list_images(data / "train")
    dataset = datasets.RetryDataset(datasets.TwoCrops(paths, 16), labels)
    batches = loader.GlobalBatchSampler(16, 4, seed=0, ctx=DistContext())
    alone, *others = (
        list(loader.train_loader(dataset, batches, workers, torch.device("cpu"))) for workers in (0, 1, 4)
    )
    assert len(alone) == 4
    assert all(torch.equal(a, b) for other in others for (a, _), (b, _) in zip(alone, other, strict=True))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match="10 training images do not fill one batch of 16"):
        loader.GlobalBatchSampler(10, 8, seed=0, ctx=DistContext(world_size=2))


def test_evaluation_sees_every_image_once_over_all_ranks(data):
    paths, labels, _ = folders.list_images(data / "train")
    dataset = datasets.StrictDataset(datasets.ImageList(paths[:13], range(13), datasets.eval_transform(16)))
    seen = []
    for rank in range(4):
        batches = loader.eval_loader(dataset, 3, 0, DistContext(rank, 4))
        seen += [label.item() for _, part in batches for label in part]
    assert sorted(seen) == list(range(13))


class Reader(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, os.getpid()


def test_workers_of_test_sets_persist_over_all_passes():
    """New ones, forked while a thread of the last pass is ending, can hang in CPython."""
    batches = loader.eval_loader([Reader(), Reader()], 4, 1, DistContext())
    readers = {reader for _ in range(3) for _, readers in batches for reader in readers.tolist()}
    assert len(readers) == 1 and os.getpid() not in readers
    assert [indices.tolist() for indices, _ in batches] == [[0, 1, 2, 3], [4, 5]] * 2  # no batch of two sets
