"""Runs that signals and kills stop, at any moment and in every way of launching: they continue as if undisturbed."""

import os
import random
import shutil
import signal
import time

import pytest
import torch
from helpers import (
    FAULTS,
    PRETRAIN,
    PROBE,
    TORCHRUN,
    alive,
    assert_one_line,
    children,
    completed,
    ended,
    log,
    run_script,
    started,
    wait_for,
)

LATEST = "checkpoint_latest.pth.tar"
TWO = [*TORCHRUN, "--nproc-per-node=2"]
SPAWNED = ["--multiprocessing-distributed", "--world-size", 1, "--rank", 0]
MOMENTS = {  # the run has something to save, except at the first
    "listing": False, "building": False, "resuming": True, "item 12": True, "views 2": True, "step 2": True,
    "saving": True, "saving 2": True, "logging": True, "kNN": True,
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_costs_no_step(whole, tmp_path, moment):
    command = whole.command(PRETRAIN, tmp_path, "-j", 0, "--save-steps", 2)
    run = run_script(FAULTS, f"SIGTERM in {moment}", *command, check=False)
    assert run.returncode == (143 if MOMENTS[moment] else -signal.SIGTERM) and run.stderr == "", run.stderr
    if MOMENTS[moment]:
        assert "stopped by SIGTERM" in run.stdout and "continue with --resume auto" in run.stdout
        assert (tmp_path / LATEST).exists()
    whole.assert_continues(PRETRAIN, tmp_path)


@pytest.mark.parametrize("script", [PRETRAIN, PROBE])
def test_a_kill_costs_the_steps_since_the_last_save(whole, tmp_path, script):
    run = run_script(FAULTS, "killed in step 9", *whole.command(script, tmp_path, "--save-steps", 3), check=False)
    assert run.returncode == -signal.SIGKILL
    assert "starting at epoch 1 step 3 " in whole.assert_continues(script, tmp_path).stdout


@pytest.mark.parametrize("options", [[], SPAWNED], ids=["alone", "spawned"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves_within_an_epoch(whole, tmp_path, number, options):
    process = started(*whole.command(PRETRAIN, tmp_path, *options))
    wait_for(process, "epoch 1 [1/5]")
    os.killpg(process.pid, number)  # as terminals, timeout and Slurm do it
    code, out, err = ended(process)
    assert code == 128 + number and f"stopped by {number.name} in epoch 1 after step " in out and err == "", err
    assert 1 <= torch.load(tmp_path / LATEST, weights_only=True)["step"] < 5
    whole.assert_continues(PRETRAIN, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_while_ranks_are_started_leaves_no_process(whole, tmp_path, number):
    process = started(*whole.command(PRETRAIN, tmp_path, *SPAWNED, "--resume", "auto"))
    while len(alive(process)) < 3 and process.poll() is None:  # the program, multiprocessing's tracker, the fork server
        time.sleep(0.01)
    os.killpg(process.pid, number)
    code, out, err = ended(process)
    assert code == 128 + number and "Traceback" not in err, err
    whole.assert_continues(PRETRAIN, tmp_path)


def test_a_second_interrupt_stops_at_once(whole, tmp_path):
    process = started(FAULTS, "hanging in step 3", *whole.command(PRETRAIN, tmp_path, "--save-steps", 1))
    wait_for(process, "hanging")
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # until it was noticed
    process.send_signal(signal.SIGINT)
    code, out, _ = ended(process, timeout=20)
    assert code == -signal.SIGINT and "stopped by" not in out
    whole.assert_continues(PRETRAIN, tmp_path)


@pytest.mark.parametrize("launcher, kills", [([], 12), (TWO, 3)], ids=["one process", "two"])
def test_kills_at_random_moments_cost_nothing_in_the_end(whole, whole_of_two, tmp_path, launcher, kills):
    rng, cut = random.Random(0), tmp_path / "cut"
    command = whole.command(PRETRAIN, cut, "--save-steps", 2, "--resume", "auto")
    killed = 0
    while killed < kills:
        if (cut / "log.jsonl").exists() and len(log(cut)) == 3:
            shutil.rmtree(cut)  # it came to its end; begin another run
        process = started(*command, launcher=launcher)
        wait_for(process, "starting at epoch")
        time.sleep(rng.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    run_script(*command, launcher=launcher, check=False)  # 1 if it was finished already, which is refused or said
    whole.assert_equal(PRETRAIN, cut, whole_of_two if launcher else None)


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal closed", "nohup"])
def test_a_hangup_saves_unless_it_is_ignored(whole, tmp_path, ignored):
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)} if ignored else {}
    process = started(*whole.command(PRETRAIN, tmp_path, *SPAWNED, "--epochs", 1000), **ignore)
    wait_for(process, "epoch 0 [5/5]")
    process.send_signal(signal.SIGHUP)
    if ignored:
        wait_for(process, "epoch 2 ")
        process.send_signal(signal.SIGTERM)
    code, out, err = ended(process)
    assert code == 128 + (signal.SIGTERM if ignored else signal.SIGHUP), err
    assert "continue with --resume auto" in out and err == ""


# Data that do not come


@pytest.mark.parametrize(
    "how, workers, number",
    [("stopped", 1, signal.SIGTERM), ("hanging", 0, signal.SIGINT), ("hanging", 1, signal.SIGUSR1)],
)
def test_a_signal_while_data_do_not_come_saves_and_ends(whole, tmp_path, how, workers, number):
    process = started(FAULTS, f"{how} in item 19", *whole.command(PRETRAIN, tmp_path, "-j", workers))
    wait_for(process, "hanging")
    time.sleep(2)  # until the steps before are done
    process.send_signal(number)
    code, out, err = ended(process)
    assert code == 128 + number and f"stopped by {number.name} in epoch 0 after step" in out and err == "", err
    whole.assert_continues(PRETRAIN, tmp_path)


def test_a_signal_while_an_evaluation_hangs_ends_the_run(whole, tmp_path):
    process = started(FAULTS, "hanging in evaluating", *whole.command(PROBE, tmp_path))
    wait_for(process, "hanging")
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process)
    assert code == 128 + signal.SIGTERM and err == ""
    assert "stopped by SIGTERM in the evaluation after epoch 0; continue" in out
    whole.assert_continues(PROBE, tmp_path)


# Launchers


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_within_the_epoch(whole, whole_of_two, tmp_path, number):
    """The recipe of docs/launching.md: torchrun hands on the signals it is told to handle, and waits for the ranks."""
    handled = [*TWO, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    process = started(*whole.command(PRETRAIN, tmp_path), launcher=handled)
    wait_for(process, "epoch 1 ")
    process.send_signal(number)
    code, out, err = ended(process)
    assert code != 0 and f"stopped by {number.name}" in out, err
    whole.assert_continues(PRETRAIN, tmp_path, launcher=TWO, other=whole_of_two)


def test_a_restart_by_torchrun_equals_an_undisturbed_run(whole, whole_of_two, tmp_path):
    """Rank 1 is killed in the second epoch of the first attempt, and of no other: that begins after it."""
    killed = [FAULTS, "killed in step 8 of rank 1", *whole.command(PRETRAIN, tmp_path, "--save-steps", 1)]
    run = run_script(*killed, launcher=[*TWO, "--max-restarts=3"])
    assert "starting at epoch 1 step " in run.stdout
    whole.assert_equal(PRETRAIN, tmp_path, whole_of_two)


@pytest.mark.parametrize(
    "launcher, options, script",
    [([], [], PRETRAIN), ([], SPAWNED, PRETRAIN), ([], SPAWNED, PROBE), (TWO, [], PRETRAIN), (TWO, [], PROBE)],
)
def test_a_killed_program_leaves_no_process(whole, tmp_path, launcher, options, script):
    """Loading processes, and ranks that would train, and write, beside the resumed run."""
    process = started(*whole.command(script, tmp_path, *options, "--epochs", 1000), launcher=launcher)
    wait_for(process, "epoch 1 ")
    assert len(alive(process)) >= (4 if options or launcher else 2)
    process.kill()
    ended(process)


@pytest.mark.parametrize("victim, signum", [("rank", "KILL"), ("fork server", "KILL"), ("rank", "ABRT")])
def test_a_killed_rank_ends_the_program_in_one_line(whole, tmp_path, victim, signum):
    process = started(*whole.command(PRETRAIN, tmp_path, *SPAWNED, "--epochs", 1000))
    wait_for(process, "epoch 1 ")
    (server,) = filter(children, children(process.pid))
    os.kill(server if victim == "fork server" else children(server)[0], signal.Signals[f"SIG{signum}"])
    memory, own = "if memory ran out, use a smaller batch", "SIGABRT; its own messages are above"
    assert_one_line(completed(process), "process 0 terminated with", own if signum == "ABRT" else memory)
