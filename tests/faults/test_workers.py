"""Data loader workers of whole runs: signals while they start, and workers that are stopped."""

import os
import signal
import time

import pytest
from helpers import FAULTS, PRETRAIN, alive, assert_one_line, completed, ended, started, wait_for

pytestmark = pytest.mark.slow


def workers(process):
    """The ids of the data loader workers of a run in one process."""
    return [pid for pid in alive(process) if pid != process.pid]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_workers_start_costs_no_step(whole, tmp_path, signum):
    """The signal goes to all processes, as Slurm and torchrun send it; the start method is Python 3.14's."""
    process = started(FAULTS, "fork server", *whole.command(PRETRAIN, tmp_path / "run", "--epochs", 1000))
    wait_for(process, "starting at epoch 0")
    os.killpg(process.pid, signum)
    code, out, err = ended(process)
    assert code == 128 + signum and "stopped by" in out and err == "", err
    whole.assert_continues(PRETRAIN, tmp_path / "run")


def test_a_stopped_worker_ends_with_a_killed_run(whole, tmp_path):
    process = started(*whole.command(PRETRAIN, tmp_path, "--epochs", 1000))
    wait_for(process, "epoch 1 ")
    for worker in workers(process):
        os.kill(worker, signal.SIGSTOP)
    process.kill()
    ended(process)


def test_a_worker_that_stays_stopped_ends_the_run_saved(whole, tmp_path):
    process = started(FAULTS, "impatient for batches", *whole.command(PRETRAIN, tmp_path))
    wait_for(process, "starting at")
    while not workers(process):
        time.sleep(0.01)
    for worker in workers(process):
        os.kill(worker, signal.SIGSTOP)
    assert_one_line(completed(process, timeout=60), "timed out after 2 seconds", "continue with --resume auto")
    whole.assert_continues(PRETRAIN, tmp_path)
