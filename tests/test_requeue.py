"""A job script can be run again until it is done: what is finished says so, exits with 0, and changes nothing."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import (
    ENVIRONMENT,
    PRETRAIN,
    PROBE,
    REPOSITORY,
    SMALL,
    SMALL_PROBE,
    TORCHRUN,
    log,
    refused,
    run_script,
    started,
    wait_for,
)


def state_of(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


@pytest.mark.parametrize("script, options", [(PRETRAIN, SMALL), (PROBE, SMALL_PROBE)])
def test_a_finished_run_answers_so_and_changes_nothing(shared_data, tmp_path, script, options):
    settings = [*options, "-j", 0, "--epochs", 1, "--ckpt_path", tmp_path]
    run_script(script, *settings, "--resume", "auto", shared_data)
    before = state_of(tmp_path)
    for more in ([], ["--dry-run"]):
        again = run_script(script, *settings, "--resume", "auto", *more, shared_data, check=False)
        assert (again.returncode, again.stderr) == (0, "") and again.stdout.count("\n") == 1
        assert "already finished (1 epochs)" in again.stdout and state_of(tmp_path) == before
    (last,) = (name for name in before if name.startswith("checkpoint_") and "latest" not in name)
    assert "already finished" in refused(script, *settings, "--resume", tmp_path / last, shared_data)


@pytest.mark.slow
def test_torchrun_ends_a_finished_run_with_0(shared_data, tmp_path):
    command = [*TORCHRUN, "--nproc-per-node=2", PRETRAIN, *SMALL, "-j", 0, "--epochs", 1, "--resume", "auto"]
    for times in (0, 1):
        run = subprocess.run(
            [sys.executable, *map(str, command), "--ckpt_path", tmp_path, shared_data],
            cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0 and run.stdout.count("already finished") == times, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_within_the_epoch(data, tmp_path, signum):
    """The recipe of docs/reproduce.md: torchrun hands on the signals it is told to handle, and waits for the ranks."""
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    settings = [*SMALL, "--print-freq", 1, "--epochs", 1000, "--ckpt_path", tmp_path, data]
    process = started(*TORCHRUN, "--nproc-per-node=2", handled, PRETRAIN, *settings)
    wait_for(process, "epoch 1 ")
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and f"stopped by {signal.Signals(signum).name}" in out, err
    run_script(PRETRAIN, *settings, "--resume", "auto", "--epochs", 1 + len(log(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal closed", "nohup"])
def test_a_hangup_saves_unless_it_is_ignored(data, tmp_path, ignored):
    options = [*SMALL, "--print-freq", 1, "--epochs", 1000, "--ckpt_path", tmp_path]
    launcher = ["--multiprocessing-distributed", "--world-size", 1, "--rank", 0]
    for more in ([], launcher):
        command = [sys.executable, "-u", REPOSITORY / PRETRAIN, *options, *more, "--resume", "auto", data]
        process = subprocess.Popen(
            ["nohup"] * ignored + list(map(str, command)),
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(process, "epoch ")
        os.kill(process.pid, signal.SIGHUP)
        if ignored:
            wait_for(process, "epoch ")
            os.kill(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + (signal.SIGTERM if ignored else signal.SIGHUP), err
        assert "saved; continue with --resume auto" in out and "resource_tracker" not in err
