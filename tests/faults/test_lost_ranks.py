"""Runs of several processes that lose a rank, cannot meet, or were started with something else."""

import os
import signal
import socket
import time

import pytest
from helpers import (
    FAULTS,
    PRETRAIN,
    PROBE,
    TORCHRUN,
    assert_one_line,
    children,
    completed,
    ended,
    free_port,
    run_script,
    started,
    wait_for,
)

TWO = [*TORCHRUN, "--nproc-per-node=2"]


@pytest.mark.parametrize("fault", ["killed at the start", "killed in step 3", "killed in replacing", "a bug in step 3"])
def test_when_a_rank_of_four_is_lost_the_others_end_in_30_s(whole, tmp_path, fault):
    rank = 0 if fault == "killed in replacing" else 2  # rank 0 alone saves
    launcher, stamp = [*TORCHRUN, "--nproc-per-node=4"], tmp_path / "killed at"
    command = whole.command(PRETRAIN, tmp_path / "run")
    process = started(FAULTS, f"{fault} of rank {rank}", *command, launcher=launcher, env={"KILLED_AT": str(stamp)})
    code, _, err = ended(process)
    assert code == 1
    if fault.startswith("killed"):
        assert time.time() - float(stamp.read_text()) < 30
    # Of the ranks only one that met a bug has a traceback; the last is torchrun's own.
    ours, _, _ = err.partition("ChildFailedError")
    assert ours.count("Traceback") == 1 + ours.count("ValueError: put in by a test"), err
    assert ("put in by a test" in ours) == (fault == "a bug in step 3")
    assert err.count("another process of this run has ended") <= 1


def test_trouble_with_the_data_of_one_rank_saves_the_steps_of_both(whole, whole_of_two, tmp_path):
    fault = "data gone in item 9 of rank 1"  # a step has four for each
    run = run_script(FAULTS, fault, *whole.command(PRETRAIN, tmp_path, "-j", 0), launcher=TWO, check=False)
    assert run.returncode == 1 and run.stderr.count("error: data are gone") == 1, run.stderr
    again = whole.assert_continues(PRETRAIN, tmp_path, launcher=TWO, other=whole_of_two)
    assert "starting at epoch 0 step 2 " in again.stdout


def test_a_rank_that_stays_stopped_ends_the_run(whole, tmp_path):
    command = whole.command(PRETRAIN, tmp_path, "-j", 0, "--epochs", 1000)
    process = started(FAULTS, "impatient", *command, launcher=TWO)
    wait_for(process, "epoch 1 ")
    os.kill(max(children(process.pid)), signal.SIGSTOP)
    stopped = completed(process)
    ours, _, _ = stopped.stderr.partition("ChildFailedError")
    assert stopped.returncode == 1 and ours.count("another process of this run has ended or does not answer") == 1


# Ranks that do not meet


def test_a_node_that_is_missing_or_cannot_be_reached_ends_the_other(whole, tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"
    for rank in (0, 1):  # each waits three seconds for the other
        command = whole.command(PRETRAIN, tmp_path, "--world-size", 2, "--rank", rank, "--dist-url", url)
        run = run_script(FAULTS, "impatient", *command, check=False)
        assert run.returncode == 1 and f"rank {rank} of 2 could not join the others at {url}" in run.stderr, run.stderr


def test_a_single_node_needs_no_port(whole, tmp_path):
    with socket.create_server(("", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        run_script(*whole.command(PRETRAIN, tmp_path, "--multiprocessing-distributed", "--dist-url", url))


def test_an_interface_that_is_not_there_is_one_line(whole, tmp_path):
    command = whole.command(PRETRAIN, tmp_path, "--multiprocessing-distributed")
    result = run_script(*command, env={"GLOO_SOCKET_IFNAME": "nowhere0"}, check=False)
    assert_one_line(result, "Unable to find address for: nowhere0", "GLOO_SOCKET_IFNAME")


# Ranks that differ


def start_two(*commands):
    """(exit code, stderr) of two processes of one run, by RANK and WORLD_SIZE."""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [started(*own, env={**variables, "RANK": str(rank)}) for rank, own in enumerate(commands)]
    return [(code, err) for code, _, err in map(ended, processes)]


@pytest.mark.parametrize(
    "script, change, message",
    [
        (PRETRAIN, ["--lr", 0.06], "--lr is 0.03 on rank 0"),
        (PRETRAIN, ["--seed", 2], "--seed is 1 on rank 0"),
        (PROBE, ["-b", 4], "the images per step is 16 on rank 0"),
    ],
)
def test_ranks_with_other_options_are_refused(whole, tmp_path, script, change, message):
    for code, err in start_two(whole.command(script, tmp_path), whole.command(script, tmp_path, *change)):
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("*.pth.tar"))


def test_ranks_with_other_checkpoints_are_refused(whole, tmp_path):
    run_script(*whole.command(PRETRAIN, tmp_path / "run", "--epochs", 1, "--batch-size", 16))  # eight of each rank
    resumed = whole.command(PRETRAIN, tmp_path / "run", "--resume", "auto")
    for code, err in start_two(resumed, whole.command(PRETRAIN, tmp_path / "new")):
        assert code == 2 and "the checkpoint of --resume is" in err, err
