"""Data loader workers: their start method, signals while they start, and what happens if they hang or are stopped."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from helpers import (
    FAULTS,
    PRETRAIN,
    SMALL,
    alive,
    completed,
    ended,
    log,
    run_script,
    same,
    started,
    wait_for,
    weights,
    write_folder,
)

from moco.data import loader
from moco.distributed import DistContext
from moco.errors import RunError
from moco.processes import signals

slow = pytest.mark.slow
# A run whose default start method is Python 3.14's:  forked.py SCRIPT ARGUMENT…
FORKSERVER_FORCED = """
import multiprocessing, os, runpy, sys
sys.path.insert(0, os.getcwd())
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver", force=True)
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Whole runs


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("workers")
    write_folder(root / "data", train=20)  # 5 steps of 8 images per epoch
    (root / "forked.py").write_text(FORKSERVER_FORCED)
    run_script(PRETRAIN, *SMALL, "--epochs", 3, "--ckpt_path", root / "undisturbed", root / "data")
    return root


def assert_continues(files_of, folder):
    run_script(PRETRAIN, *SMALL, "--epochs", 3, "--resume", "auto", "--ckpt_path", folder, files_of / "data")
    assert log(folder) == log(files_of / "undisturbed")
    name = "checkpoint_latest.pth.tar"
    assert same(weights(folder / name), weights(files_of / "undisturbed" / name))


def loaders(process):
    """The ids of the data loader workers of a run in one process."""
    return [pid for pid in alive(process) if pid != process.pid]


@slow
@pytest.mark.parametrize("signum", signals.STOP_SIGNALS)
def test_a_forced_fork_server_costs_no_step_at_a_signal(files_of, tmp_path, signum):
    """The signal goes to all processes, as Slurm and torchrun send it."""
    options = [PRETRAIN, *SMALL, "--epochs", 1000, "--ckpt_path", tmp_path, files_of / "data"]
    process = started(files_of / "forked.py", *options)
    wait_for(process, "starting at epoch 0")
    os.killpg(process.pid, signum)
    code, _, err = ended(process)
    assert code == 128 + signum and "Traceback" not in err, err
    saved = torch.load(tmp_path / "checkpoint_latest.pth.tar", weights_only=True)
    assert saved["epoch"] < 3
    assert_continues(files_of, tmp_path)


@slow
@pytest.mark.parametrize("script", ["", "forked.py"], ids=["fork", "forkserver"])
def test_a_stopped_worker_ends_with_a_killed_run(files_of, tmp_path, script):
    options = [PRETRAIN, *SMALL, "--epochs", 1000, "--ckpt_path", tmp_path, files_of / "data"]
    process = started(files_of / script, *options) if script else started(*options)
    wait_for(process, "epoch 1 ")
    for worker in loaders(process):
        os.kill(worker, signal.SIGSTOP)
    process.kill()
    ended(process)


# Within an epoch, and between two
STOPPED_AT = pytest.mark.parametrize("sign", ["starting at", "epoch 1 "], ids=["within an epoch", "between two"])


@slow
@STOPPED_AT
def test_a_worker_that_is_stopped_for_a_while_costs_nothing(files_of, tmp_path, sign):
    options = [*SMALL, "--epochs", 3, "--ckpt_path", tmp_path, files_of / "data"]
    process = started(PRETRAIN, *options)
    stop_worker(process, sign)
    time.sleep(7)
    for worker in loaders(process):
        os.kill(worker, signal.SIGCONT)
    run = completed(process)
    assert run.returncode == 0, run.stderr
    assert log(tmp_path) == log(files_of / "undisturbed")


def stop_worker(process, sign):
    wait_for(process, sign)
    while not loaders(process):
        time.sleep(0.01)
    (worker,) = loaders(process)
    os.kill(worker, signal.SIGSTOP)


@slow
def test_a_worker_that_stays_stopped_ends_the_run_saved(files_of, tmp_path):
    options = [*SMALL, "--epochs", 3, "--ckpt_path", tmp_path, files_of / "data"]
    process = started(FAULTS, "impatient for batches", PRETRAIN, *options)
    stop_worker(process, "starting at")
    run = completed(process, timeout=40)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "no batch for 2 s" in run.stderr, run.stderr
    assert_continues(files_of, tmp_path)
