"""Streams, disks, shared memory and data that fail: a run ends in one line, and what was finished is saved."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import (
    ENVIRONMENT,
    EVALUATE,
    FAULTS,
    PRETRAIN,
    PROBE,
    REPOSITORY,
    SMALL,
    assert_one_line,
    children,
    completed,
    run_script,
    started,
    wait_for,
    write_folder,
)

SCRIPTS = (PRETRAIN, PROBE, EVALUATE)
LATEST = "checkpoint_latest.pth.tar"


# Streams


@pytest.mark.parametrize("kind", ["stdout cannot encode", "stderr cannot encode", "both are closed", "no home"])
def test_an_evaluation_ends_well_whatever_its_streams(whole, tmp_path, kind):
    run = run_script(FAULTS, kind, *whole.evaluation(tmp_path))
    assert "Traceback" not in run.stderr and (tmp_path / "r.json").exists(), run.stderr
    if kind == "stdout cannot encode":
        assert "| \\u2013 | \\u2013 |" in run.stdout and "val: 6 images" in run.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_whose_output_is_not_read_ends_silently(whole, tmp_path, script):
    """Run a script into a pipe whose reader has ended already, like `… | head -1`."""
    command = whole.command(script, tmp_path, "--dry-run") if script != EVALUATE else whole.evaluation(tmp_path)
    run = run_script(FAULTS, "unread stdout", *command, check=False)
    assert run.returncode == 128 + signal.SIGPIPE and "error" not in run.stderr.lower(), run.stderr


def test_a_run_whose_reader_ends_saves_its_steps(whole, tmp_path):
    run = run_script(FAULTS, "unread in report 3", *whole.command(PRETRAIN, tmp_path, "-j", 0), check=False)
    assert run.returncode == 128 + signal.SIGPIPE and run.stderr == ""
    assert "starting at epoch 0 step 3 " in whole.assert_continues(PRETRAIN, tmp_path).stdout


def test_a_full_device_as_stdout_ends_in_one_line():
    run = run_script(FAULTS, "stdout is full", EVALUATE, "--list-released", check=False)
    assert_one_line(run, "No space left on device")


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_pytorch_is_imported_is_silent(tmp_path, script):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(9)")
    command = [sys.executable, str(REPOSITORY / script)]
    run = subprocess.run(command, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == -signal.SIGINT and run.stderr == ""


def test_ctrl_c_later_ends_with_130_and_one_line():
    run = run_script(FAULTS, "SIGINT in options", EVALUATE, "--list-released", check=False)
    assert run.returncode == 130 and "interrupted; run the same command again" in run.stderr


# Disks and shared memory


def test_a_full_disk_leaves_the_last_good_checkpoint(whole, tmp_path):
    """The kernel refuses to let any file grow beyond half a checkpoint, as a full disk or a quota does."""
    shutil.copy(whole.folder(PRETRAIN) / LATEST, tmp_path)
    before = (tmp_path / LATEST).read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    command = whole.command(PRETRAIN, tmp_path, "--epochs", 4, "--resume", "auto")
    assert_one_line(completed(started(*command, preexec_fn=limit)), LATEST)
    assert (tmp_path / LATEST).read_bytes() == before and not list(tmp_path.glob("*.partial"))


can_mount = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="mounting a small file system takes root",
)


def run_mounted(options, path, *command):
    """Run a script with a tmpfs mounted for it alone."""
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", script, str(path), sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@can_mount
@pytest.mark.parametrize("options", ["size=8k", "size=100k", "ro"])
def test_shared_memory_that_is_full_or_read_only_ends_in_one_line(whole, tmp_path, options):
    run = run_mounted(options, "/dev/shm", *whole.command(PRETRAIN, tmp_path))
    (line,) = [line for line in run.stderr.splitlines() if "error: " in line and line.startswith(PRETRAIN)]
    assert run.returncode == 1 and "continue with --resume auto" in line, run.stderr


@pytest.mark.parametrize("script", [PRETRAIN, EVALUATE])
@pytest.mark.parametrize("kind, told", [("no locks", "no locks: see that"), ("no flushing", "cannot flush files")])
def test_a_file_system_that_cannot_lock_or_flush_is_named_once(whole, tmp_path, script, kind, told):
    command = whole.command(script, tmp_path) if script == PRETRAIN else whole.evaluation(tmp_path)
    assert run_script(FAULTS, kind, *command).stderr.count(told) == 1


@pytest.mark.parametrize("script", [PRETRAIN, EVALUATE])
def test_a_disk_that_fails_ends_in_one_line_and_leaves_no_file(whole, tmp_path, script):
    command = whole.command(script, tmp_path) if script == PRETRAIN else whole.evaluation(tmp_path)
    run = run_script(FAULTS, "a failing disk", *command, check=False)
    (line,) = [line for line in run.stderr.splitlines() if "error: " in line]
    assert run.returncode == 1 and "Input/output error" in line and not list(tmp_path.glob("[!.]*")), run.stderr


@pytest.mark.parametrize("files", [40, 15])  # loading processes for 40
def test_few_open_files_are_enough(whole, tmp_path, files):
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    run = completed(started(*whole.command(PRETRAIN, tmp_path), preexec_fn=limit))
    assert run.returncode == 0 and run.stderr == ""
    whole.assert_equal(PRETRAIN, tmp_path)


@can_mount
def test_sigterm_ends_an_evaluation_that_is_the_first_process_of_a_container(whole, tmp_path):
    """The kernel ignores signals to process 1 that it does not handle."""
    words = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, FAULTS, "hanging in test item"]
    command = [*words, *map(str, whole.evaluation(tmp_path))]
    with subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True) as process:
        wait_for(process, "hanging")
        os.kill(children(process.pid)[0], signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


# Data


@pytest.mark.parametrize("script", [PRETRAIN, PROBE])
@pytest.mark.parametrize(
    "trouble, told", [("data gone", "data are gone"), ("stale files", "Stale"), ("no memory", "memory")]
)
def test_trouble_with_data_saves_the_finished_steps(whole, tmp_path, script, trouble, told):
    run = run_script(FAULTS, f"{trouble} in item 19", *whole.command(script, tmp_path, "-j", 0), check=False)
    assert_one_line(run, told)
    assert "starting at epoch 0 step 2 " in whole.assert_continues(script, tmp_path).stdout


@pytest.mark.parametrize(
    "trouble, told",
    [("data gone in item", ["error: data are gone"]), ("killed in item", ["process has ended"]),
     ("SIGSEGV in decoding", ["process has ended", "reading", ".JPEG"])],
)  # fmt: skip
def test_trouble_of_a_loading_process_costs_no_finished_step(whole, tmp_path, trouble, told):
    run = run_script(FAULTS, f"{trouble} 25", *whole.command(PRETRAIN, tmp_path), check=False)
    *aside, line = run.stderr.splitlines()  # PyTorch's "ERROR: Unexpected segmentation fault encountered in worker."
    assert run.returncode == 1 and all(text in line for text in told) and len(aside) == ("SIGSEGV" in trouble)
    whole.assert_continues(PRETRAIN, tmp_path)


def test_an_image_that_crashes_its_decoder_in_an_evaluation_is_named(whole, tmp_path):
    run = run_script(FAULTS, "SIGSEGV in decoding 3", *whole.evaluation(tmp_path), "-j", 1, check=False)
    assert run.returncode == 1 and "reading" in run.stderr and "val/n01/n01_2.JPEG" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "r.json").exists()


def test_trouble_in_the_evaluation_costs_no_epoch(whole, tmp_path):
    """The resumed run begins with the evaluation; before it, 40 images were read to train."""
    run = run_script(FAULTS, "data gone in test item 43", *whole.command(PROBE, tmp_path, "-j", 0), check=False)
    assert_one_line(run, "data are gone")
    assert "starting at epoch 0 step 5 " in whole.assert_continues(PROBE, tmp_path).stdout


def test_data_that_lose_a_file_or_vanish_during_a_run(tmp_path):
    data = write_folder(tmp_path / "data", train=20)
    process = started(PRETRAIN, *SMALL, "--epochs", 1000, "-p", 1, "--ckpt_path", tmp_path / "run", data)
    wait_for(process, "epoch 0 [5/5]")
    (data / "train" / "n01" / "n01_7.JPEG").unlink()
    wait_for(process, "epoch 3 [5/5]")
    data.rename(tmp_path / "elsewhere")
    run = completed(process)
    first, *_, last = run.stderr.splitlines()
    assert run.returncode == 1 and "n01_7.JPEG: FileNotFoundError" in first
    assert "others of its class cannot be read; is the data still there?" in last and "Traceback" not in run.stderr


@pytest.mark.parametrize("script", [PRETRAIN, PROBE])
def test_a_finished_run_answers_so_and_changes_nothing(whole, script):
    """A job script can be run again until it is done."""
    folder = whole.folder(script)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    for more in ([], ["--dry-run"]):
        again = run_script(*whole.command(script, folder, "--resume", "auto", *more))
        assert again.stderr == "" and again.stdout.count("\n") == 1 and "already finished" in again.stdout
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"} == before
