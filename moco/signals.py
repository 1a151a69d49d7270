"""Stopping a run from outside: the step that runs is finished and saved first."""

import functools
import multiprocessing.util
import os
import signal
import sys

import torch
import torch.distributed as dist

from moco import distributed

class Stop:
    """Remembers that one of STOPPING came to this process. A second SIGINT ends the process at once."""

    def __init__(self):
        self.received = 0
        for number in distributed.STOPPING:
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def agreed(self):
        """Whether a signal came to any process: the same in all, which must all call this.

        A number of the host, exchanged between the hosts: no GPU is waited for.
        """
        if distributed.world_size() > 1:
            number = torch.tensor(self.received)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.received = number.item()
        return self.received > 0

    def leave(self, where):
        """End this process with 128 + the signal's number, as a shell expects, once rank 0 has saved."""
        distributed.barrier()
        if distributed.is_main():
            print(f"stopped by {signal.Signals(self.received).name} {where}, saved; go on with --resume auto", flush=True)
        sys.exit(128 + self.received)


def left_to_the_trainer():
    """A worker_init_fn for loading processes. A signal that a job's processes all get is the training process's to
    answer, and it needs its batches for that; only once it ends does SIGTERM end them."""
    ending = multiprocessing.RawValue("b", 0)
    multiprocessing.util.Finalize(None, setattr, (ending, "value", 1), exitpriority=0)  # before it terminates its children
    return functools.partial(_leave_to_the_trainer, ending)


def _leave_to_the_trainer(ending, worker):
    def terminate(number, frame):
        if ending.value:
            os._exit(0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
