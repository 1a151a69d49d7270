"""Faults put into real runs: what is promised in the README's table of faults."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, TORCHRUN, run_script, write_folder
from test_cli import PRETRAIN, SMALL, log, refused, same, weights

LAST = "checkpoint_0002.pth.tar"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("reliability") / "data", train=20)   # 5 steps of 8 images an epoch


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of three epochs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run_script(PRETRAIN, *SMALL, "--epochs", 3, "--ckpt_path", folder, data)
    return folder


def started(*options, launcher=(), **settings):
    return subprocess.Popen([sys.executable, *launcher, PRETRAIN, *map(str, [*SMALL, "--epochs", 3, *options])],
                            cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed: {process.stderr.read()}")


def equals(folder, whole):
    return log(folder) == log(whole) and same(weights(folder / LAST), weights(whole / LAST))


def alive(group):
    """The processes of a process group that have not ended."""
    status = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True).stdout
    return [line for line in status.splitlines() if not line.startswith("Z")]


@pytest.mark.parametrize("number, multiprocessing", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGUSR1, True)])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_the_resumed_run_is_the_undisturbed_one(
        data, whole, tmp_path, number, multiprocessing):
    options = ["--print-freq", 1, "--ckpt_path", tmp_path, *["--multiprocessing-distributed"] * multiprocessing, data]
    process = started(*options, start_new_session=True)
    wait_for(process, "epoch 2/3 [1/5]")
    # To all processes of the job, as terminals, timeout and Slurm do it; the parent of several passes it on.
    os.kill(process.pid, number) if multiprocessing else os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name} after epoch 1" in out and "Traceback" not in err
    assert not alive(process.pid)
    saved = torch.load(tmp_path / "checkpoint_latest.pth.tar", weights_only=True)
    assert saved["epoch"] == 1 and 1 <= saved["step"] < 5
    resumed = run_script(PRETRAIN, *SMALL, "--epochs", 3, *options, "--resume", "auto")
    assert f"from epoch 1 step {saved['step']}" in resumed.stdout
    assert equals(tmp_path, whole)


def test_a_second_interrupt_stops_at_once(data, tmp_path):
    process = started("--print-freq", 1, "--epochs", 1000, "--ckpt_path", tmp_path, data)
    wait_for(process, "epoch 1/1000 [1/5]")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)                                # two in a row may come as one
    time.sleep(0.01)
    with subprocess.Popen(["true"]):
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (130, -signal.SIGINT)


@pytest.mark.parametrize("two", [False, True], ids=["one process", "two processes"])
def test_killed_at_random_moments_and_resumed_each_time_is_the_undisturbed_run(data, whole, tmp_path, two):
    """SIGKILL to all processes: 20 times, somewhere between the start and a few steps later."""
    launcher = [*TORCHRUN, "--nproc-per-node=2"] if two else []
    rng, kills = random.Random(0), 4 if two else 20
    options = ["--save-steps", 2, "--resume", "auto", "--print-freq", 1, "--ckpt_path", tmp_path / "cut", data]
    killed = 0
    while killed < kills:
        if (tmp_path / "cut" / LAST).exists():                        # it came to its end; begin another run
            shutil.rmtree(tmp_path / "cut")
        process = started(*options, launcher=launcher, start_new_session=True)
        wait_for(process, "from epoch")
        time.sleep(rng.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    if not (tmp_path / "cut" / LAST).exists():
        run_script(PRETRAIN, *SMALL, "--epochs", 3, *options, launcher=launcher)
    if two:
        run_script(PRETRAIN, *SMALL, "--epochs", 3, "--ckpt_path", tmp_path / "whole", data, launcher=launcher)
    assert equals(tmp_path / "cut", tmp_path / "whole" if two else whole)


def test_keep_removes_the_oldest_numbered_checkpoints(data, tmp_path):
    run_script(PRETRAIN, *SMALL, "--epochs", 3, "--save-freq", 1, "--keep", 2, "--ckpt_path", tmp_path, data)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [
        "checkpoint_0001.pth.tar", LAST, "checkpoint_latest.pth.tar"]


def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_line(data, whole, tmp_path):
    """The kernel refuses to let any file grow beyond half a checkpoint, as a full disk or a quota does."""
    shutil.copy(whole / "checkpoint_latest.pth.tar", tmp_path)
    before = (tmp_path / "checkpoint_latest.pth.tar").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    process = started("--epochs", 4, "--resume", "auto", "--ckpt_path", tmp_path, data, preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("\n") == 1 and "could not be written" in err, err
    assert (tmp_path / "checkpoint_latest.pth.tar").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("options, told", [
    (["--aug-plus"], "--aug_plus False"), (["--image-size", 48], "--image-size 32"), (["-a", "resnet18"], "--arch resnet10"),
    (["--moco-dim", 64], "--moco-dim 128"), (["--moco-k", 32], "--moco-k 64"), (["--mlp"], "--mlp False")])
def test_a_resumed_run_must_not_contradict_its_checkpoint(data, whole, options, told):
    line = refused(PRETRAIN, *SMALL, "--epochs", 9, *options, "--resume", whole / LAST, data)
    assert f"it was made with {told.replace('_', '-')}" in line


def test_a_resumed_run_must_have_the_same_classes(whole, tmp_path):
    other = write_folder(tmp_path / "data", classes=("n01", "n07"))
    assert "classes 2: n01, n02, this run has 2: n01, n07" in refused(
        PRETRAIN, *SMALL, "--epochs", 9, "--resume", whole / LAST, other)
