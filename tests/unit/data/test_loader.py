"""Global batches, every image once in evaluation, loading processes, and prefetching on a simulated GPU."""

import functools
import multiprocessing
import os
import signal
import time
from unittest.mock import MagicMock

import pytest
import torch

from moco.data import datasets, folders, loader
from moco.data.images import BadImage
from moco.distributed import DistContext
from moco.processes import signals
from moco.processes.exits import translate_error


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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there may be cores
def test_number_of_workers_does_not_change_the_batches(data):
    paths, labels, *_ = folders.list_images(data / "train")
    dataset = datasets.RetryDataset(datasets.TwoCrops(paths, 16), labels)
    batches = loader.GlobalBatchSampler(16, 4, seed=0, ctx=DistContext())
    alone, *others = (
        list(loader.train_loader(dataset, batches, workers, torch.device("cpu"))) for workers in (0, 1, 4)
    )
    assert len(alone) == 4
    assert all(torch.equal(a, b) for other in others for (a, _), (b, _) in zip(alone, other, strict=True))


def test_evaluation_sees_every_image_once_over_all_ranks(data):
    paths, labels, *_ = folders.list_images(data / "train")
    dataset = datasets.ImageList(paths[:13], range(13), datasets.eval_transform(16))
    seen = []
    for rank in range(4):
        batches = loader.eval_loader(dataset, 3, 0, DistContext(rank, 4))
        seen += [label.item() for _, part in batches for label in part]
    assert sorted(seen) == list(range(13))


# Loading processes


class Described(torch.utils.data.Dataset):
    """Each item is its index and the process that reads it."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, os.getpid(), os.getppid()


def test_workers_are_forked_whatever_the_default_and_persist():
    """New ones, forked while a thread of the last pass is ending, can hang in CPython."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    batches = loader.eval_loader([Described(), Described()], 4, 1, DistContext())
    passes = [list(batches) for _ in range(3)]
    multiprocessing.set_start_method(before, force=True)
    assert all(set(parents.tolist()) == {os.getpid()} for batches in passes for _, _, parents in batches)
    assert len({process for batches in passes for _, processes, _ in batches for process in processes.tolist()}) == 1
    # no batch of two sets
    assert [indices.tolist() for indices, _, _ in passes[0]] == [[0, 1, 2, 3], [4, 5]] * 2


def test_signals_are_blocked_until_workers_have_their_handlers(monkeypatch):
    """A stop signal in between would run the training process's handler in a worker."""

    def note_mask(worker_id):
        masks.put(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        signals.leave_signals_to_trainer()
        masks.put(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    masks, before = multiprocessing.SimpleQueue(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    monkeypatch.setattr(loader, "_start_worker", note_mask)
    list(loader.eval_loader(Described(), 6, 1, DistContext()))
    assert set(signals.STOP_SIGNALS) <= masks.get() and masks.get() == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


class Hanging(torch.utils.data.Dataset):
    """The third item never comes."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        time.sleep(60 if index == 2 else 0)
        return index


def test_a_batch_that_never_comes_is_an_error(monkeypatch):
    monkeypatch.setattr(loader, "DATA_SECONDS", 0.3)
    hanging = loader.eval_loader(Hanging(), 1, 1, DistContext())
    batches = iter(hanging)
    assert [next(batches).item() for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="timed out") as error:
        next(batches)
    told = str(translate_error(error.value, "start again"))
    assert told.startswith("DataLoader timed out after 0.3 seconds: the data's file system") and "; start again" in told
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error
    for process in multiprocessing.active_children():
        process.kill()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_test_image_is_named_whatever_process_reads_it(tmp_path, workers):
    (tmp_path / "x.png").write_bytes(b"no image")
    dataset = datasets.ImageList([str(tmp_path / "x.png")], [0], datasets.eval_transform(16))
    with pytest.raises(BadImage, match="x.png: UnidentifiedImageError: .*; replace this file"):
        list(loader.eval_loader(dataset, 1, workers, DistContext()))


# Prefetching


def test_all_epochs_share_one_side_stream_per_device(monkeypatch):
    monkeypatch.setattr(torch, "cuda", cuda := MagicMock())
    monkeypatch.setattr(loader, "_side_stream", functools.cache(cuda.Stream))
    training, side = cuda.current_stream.return_value, cuda.stream.return_value

    def on_side_stream():
        return side.__enter__.call_count - side.__exit__.call_count == 1

    def prepare(batch, step):
        assert on_side_stream()
        return [MagicMock()]

    for device in (torch.device("cuda", 0), torch.device("cuda", 0), torch.device("cuda", 1)):
        for _ in range(3):
            for (tensor,), _ in loader.prefetch([("a", []), ("b", [])], prepare, device):
                tensor.record_stream.assert_called_once_with(training)
                assert not on_side_stream()  # while the step runs
    assert cuda.Stream.call_count == 2 and training.wait_stream.call_count == 18  # before each step


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_without_cuda_batches_are_prepared_in_order_on_no_stream(monkeypatch, device):
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, None)
    batches = [("a", []), ("b", [("x.png", "empty")])]
    prepared = loader.prefetch(batches, lambda batch, step: (batch, step), torch.device(device), first_step=5)
    assert list(prepared) == [(("a", 5), []), (("b", 6), [("x.png", "empty")])]
