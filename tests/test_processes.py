"""Faults put into runs of several processes: lost ranks, loading processes and launchers, ports and addresses."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    ENVIRONMENT,
    FAULTS,
    PRETRAIN,
    REPOSITORY,
    SMALL,
    TORCHRUN,
    alive,
    assert_one_line,
    completed,
    ended,
    log,
    run_script,
    started,
    wait_for,
    write_folder,
)

from moco.processes.launch import free_port

pytestmark = pytest.mark.slow  # each starts several processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("processes") / "data", train=20)  # 5 steps of 8 images per epoch


@pytest.mark.parametrize("fault", ["killed at the start", "killed in a step", "killed in saving", "wrong in a step"])
def test_when_a_rank_of_four_dies_the_others_end_in_30_s(data, tmp_path, fault):
    launcher = [*TORCHRUN, "--nproc-per-node=4", FAULTS, fault]
    settings = [*SMALL, "--epochs", 3, "--ckpt_path", tmp_path, data]
    process = started(PRETRAIN, *settings, launcher=launcher, env={"KILLED_AT": str(tmp_path / "killed at")})
    code, _, err = ended(process)
    assert code == 1
    if fault.startswith("killed"):
        assert time.time() - float((tmp_path / "killed at").read_text()) < 30
    # Of the ranks only one that met a bug has a traceback; the last is torchrun's own.
    ours, _, _ = err.partition("ChildFailedError")
    assert ours.count("Traceback") == 1 + (fault == "wrong in a step"), err
    if fault == "wrong in a step":
        assert err.index("ValueError: put in by a test") < err.index("another process of this run has ended")
    assert err.count("another process of this run has ended") <= 1


# Several nodes


def node(rank, url, tmp_path, data):
    """Node `rank` of two; it waits three seconds for the other."""
    settings = [*SMALL, "--epochs", 3, "--world-size", 2, "--rank", rank, "--dist-url", url, "--ckpt_path", tmp_path]
    return run_script(FAULTS, "impatient", PRETRAIN, *settings, data, check=False)


def test_a_master_that_nobody_reaches_is_named(data, tmp_path):
    port = free_port()
    url = f"tcp://127.0.0.1:{port}"
    assert_one_line(node(1, url, tmp_path, data), "rank 1 waited 3 s", f"at 127.0.0.1, port {port}")
    assert_one_line(node(1, "tcp://no.such.host:1234", tmp_path, data), "at no.such.host, port 1234")


def test_missing_ranks_are_named(data, tmp_path):
    run = node(0, f"tcp://127.0.0.1:{free_port()}", tmp_path, data)
    assert_one_line(run, "rank 1 of 2 ranks is missing")


def test_a_port_in_use_is_an_error_with_several_nodes_only(data, tmp_path):
    with socket.create_server(("", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert_one_line(node(0, url, tmp_path, data), url, "it is taken")
        single = ["--multiprocessing-distributed", "--world-size", 1, "--rank", 0, "--dist-url", url]
        run_script(PRETRAIN, *SMALL, "--epochs", 1, *single, "--ckpt_path", tmp_path, data)


# Loading processes and launchers


def children(pid):
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listing.split()]


@pytest.mark.parametrize("delay", [0, 0.02], ids=["between batches", "while one is handed over"])
def test_a_killed_loading_process_ends_the_run_in_one_line(data, tmp_path, delay):
    settings = [*SMALL, "--ckpt_path", tmp_path, data]
    process = started(PRETRAIN, *settings, "--epochs", 1000, "--print-freq", 1)
    wait_for(process, "epoch 1 ")
    time.sleep(delay)
    os.kill(children(process.pid)[0], signal.SIGKILL)  # as the kernel does when memory runs out
    assert_one_line(completed(process), "a data loading process was killed", "smaller -j")
    resumed = run_script(PRETRAIN, *settings, "--epochs", len(log(tmp_path)), "--resume", "auto", check=False)
    assert resumed.returncode == 0 and "already finished" in resumed.stdout  # all that was logged was saved


SPAWNED = ["--multiprocessing-distributed"]


@pytest.mark.parametrize(
    "launcher, options, count, killed",
    [
        ([], [], 2, "the run"),
        ([*TORCHRUN, "--nproc-per-node=2"], [], 5, "the run"),
        ([], SPAWNED, 4, "the run"),
        ([], SPAWNED, 4, "the starter"),
    ],
    ids=["alone", "torchrun", "spawned", "spawned, starter"],
)
def test_all_processes_end_with_a_killed_run(data, tmp_path, launcher, options, count, killed):
    """Loading processes, and ranks whose launcher is gone: they would train, and write, beside the resumed run."""
    settings = [*SMALL, *options, "--epochs", 1000, "--print-freq", 1, "--ckpt_path", tmp_path, data]
    process = started(PRETRAIN, *settings, launcher=launcher)
    wait_for(process, "epoch 1 ")
    assert len(alive(process)) >= count
    if killed == "the run":
        process.kill()
        ended(process)
    else:
        (starter,) = filter(children, children(process.pid))
        os.kill(starter, signal.SIGKILL)
        assert_one_line(completed(process), "the process that starts the ranks was killed by SIGKILL")
    if count > 2:  # as on SIGTERM
        assert torch.load(tmp_path / "checkpoint_latest.pth.tar", weights_only=True)["epoch"] >= 1


def test_a_run_in_the_background_outlives_its_shell(data, tmp_path):
    command = [sys.executable, PRETRAIN, *map(str, [*SMALL, "--epochs", 3, "--ckpt_path", tmp_path, data])]
    shell = ["sh", "-c", '"$@" > /dev/null 2>&1 & echo', "sh", *command]
    subprocess.run(shell, cwd=REPOSITORY, env=ENVIRONMENT, check=True)
    deadline, last = time.monotonic() + 60, tmp_path / "checkpoint_0002.pth.tar"
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert last.exists()
