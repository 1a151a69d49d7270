"""Faults put into runs of one process: signals, kills, disks, numbers and images, as docs/reliability.md lists them."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ENVIRONMENT,
    EVALUATE,
    FAULTS,
    PRETRAIN,
    PROBE,
    REPOSITORY,
    SMALL,
    SMALL_PROBE,
    TORCHRUN,
    assert_one_line,
    completed,
    log,
    refused,
    run_script,
    same,
    started,
    wait_for,
    weights,
    write_folder,
)
from PIL import Image

LAST, LATEST = "checkpoint_0002.pth.tar", "checkpoint_latest.pth.tar"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("reliability") / "data", train=20)  # 5 steps of 8 images per epoch


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of three epochs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run_script(PRETRAIN, *SMALL, "--epochs", 3, "--ckpt_path", folder, data)
    return folder


def assert_equal_runs(one, other):
    assert log(one) == log(other) and same(weights(one / LAST), weights(other / LAST))


# Signals and kills


@pytest.mark.parametrize(
    "fault, options, code", [("SIGTERM in step 8", [], 143), ("killed after step 9", ["--save-steps", 3], -9)]
)
def test_stopped_within_an_epoch_and_resumed_equals_whole(data, whole, tmp_path, fault, options, code):
    settings = [PRETRAIN, *SMALL, *options, "--epochs", 3, "--ckpt_path", tmp_path, data]
    run = run_script(FAULTS, fault, *settings, check=False)
    assert run.returncode == code and run.stderr == "", run.stderr
    if code > 0:
        assert "stopped by SIGTERM in epoch 1 after step 3, saved; continue with --resume auto" in run.stdout
    saved = torch.load(tmp_path / LATEST, weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 3)
    again = run_script(*settings, "--resume", "auto")
    assert "starting at epoch 1 step 3 " in again.stdout
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize(
    "number, multiprocessing",
    [
        (signal.SIGTERM, False),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_all_processes_saves_within_an_epoch(data, whole, tmp_path, number, multiprocessing):
    options = ["--print-freq", 1, "--ckpt_path", tmp_path, *["--multiprocessing-distributed"] * multiprocessing, data]
    process = started(PRETRAIN, *SMALL, "--epochs", 3, *options)
    wait_for(process, "epoch 1 [1/5]")
    os.killpg(process.pid, number)  # as terminals, timeout and Slurm do it
    stopped = completed(process)
    assert stopped.returncode == 128 + number, stopped.stderr
    assert f"stopped by {number.name} in epoch 1 after step " in stopped.stdout and "Traceback" not in stopped.stderr
    saved = torch.load(tmp_path / LATEST, weights_only=True)
    assert saved["epoch"] == 1 and 1 <= saved["step"] < 5
    resumed = run_script(PRETRAIN, *SMALL, "--epochs", 3, *options, "--resume", "auto")
    assert f"starting at epoch 1 step {saved['step']} " in resumed.stdout
    assert_equal_runs(tmp_path, whole)


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(data, tmp_path):
    settings = [*SMALL, "--save-steps", 1, "--ckpt_path", tmp_path, data]
    process = started(PRETRAIN, *settings, launcher=[FAULTS, "slow in a step"])
    wait_for(process, "pausing")
    before = (tmp_path / LATEST).read_bytes()
    process.send_signal(signal.SIGINT)
    status, caught = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGINT - 1)
    while int(status.read_text().split("SigCgt:")[1].split()[0], 16) & caught:  # until the first was noticed
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stopped = completed(process, timeout=20)
    assert stopped.returncode == -signal.SIGINT and "stopped by" not in stopped.stdout
    assert (tmp_path / LATEST).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(1, 20), (2, 4)])
def test_killed_at_random_moments_and_resumed_equals_whole(data, whole, tmp_path, processes, kills):
    """SIGKILL to all processes, somewhere between the start and a few steps later."""
    launcher = [*TORCHRUN, "--nproc-per-node=2"] if processes == 2 else []
    rng, cut = random.Random(0), tmp_path / "cut"
    settings = [*SMALL, "--epochs", 3, "--print-freq", 1, data]
    options = [*settings, "--save-steps", 2, "--resume", "auto", "--ckpt_path", cut]
    killed = 0
    while killed < kills:
        if (cut / LAST).exists():  # it came to its end; begin another run
            shutil.rmtree(cut)
        process = started(PRETRAIN, *options, launcher=launcher)
        wait_for(process, "starting at epoch")
        time.sleep(rng.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    if not (cut / LAST).exists():
        run_script(PRETRAIN, *options, launcher=launcher)
    if launcher:
        whole = tmp_path / "whole"
        run_script(PRETRAIN, *settings, "--ckpt_path", whole, launcher=launcher)
    assert_equal_runs(cut, whole)


# What is written


def test_a_full_disk_leaves_the_last_good_checkpoint(data, whole, tmp_path):
    """The kernel refuses to let any file grow beyond half a checkpoint, as a full disk or a quota does."""
    shutil.copy(whole / LATEST, tmp_path)
    before = (tmp_path / LATEST).read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    settings = [*SMALL, "--epochs", 4, "--resume", "auto", "--ckpt_path", tmp_path, data]
    assert_one_line(completed(started(PRETRAIN, *settings, preexec_fn=limit)), "could not be written")
    assert (tmp_path / LATEST).read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


can_mount = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="mounting a small file system takes root",
)


def run_mounted(options, path, *command):
    """Run a command with a tmpfs mounted for it alone."""
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", script, str(path), *map(str, command)]
    return subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@can_mount
def test_a_full_file_system_leaves_the_last_good_checkpoint(data, whole, tmp_path):
    size = (whole / LATEST).stat().st_size
    run = f'{sys.executable} {PRETRAIN} "$@"; code=$?; ls -l {tmp_path}; exit $code'
    settings = [*SMALL, "--epochs", 4, "--resume", "auto", "--ckpt_path", tmp_path, data]
    script = ["sh", "-c", f"cp {whole / LATEST} {tmp_path} && {run}", "sh", *settings]
    result = run_mounted(f"size={int(1.5 * size)}", tmp_path, *script)
    assert_one_line(result, "could not be written", "No space left")
    listing = [line.split() for line in result.stdout.splitlines() if line.endswith((".tar", ".partial", ".jsonl"))]
    assert [int(line[4]) for line in listing if line[-1] == LATEST] == [size]
    assert not [line for line in listing if line[-1].endswith(".partial")]


@pytest.mark.slow
@can_mount
def test_a_read_only_file_system_is_refused_at_the_start(data, tmp_path):
    command = [sys.executable, PRETRAIN, *SMALL, "--ckpt_path", tmp_path / "run", data]
    run = run_mounted("ro", tmp_path, *command)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "cannot be written to" in run.stderr, run.stderr


@pytest.mark.parametrize("ckpt_path", ["/proc/run", f"{REPOSITORY}/README.md", f"{REPOSITORY}/README.md/run"])
def test_a_folder_that_cannot_be_created_is_refused(data, ckpt_path):
    run = run_script(PRETRAIN, *SMALL, "--ckpt_path", ckpt_path, data, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and f"--ckpt_path {ckpt_path}" in run.stderr, run.stderr


@pytest.mark.slow
@can_mount
@pytest.mark.parametrize(
    "size, message",
    [("8k", "on /dev/shm or on the disk"), ("100k", "/dev/shm is full")],
    ids=["for semaphores", "for images"],
)
def test_a_full_shared_memory_ends_in_one_line(data, tmp_path, size, message):
    command = [sys.executable, PRETRAIN, *SMALL, "--ckpt_path", tmp_path, data]
    run = run_mounted(f"size={size}", "/dev/shm", *command)
    first, *_ = run.stderr.splitlines()  # a half-made iterator of PyTorch may complain after it
    assert run.returncode == 1 and message in first and first.startswith(PRETRAIN), run.stderr


# Numbers


def test_weights_that_are_not_finite_are_refused(data, whole, tmp_path):
    saved = torch.load(whole / LAST, weights_only=True)
    saved["state_dict"]["module.encoder_q.fc.weight"][3, 5] = float("nan")
    torch.save(saved, tmp_path / LAST)
    line = refused(PRETRAIN, *SMALL, "--epochs", 9, "--resume", tmp_path / LAST, data)
    assert "1 of its tensors, encoder_q.fc.weight the first, hold infinite values or NaN" in line


@pytest.mark.parametrize("print_freq", [1, 1000])
def test_a_loss_that_is_not_finite_stops_with_a_diagnosis(data, whole, tmp_path, print_freq):
    shutil.copy(whole / LATEST, tmp_path)
    before = (tmp_path / LATEST).read_bytes()
    options = ["--epochs", 4, "--lr", 1e30, "--print-freq", print_freq, "--save-steps", 3, "--resume", "auto"]
    run = run_script(PRETRAIN, *SMALL, *options, "--ckpt_path", tmp_path, data, check=False)
    assert_one_line(run, "the loss is not finite in epoch 3 step 2", "smaller --lr, for example 1e+29")
    assert (tmp_path / LATEST).read_bytes() == before and len(list(tmp_path.glob("*.tar"))) == 1
    diagnosis = json.loads((tmp_path / "nonfinite_0003_2.json").read_text())
    assert (diagnosis["epoch"], diagnosis["step"], diagnosis["lr"]) == (3, 2, 1e30)
    assert len(set(diagnosis["images"])) == 8 and all(os.path.isfile(path) for path in diagnosis["images"])
    assert len(diagnosis["largest_weights"]) == 10


# Images


def with_odd_images(folder):
    """A data set with every kind of image that has been met, good and bad; the names of the bad ones."""
    root = write_folder(folder / "data", train=20)
    n01, n02 = root / "train" / "n01", root / "train" / "n02"
    photo = (n01 / "n01_0.JPEG").read_bytes()
    Image.new("CMYK", (40, 40), (9, 99, 199, 0)).save(n01 / "n01_1.JPEG", "JPEG")
    Image.new("I;16", (40, 40), 40_000).save(n01 / "n01_2.JPEG", "PNG")
    Image.new("RGB", (1, 1)).save(n01 / "n01_3.JPEG", "JPEG")
    bad = {n01 / "n01_4.JPEG": photo[:-300], n01 / "n01_5.JPEG": b"", n02 / "n02_6.JPEG": b"<html>404</html>"}
    for path, content in bad.items():
        path.write_bytes(content)
    Image.new("1", (20_000, 20_000)).save(n02 / "n02_7.JPEG", "PNG")  # 50 kB
    return root, {*map(str, bad), str(n02 / "n02_7.JPEG")}


UNREADABLE = "unreadable image, replaced by another of its class: "


def test_bad_images_are_replaced_reported_once_and_counted(tmp_path):
    data, bad = with_odd_images(tmp_path)
    for workers in (0, 2):
        settings = [*SMALL, "-j", workers, "--epochs", 3, "--ckpt_path", tmp_path / str(workers), data]
        run = run_script(FAULTS, "workers as asked", PRETRAIN, *settings)
        lines = run.stderr.splitlines()
        assert len(lines) == 4 and all(line.startswith(UNREADABLE) for line in lines)
        assert {line.split(": ")[1] for line in lines} == bad
    assert all(record["bad_images"] >= 3 for record in log(tmp_path / "0"))
    assert_equal_runs(tmp_path / "0", tmp_path / "2")
    # A resumed run does not report them again.
    again = run_script(PRETRAIN, *SMALL, "--epochs", 4, "--resume", "auto", "--ckpt_path", tmp_path / "0", data)
    assert again.stderr == "" and log(tmp_path / "0")[3]["bad_images"] >= 3


@pytest.mark.slow
def test_bad_images_are_the_same_with_more_processes(tmp_path):
    data, bad = with_odd_images(tmp_path)
    for workers in (0, 4):
        settings = [*SMALL, "-j", workers, "--epochs", 3, "--ckpt_path", tmp_path / str(workers), data]
        run_script(FAULTS, "workers as asked", PRETRAIN, *settings)
    assert_equal_runs(tmp_path / "0", tmp_path / "4")
    # Two ranks find them in halves of each batch, and agree on the sum.
    settings = [*SMALL, "--epochs", 1, "--ckpt_path", tmp_path / "two", data]
    both = run_script(PRETRAIN, *settings, launcher=[*TORCHRUN, "--nproc-per-node=2"])
    assert log(tmp_path / "two")[0]["bad_images"] == log(tmp_path / "0")[0]["bad_images"]
    assert both.stderr.count(UNREADABLE) >= 3


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_bad_images_stop_the_run_with_their_list(tmp_path, ranks):
    data, bad = with_odd_images(tmp_path)
    launcher = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else []
    settings = [*SMALL, "--epochs", 3, "--max-bad-images", 2, "--ckpt_path", tmp_path / "run", data]
    run = run_script(PRETRAIN, *settings, launcher=launcher, check=False)
    (line,) = (line for line in run.stderr.splitlines() if "more than --max-bad-images 2" in line)
    assert run.returncode == 1 and sum(path in line for path in bad) >= 3
    assert (tmp_path / "run" / LATEST).exists()
    for path in bad:
        shutil.copy(data / "val" / "n01" / "n01_0.JPEG", path)  # repaired
    more = run_script(PRETRAIN, *settings, "--resume", "auto", launcher=launcher)
    assert "epoch 2 [5/5]" in more.stdout and "unreadable" not in more.stderr


def test_a_probe_replaces_bad_images_but_a_test_needs_all(tmp_path):
    data, _ = with_odd_images(tmp_path)
    settings = [*SMALL_PROBE, "--ckpt_path", tmp_path, data]
    run = run_script(PROBE, *settings, "--epochs", 1)
    assert 3 <= run.stderr.count(UNREADABLE) <= 4
    assert log(tmp_path)[0]["bad_images"] == run.stderr.count(UNREADABLE)
    broken, linear = data / "val" / "n02" / "n02_1.JPEG", tmp_path / "model_best_random.pth.tar"
    broken.write_bytes(b"")
    for command in (
        [PROBE, *settings, "--evaluate", "--resume", linear],
        [EVALUATE, "--pretrained", linear, "--val", data, "-j", 1, "--json", tmp_path / "r.json"],
    ):
        run = run_script(*command, check=False)
        line = run.stderr.splitlines()[-1]
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert f"error: {broken}: " in line and "counts every image" in line


@pytest.mark.slow
def test_data_that_lose_a_file_or_vanish_during_a_run(tmp_path):
    data = write_folder(tmp_path / "data", train=20)
    settings = [*SMALL, "--epochs", 1000, "--print-freq", 1, "--ckpt_path", tmp_path / "run", data]
    process = started(PRETRAIN, *settings)
    wait_for(process, "epoch 0 [5/5]")
    (data / "train" / "n01" / "n01_7.JPEG").unlink()
    wait_for(process, "epoch 3 [5/5]")
    data.rename(tmp_path / "elsewhere")
    run = completed(process)
    first, *_, last = run.stderr.splitlines()
    assert run.returncode == 1 and "n01_7.JPEG: FileNotFoundError" in first
    assert "others of its class cannot be read; is the data still there?" in last and "Traceback" not in run.stderr
