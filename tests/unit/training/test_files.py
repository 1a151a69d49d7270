"""One writer at a time: of a run's folder, a report, a file; another one is refused or waits, nothing is mixed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from helpers import EVALUATE, PRETRAIN, PROBE, SMALL, SMALL_PROBE, completed, ended, run_script, started, wait_for

from moco.training import files

CONTEXT = multiprocessing.get_context("fork")


def elsewhere(function, *args):
    """A process that calls function(*args)."""
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    return process


# Files


def write_often(path, letter, times):
    for _ in range(times):
        with files.atomic_write(path) as file:
            for _ in range(20):
                file.write(letter * 1000)


def test_two_writers_never_mix_a_file(tmp_path):
    path = tmp_path / "file"
    writers = [elsewhere(write_often, path, letter, 200) for letter in "ab"]
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_text() in ("a" * 20_000, "b" * 20_000)
    assert [writer.exitcode for writer in writers] == [0, 0] and os.listdir(tmp_path) == ["file"]


def write_slowly(path, begun):
    with files.atomic_write(path) as file:
        file.write("slow")
        begun.set()
        time.sleep(1)


def test_an_unfinished_file_stays_while_its_writer_lives(tmp_path):
    begun = CONTEXT.Event()
    slow = elsewhere(write_slowly, tmp_path / "file", begun)
    assert begun.wait(10)
    write_often(tmp_path / "file", "fast", 1)
    assert len(list(tmp_path.glob("*.partial"))) == 1
    slow.join()
    assert slow.exitcode == 0 and (tmp_path / "file").read_text() == "slow"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    begun = CONTEXT.Event()
    slow = elsewhere(write_slowly, tmp_path / "file", begun)
    assert begun.wait(10)
    slow.kill()
    slow.join()
    assert len(list(tmp_path.glob("*.partial"))) == 1
    write_often(tmp_path / "file", "fast", 1)
    assert os.listdir(tmp_path) == ["file"]


# Locks


def hold_until_killed(path, held):
    held.put(files.hold(str(path)))
    time.sleep(100)


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path):
    held, path = CONTEXT.Queue(), tmp_path / ".lock"
    owner = elsewhere(hold_until_killed, path, held)
    assert held.get(timeout=10) == ""
    told = files.hold(str(path))
    assert told.startswith(f"process {owner.pid} on {os.uname().nodename}, since {time.strftime('%Y-')}")
    owner.kill()
    owner.join()
    assert files.hold(str(path)) == ""


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".lock").symlink_to("mine")
    with pytest.raises(OSError):
        files.hold(str(tmp_path / ".lock"))
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("number", sorted(files.NO_LOCKS))
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    leftover = tmp_path / f"file.{'a' * 16}.partial"
    leftover.write_text("another's?")
    assert files.hold(str(tmp_path / ".lock")) == ""
    assert capsys.readouterr().err.count("has no locks") == 1
    write_often(tmp_path / "file", "a", 1)
    assert leftover.exists()  # nothing tells whether its writer has ended


def test_a_folder_written_since_it_was_read_is_refused(tmp_path):
    looked = files.of_folder("--ckpt_path", str(tmp_path))
    (tmp_path / "checkpoint_latest.pth.tar").write_text("of another run, which has ended")
    with pytest.raises(files.UsageError, match="another run wrote here while this one was starting"):
        looked.take()
    (tmp_path / "r.json").write_text("one")
    looked = files.of_file("--json", str(tmp_path / "r.json"))
    (tmp_path / "other-r.json").write_text("of another evaluation")
    looked.take()
    looked = files.of_file("--json", str(tmp_path / "r.json"))
    files.os.replace(tmp_path / "other-r.json", tmp_path / "r.json")
    with pytest.raises(files.UsageError, match=r"--json .*r\.json: another run wrote here"):
        looked.take()


# Scripts


@pytest.fixture
def stopped(tmp_path, shared_data):
    """A function that starts a script, and stops its process once it holds its lock; continued in the end."""
    processes = []

    def start(script, lock, *arguments):
        process = started(script, *arguments)
        processes.append(process)
        deadline = time.monotonic() + 60
        while not Path(lock).exists() or not Path(lock).read_text():
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        return process

    yield start
    for process in processes:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def assert_refused(run, process, option):
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert option in run.stderr and f"another run is writing here (process {process.pid} on " in run.stderr


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused(stopped, shared_data, tmp_path):
    settings = [*SMALL, "-j", 0, "--epochs", 2, "--ckpt_path", tmp_path / "run", shared_data]
    first = stopped(PRETRAIN, tmp_path / "run" / ".lock", *settings)
    for script, options in ((PRETRAIN, settings), (PROBE, [*SMALL_PROBE, *settings[-3:]])):
        second = run_script(script, *options, "--resume", "auto", check=False)
        assert_refused(second, first, f"--ckpt_path {tmp_path / 'run'}")
    assert run_script(PRETRAIN, *settings, "--dry-run").stderr == ""
    first.send_signal(signal.SIGCONT)
    code, _, err = ended(first)
    assert code == 0 and err == ""
    run_script(PROBE, *SMALL_PROBE, "-j", 0, "--epochs", 1, *settings[-3:])  # one after the other


@pytest.mark.slow
def test_a_second_evaluation_of_a_report_is_refused(stopped, shared_data, tmp_path):
    run_script(PROBE, *SMALL_PROBE, "-j", 0, "--epochs", 1, "--ckpt_path", tmp_path, shared_data)
    settings = ["--pretrained", tmp_path / "model_best_random.pth.tar", "--val", shared_data, "-j", 0, "--json"]
    first = stopped(EVALUATE, tmp_path / ".r.json.lock", *settings, tmp_path / "r.json")
    assert_refused(run_script(EVALUATE, *settings, tmp_path / "r.json", check=False), first, "--json")
    run_script(EVALUATE, *settings, tmp_path / "other.json")
    first.send_signal(signal.SIGCONT)
    assert completed(first).returncode == 0


@pytest.mark.slow
def test_a_requeue_while_the_old_run_lives_is_refused(shared_data, tmp_path):
    settings = [*SMALL, "--epochs", 1000, "-p", 1, "--resume", "auto", "--ckpt_path", tmp_path, shared_data]
    spawned = ["--multiprocessing-distributed", "--world-size", 1, "--rank", 0]
    old = started(PRETRAIN, *settings, *spawned)
    wait_for(old, "epoch 1 ")
    refused = run_script(PRETRAIN, *settings, *spawned, check=False)
    assert refused.returncode == 2 and refused.stderr.count("another run is writing here") == 1, refused.stderr
    old.kill()
    ended(old)
    new = started(PRETRAIN, *settings, *spawned)
    wait_for(new, "starting at epoch")
    new.terminate()
    assert ended(new)[0] == 143
