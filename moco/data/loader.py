"""Samplers, data loaders, and prefetching to the training device."""

import errno
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext, ForkContext, ForkProcess

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate

from moco import distributed
from moco.data.datasets import RetryDataset
from moco.distributed import DistContext
from moco.errors import RunError, UsageError
from moco.processes import signals
from moco.processes.environment import is_local_main
from moco.processes.exits import SHARED_MEMORY_FULL
from moco.processes.signals import blocked, signal_when_parent_ends

DATA_SECONDS = 600  # for a batch, after which the run is saved and ends; less than launch.COLLECTIVE_SECONDS
WAIT_SLICE = 5  # seconds of it, after which the loading processes are checked
LONGEST_TEMP_DIR = 70  # bytes; a socket's path has at most 107, of which multiprocessing adds up to 35


class GlobalBatchSampler(Sampler):
    """This rank's share of every global batch, as lists of (index, seed).

    Order and seeds follow from (seed, epoch) alone: a step sees the same global batch with any number of ranks.
    batch_size: images per rank and step; images that do not fill a global batch at the end of an epoch are left out.
    Set `epoch`, and `first_step` to start within it, before each pass. Raises UsageError if there is not even one
    batch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, ctx: DistContext):
        self.num_images, self.batch_size, self.seed, self.ctx = num_images, batch_size, seed, ctx
        self.epoch = self.first_step = 0
        self.global_batch_size = batch_size * ctx.world_size
        if num_images < self.global_batch_size:
            raise UsageError(
                f"--batch-size: {num_images} training images do not fill one batch of {self.global_batch_size}"
                " (all nodes); use a smaller batch"
            )

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

    def global_batch(self, step: int) -> list[int]:
        """The image indices of a step of this epoch over all ranks; steps count from 0."""
        everywhere = GlobalBatchSampler(self.num_images, self.global_batch_size, self.seed, DistContext())
        everywhere.epoch, everywhere.first_step = self.epoch, step
        return [index for index, _ in next(iter(everywhere))]


class PatientLoader(DataLoader):
    """A DataLoader with `workers` processes, which persist over all passes: see moco/data/loader.py.

    Raises RunError if the system lacks what they need, and if there is no batch for DATA_SECONDS.
    """

    def __init__(self, dataset: Dataset, count: int, device: torch.device, **settings):
        if count:
            _check_semaphores()
            _shorten_temp_dir()
            settings |= {
                "multiprocessing_context": worker_context(),
                "persistent_workers": True,
                "worker_init_fn": signals.leave_signals_to_trainer(),
                "timeout": WAIT_SLICE,
            }
        super().__init__(dataset, num_workers=count, pin_memory=device.type == "cuda", **settings)

    def __iter__(self) -> Iterator:
        try:
            batches = super().__iter__()
        except RuntimeError as error:
            _check_timed_out(error)
            self._iterator = None  # one of the last pass's processes does not answer: start others
            batches = super().__iter__()
        slices = 0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                _check_timed_out(error)
                slices += 1  # not by the clock: this process may have been stopped, too
                if slices * WAIT_SLICE >= DATA_SECONDS:
                    raise RunError(
                        f"no batch for {DATA_SECONDS} s: the data's file system does not answer, or the loading"
                        " processes were stopped; continue with --resume auto once they can be read"
                    ) from error
                continue
            slices = 0
            yield batch


def _check_timed_out(error: RuntimeError) -> None:
    """Raise the error unless it is that of DataLoader's `timeout`, for which PyTorch has no type of its own."""
    if "DataLoader timed out" not in str(error):
        raise error


def train_loader(dataset: RetryDataset, sampler: GlobalBatchSampler, workers: int, device: torch.device) -> DataLoader:
    """Yields (batch, unreadable): the collated items, and the (path, reason) of the files that could not be read."""
    return PatientLoader(dataset, workers, device, batch_sampler=sampler, collate_fn=_collate)


def _check_semaphores() -> None:
    try:
        worker_context().Lock()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise RunError(SHARED_MEMORY_FULL) from error
        raise RunError(
            f"the loading processes cannot use shared memory ({error}): is /dev/shm there, and can it be written to?"
            " Otherwise use -j 0"
        ) from error


def _shorten_temp_dir() -> None:
    """Use another folder for temporary files if that of TMPDIR is too long: loading processes put sockets there."""
    try:
        current = tempfile.gettempdir()
    except OSError as error:  # FileNotFoundError: none can be written to
        raise RunError(f"there is no folder for temporary files ({error}); set TMPDIR to one, or use -j 0") from error
    if len(os.fsencode(current)) <= LONGEST_TEMP_DIR:
        return
    usable = [folder for folder in ("/tmp", "/var/tmp", "/dev/shm") if os.access(folder, os.W_OK | os.X_OK)]
    if not usable:
        raise RunError(
            f"TMPDIR {current}: its {len(os.fsencode(current))} bytes are too many for the sockets of the loading"
            f" processes; set TMPDIR to a folder of at most {LONGEST_TEMP_DIR}, or use -j 0"
        )
    tempfile.tempdir = os.environ["TMPDIR"] = usable[0]
    if is_local_main():
        print(f"TMPDIR is too long for the sockets of the loading processes: they use {usable[0]}", file=sys.stderr)


def _collate(items: list) -> tuple:
    samples, unreadable = zip(*items)
    return default_collate(samples), sum(unreadable, [])


def eval_loader(dataset: Dataset | Sequence[Dataset], batch_size: int, workers: int, ctx: DistContext) -> DataLoader:
    """Every image exactly once over all ranks, without padding: rank r takes images r, r + world_size, … of a data set.

    dataset: one, or several that follow each other; no batch mixes two. The workers persist over all passes: CPython
    can deadlock in a process that is forked while a thread of the last pass's workers is ending.
    """
    datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
    batches, start = [], 0
    for part in datasets:
        share = range(start + ctx.rank, start + len(part), ctx.world_size)
        batches += [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        start += len(part)
    return PatientLoader(ConcatDataset(datasets), workers, ctx.device, batch_sampler=batches)


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


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device for the life of the process: the allocator keeps memory for each stream it has seen."""
    return torch.cuda.Stream(device)


# ---- workers: The data loader's processes: how they are started, and how they end.


class LoadingProcess(ForkProcess):
    """A process that starts with STOP_SIGNALS blocked, until it has set its own handlers, and dies with its parent.

    A signal that came earlier would raise the training process's StopWaiting in it. The kernel ends it even if it is
    stopped, or if its parent was killed.
    """

    def start(self) -> None:
        self._parent_thread_lasts = threading.current_thread() is threading.main_thread()
        with blocked():
            super().start()

    def run(self) -> None:
        if self._parent_thread_lasts:  # its end would count as the parent's
            signal_when_parent_ends(signal.SIGKILL)
        super().run()


class LoadingContext(ForkContext):
    """multiprocessing's fork context, for LoadingProcesses."""

    Process = LoadingProcess


def worker_context() -> BaseContext:
    return multiprocessing.get_context("spawn") if sys.platform == "darwin" else LoadingContext()
