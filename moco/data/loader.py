"""Samplers, data loaders, and prefetching to the training device."""

import functools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate

from moco import distributed
from moco.distributed import DistContext
from moco.errors import UsageError
from moco.processes import signals

DATA_SECONDS = 600  # limit for one batch, then the run is saved and ends; below the limit for collectives


class GlobalBatchSampler(Sampler):
    """This rank's share of every global batch, as lists of (index, seed).

    Order and seeds follow from (seed, epoch) alone: a step sees the same global batch with any number of ranks.
    batch_size: images per rank and step; images that do not fill a global batch at the end of an epoch are left out.
    Set `epoch`, and `first_step` to start within it, before each pass. Raises UsageError if no batch is full.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, ctx: DistContext):
        self.num_images, self.batch_size, self.seed, self.ctx = num_images, batch_size, seed, ctx
        self.epoch = self.first_step = 0
        self.global_batch_size = batch_size * ctx.world_size
        if num_images < self.global_batch_size:
            batch = f"one batch of {self.global_batch_size} (all nodes)"
            raise UsageError(f"--batch-size: {num_images} training images do not fill {batch}; use a smaller batch")

    def __len__(self) -> int:
        return self.num_images // self.global_batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(distributed.derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        seeds = torch.randint(2**62, (self.num_images,), generator=generator)
        for step in range(self.first_step, len(self)):
            start = step * self.global_batch_size + self.ctx.rank * self.batch_size
            batch = slice(start, start + self.batch_size)
            yield list(zip(order[batch].tolist(), seeds[batch].tolist()))


class WorkerLoader(DataLoader):
    """A DataLoader whose worker processes leave stop signals to the trainer and end with it, however it ends.

    They are forked, whatever Python's default, to share the memory of the lists of files, and persist over all passes.
    PyTorch raises RuntimeError if there is no batch for DATA_SECONDS.
    """

    def __init__(self, dataset: Dataset, workers: int, device: torch.device, **settings):
        if workers:
            settings |= {
                "multiprocessing_context": "spawn" if sys.platform == "darwin" else "fork",
                "persistent_workers": True,
                "worker_init_fn": _start_worker,
                "timeout": DATA_SECONDS,
            }
        super().__init__(dataset, num_workers=workers, pin_memory=device.type == "cuda", **settings)

    def _get_iterator(self) -> Iterator:
        # CPython 3.11 deadlocks in a process forked while a thread enters Python, as gloo's do after a collective.
        time.sleep(0.3)  # in which such threads come to rest
        with signals.blocked():  # in the workers until they are ready; and PyTorch cannot clean up half an iterator
            return super()._get_iterator()


def _start_worker(worker_id: int) -> None:
    signals.signal_when_parent_ends(signal.SIGKILL)  # the kernel ends it even if it is stopped
    signals.leave_signals_to_trainer()


def train_loader(dataset: Dataset, sampler: GlobalBatchSampler, workers: int, device: torch.device) -> DataLoader:
    """Yields (batch, unreadable) of a RetryDataset: the collated items, and (path, reason) of the files it replaced."""
    return WorkerLoader(dataset, workers, device, batch_sampler=sampler, collate_fn=_collate)


def _collate(items: list) -> tuple:
    samples, unreadable = zip(*items)
    return default_collate(samples), sum(unreadable, [])


def eval_loader(dataset: Dataset | Sequence[Dataset], batch_size: int, workers: int, ctx: DistContext) -> DataLoader:
    """Every image exactly once over all ranks, without padding: rank r takes images r, r + world_size, … of a data set.

    dataset: one, or several that follow each other; no batch mixes two.
    """
    datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
    batches, start = [], 0
    for part in datasets:
        share = range(start + ctx.rank, start + len(part), ctx.world_size)
        batches += [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        start += len(part)
    return WorkerLoader(ConcatDataset(datasets), workers, ctx.device, batch_sampler=batches)


# One per device for the life of the process: the allocator keeps memory for each stream it has seen.
_side_stream = functools.cache(torch.cuda.Stream)


def prefetch(batches: Iterable, prepare: Callable, device: torch.device, first_step: int = 0) -> Iterator[tuple]:
    """Yield (prepare(batch, step), unreadable) for every (batch, unreadable); prepare returns a tuple of tensors.

    On a GPU, prepare runs on a stream of its own: the host runs ahead of the GPU, so the next batch is copied and
    augmented while the current step still computes.
    """
    for step, (batch, unreadable) in enumerate(batches, first_step):
        if device.type != "cuda":
            yield prepare(batch, step), unreadable
            continue
        side, training = _side_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(side):
            tensors = prepare(batch, step)
        training.wait_stream(side)
        for tensor in tensors:
            tensor.record_stream(training)  # the allocator must not reuse its memory before the step is done
        yield tensors, unreadable
