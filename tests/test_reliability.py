"""Faults put into real runs: what is promised in the README's table of faults."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, TORCHRUN, run_script, write_folder
from PIL import Image
from test_cli import EVALUATE, PRETRAIN, PROBE, SMALL, log, refused, same, weights

from moco.launch import free_port

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


def started(*options, launcher=(), script=PRETRAIN, **settings):
    command = [sys.executable, *launcher, script, *map(str, [*SMALL, "--epochs", 3, *options])]
    token = uuid.uuid4().hex
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**ENVIRONMENT, "STARTED_BY_TEST": token}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **settings)
    process.token = token.encode()
    return process


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed: {process.stderr.read()}")


def equals(folder, whole):
    return log(folder) == log(whole) and same(weights(folder / LAST), weights(whole / LAST))


def alive(process):
    """The ids of the process, and of all that came from it in whatever session, that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):                            # it ended meanwhile
            if process.token in (folder / "environ").read_bytes():    # empty, once it is a zombie
                found.append(int(folder.name))
    return found


def all_gone(process, seconds=30):
    deadline = time.monotonic() + seconds
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive(process)


@pytest.mark.parametrize("number, multiprocessing", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGUSR1, True),
                                                     (signal.SIGINT, True)])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_the_resumed_run_is_the_undisturbed_one(
        data, whole, tmp_path, number, multiprocessing):
    options = ["--print-freq", 1, "--ckpt_path", tmp_path, *["--multiprocessing-distributed"] * multiprocessing, data]
    process = started(*options)
    wait_for(process, "epoch 2/3 [1/5]")
    os.killpg(process.pid, number)                                    # as terminals, timeout and Slurm do it
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name} after epoch 1" in out and "Traceback" not in err
    assert all_gone(process)
    saved = torch.load(tmp_path / "checkpoint_latest.pth.tar", weights_only=True)
    assert saved["epoch"] == 1 and 1 <= saved["step"] < 5
    resumed = run_script(PRETRAIN, *SMALL, "--epochs", 3, *options, "--resume", "auto")
    assert f"from epoch 1 step {saved['step']}" in resumed.stdout
    assert equals(tmp_path, whole)


def test_a_second_interrupt_stops_at_once(data, tmp_path):
    process = started("--save-steps", 1, "--ckpt_path", tmp_path, data, launcher=["tests/faults.py", "slow in a step"])
    wait_for(process, "dawdling")
    before = (tmp_path / "checkpoint_latest.pth.tar").read_bytes()
    process.send_signal(signal.SIGINT)
    status, caught = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGINT - 1)
    while int(status.read_text().split("SigCgt:")[1].split()[0], 16) & caught:       # until the first was taken note of
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT and "stopped by" not in process.stdout.read()
    assert (tmp_path / "checkpoint_latest.pth.tar").read_bytes() == before


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
        process = started(*options, launcher=launcher)
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


def test_within_an_epoch_the_order_of_the_data_must_be_the_same(data, whole, tmp_path):
    saved = torch.load(whole / LAST, weights_only=True)
    torch.save(saved | {"epoch": 2, "step": 3}, tmp_path / LAST)
    resume = ["--epochs", 9, "--resume", tmp_path / LAST, data]
    assert "--seed 1, this run has 2" in refused(PRETRAIN, *SMALL, "--seed", 2, *resume)
    assert "images a step: 8, this run has 4" in refused(PRETRAIN, *SMALL, "-b", 4, *resume)


def ended(process, timeout=120):
    """(exit code, stdout, stderr) of a process, which must leave none of its own behind."""
    out, err = process.communicate(timeout=timeout)
    assert all_gone(process), "it left processes behind"
    return process.returncode, out, err


def fails_with_one_line(process, *told):
    """The process ends with 1 and one line on stderr, which holds what is told."""
    code, _, err = ended(process)
    assert code == 1 and err.count("\n") == 1 and all(text in err for text in told), err


# What is written

can_mount = pytest.mark.skipif(subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
                               reason="mounting a small file system takes root")


def mounted(options, path, *command):
    """A command line that runs a command with a tmpfs mounted for it alone."""
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(path), *map(str, command)]


@can_mount
def test_a_full_file_system_leaves_the_last_good_checkpoint(data, whole, tmp_path):
    size = (whole / "checkpoint_latest.pth.tar").stat().st_size
    script = f"cp {whole}/checkpoint_latest.pth.tar {tmp_path} && {sys.executable} {PRETRAIN} \"$@\"; code=$?; ls -l {tmp_path}; exit $code"
    run = subprocess.run(mounted(f"size={int(1.5 * size)}", tmp_path, "sh", "-c", script, "sh", *SMALL, "--epochs", 4, "--resume", "auto",
                                 "--ckpt_path", tmp_path, data), cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "could not be written" in run.stderr, run.stderr
    assert "No space left" in run.stderr, run.stderr
    listing = [line.split() for line in run.stdout.splitlines() if line.endswith((".tar", ".partial", ".jsonl"))]
    assert [int(line[4]) for line in listing if line[-1] == "checkpoint_latest.pth.tar"] == [size]
    assert not [line for line in listing if line[-1].endswith(".partial")]


@can_mount
def test_a_read_only_file_system_is_refused_before_anything_is_built(data, tmp_path):
    run = subprocess.run(mounted("ro", tmp_path, sys.executable, PRETRAIN, *SMALL, "--ckpt_path", tmp_path / "run", data),
                         cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "cannot be written to" in run.stderr, run.stderr


@pytest.mark.parametrize("ckpt_path", ["/proc/run", f"{REPOSITORY}/README.md", f"{REPOSITORY}/README.md/run"])
def test_a_folder_that_cannot_be_made_is_refused(data, ckpt_path):
    run = run_script(PRETRAIN, *SMALL, "--ckpt_path", ckpt_path, data, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and f"--ckpt_path {ckpt_path}" in run.stderr, run.stderr


@can_mount
@pytest.mark.parametrize("size", ["8k", "100k"], ids=["for semaphores", "for images"])
def test_a_full_shared_memory_ends_in_one_line(data, tmp_path, size):
    run = subprocess.run(mounted(f"size={size}", "/dev/shm", sys.executable, PRETRAIN, *SMALL, "--ckpt_path", tmp_path, data),
                         cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    said = run.stderr.splitlines()                                    # a half-made iterator of PyTorch may complain after it
    assert run.returncode == 1 and "/dev/shm is full" in said[0] and said[0].startswith(PRETRAIN), run.stderr


# Numbers

def test_weights_that_are_not_finite_are_refused(data, whole, tmp_path):
    saved = torch.load(whole / LAST, weights_only=True)
    saved["state_dict"]["module.encoder_q.fc.weight"][3, 5] = float("nan")
    torch.save(saved, tmp_path / LAST)
    told = "encoder_q.fc.weight"
    assert told in refused(PRETRAIN, *SMALL, "--epochs", 9, "--resume", tmp_path / LAST, data)
    saved["state_dict"]["module.encoder_q.stages.0.conv1.weight"][0, 0, 0, 0] = float("inf")
    torch.save(saved, tmp_path / LAST)
    assert "stages.0.conv1.weight holds" in refused(PROBE, "-a", "resnet10", "-b", 8, "--pretrained", tmp_path / LAST, data)


@pytest.mark.parametrize("print_freq", [1, 1000])
def test_a_loss_that_is_not_finite_stops_the_run_with_a_diagnosis_and_saves_nothing(data, whole, tmp_path, print_freq):
    shutil.copy(whole / "checkpoint_latest.pth.tar", tmp_path)
    before = (tmp_path / "checkpoint_latest.pth.tar").read_bytes()
    fails_with_one_line(
        started("--epochs", 4, "--lr", 1e30, "--print-freq", print_freq, "--save-steps", 3, "--resume", "auto",
                "--ckpt_path", tmp_path, data), "the loss is not finite in epoch 3 step 2", "smaller --lr, for example 1e+29")
    assert (tmp_path / "checkpoint_latest.pth.tar").read_bytes() == before and len(list(tmp_path.glob("*.tar"))) == 1
    told = json.loads((tmp_path / "nonfinite_0003_2.json").read_text())
    assert (told["epoch"], told["step"], told["lr"]) == (3, 2, 1e30)
    assert len(set(told["images"])) == 8 and all(os.path.isfile(path) for path in told["images"])
    assert len(told["largest_weights"]) == 10


def test_a_probe_stops_once_all_its_heads_are_not_finite_and_goes_on_while_one_is(data, tmp_path):
    settings = [PROBE, "-a", "resnet10", "--image-size", 32, "-b", 8, "-j", 0, "--seed", 1, "--epochs", 40, "--ckpt_path", tmp_path, data]
    run = run_script(*settings, "--lr", 1e38, 9e37, check=False)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "a smaller --lr, for example 9e+36" in run.stderr, run.stderr
    run = run_script(*settings, "--lr", 1e38, 0.1)
    best = torch.load(tmp_path / "model_best_random.pth.tar", weights_only=True)
    assert best["state_dict"]["module.fc.weight"].isfinite().all()
    last = torch.load(tmp_path / "checkpoint_robust_random.pth.tar", weights_only=True)
    assert last["epoch"] == 40 and not last["heads"]["0.weight"].isfinite().all()


# Processes

@pytest.mark.parametrize("fault", ["killed at the start", "killed in a step", "killed in saving", "wrong in a step"])
def test_when_one_of_four_ranks_dies_the_others_end_within_30_seconds(data, tmp_path, monkeypatch, fault):
    monkeypatch.setitem(ENVIRONMENT, "KILLED_AT", str(tmp_path / "killed at"))
    process = started("--ckpt_path", tmp_path, data, launcher=[*TORCHRUN, "--nproc-per-node=4", "tests/faults.py", fault])
    code, out, err = ended(process)
    assert code == 1
    if fault.startswith("killed"):
        assert time.time() - float((tmp_path / "killed at").read_text()) < 30
    # Of the ranks only one that met a bug has a traceback; the last is torchrun's own.
    ours, _, _ = err.partition("ChildFailedError")
    assert ours.count("Traceback") == 1 + (fault == "wrong in a step"), err
    if fault == "wrong in a step":
        assert err.index("ValueError: put in by a test") < err.index("another process of this run has ended")
    assert err.count("another process of this run has ended") <= 1


def node(rank, url, tmp_path, data, *, launcher=("tests/faults.py", "impatient")):
    return started("--world-size", 2, "--rank", rank, "--dist-url", url, "--ckpt_path", tmp_path, data, launcher=launcher)


def test_a_master_that_nobody_reaches_is_named_with_its_address(data, tmp_path):
    port = free_port()
    fails_with_one_line(node(1, f"tcp://127.0.0.1:{port}", tmp_path, data), "rank 1 waited 3 s", f"at 127.0.0.1, port {port}")
    fails_with_one_line(node(1, "tcp://no.such.host:1234", tmp_path, data), "at no.such.host, port 1234")


def test_missing_ranks_are_named(data, tmp_path):
    fails_with_one_line(node(0, f"tcp://127.0.0.1:{free_port()}", tmp_path, data), "rank 1 of 2 ranks is missing")


def test_a_port_in_use_is_named_with_several_nodes_and_replaced_with_one(data, tmp_path):
    with socket.create_server(("", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        fails_with_one_line(node(0, url, tmp_path, data), url, "it is taken")
        run_script(PRETRAIN, *SMALL, "--epochs", 1, "--multiprocessing-distributed", "--world-size", 1, "--rank", 0,
                   "--dist-url", url, "--ckpt_path", tmp_path, data)


def children(pid):
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listing.split()]


@pytest.mark.parametrize("delay", [0, 0.02])                  # between batches, and while one is handed over
def test_a_loading_process_that_is_killed_ends_the_run_in_one_line(data, tmp_path, delay):
    process = started("--epochs", 1000, "--print-freq", 1, "--ckpt_path", tmp_path, data)
    wait_for(process, "epoch 2/1000")
    time.sleep(delay)
    os.kill(children(process.pid)[0], signal.SIGKILL)                 # as the kernel does when memory runs out
    fails_with_one_line(process, "a loading process was killed", "smaller -j")
    resumed = run_script(PRETRAIN, *SMALL, "--epochs", len(log(tmp_path)), "--resume", "auto", "--ckpt_path", tmp_path, data, check=False)
    assert "epochs are done" in resumed.stderr                        # all that was logged was saved


@pytest.mark.parametrize("launcher", [[], [*TORCHRUN, "--nproc-per-node=2"]], ids=["alone", "torchrun"])
def test_all_processes_end_with_a_killed_run(data, tmp_path, launcher):
    """Loading processes, and ranks whose launcher is gone: they would train, and write, beside the resumed run."""
    process = started("--epochs", 1000, "--print-freq", 1, "--ckpt_path", tmp_path, data, launcher=launcher)
    wait_for(process, "epoch 2/1000")
    assert len(alive(process)) >= (5 if launcher else 2)
    process.kill()
    ended(process)
    if launcher:                                                      # as on SIGTERM
        assert torch.load(tmp_path / "checkpoint_latest.pth.tar", weights_only=True)["epoch"] >= 1


def test_a_run_in_the_background_outlives_its_shell(data, tmp_path):
    command = [sys.executable, PRETRAIN, *map(str, [*SMALL, "--epochs", 3, "--ckpt_path", tmp_path, data])]
    subprocess.run(["sh", "-c", '"$@" > /dev/null 2>&1 & echo', "sh", *command], cwd=REPOSITORY, env=ENVIRONMENT, check=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (tmp_path / LAST).exists()


# Data

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


def test_bad_images_are_replaced_said_once_counted_and_the_same_with_any_number_of_workers(tmp_path):
    data, bad = with_odd_images(tmp_path)
    records = []
    for workers in (0, 1, 4):
        run = run_script(PRETRAIN, *SMALL, "-j", workers, "--epochs", 3, "--ckpt_path", tmp_path / str(workers), data,
                         launcher=["tests/faults.py", "workers as asked"])
        said = [line for line in run.stderr.splitlines() if "bad image, replaced" in line]
        assert len(said) == 4 and {line.split(": ")[1] for line in said} == bad and len(run.stderr.splitlines()) == 4
        records.append(log(tmp_path / str(workers)))
    assert all(record["bad_images"] >= 3 for record in records[0]) and records[0] == records[1] == records[2]
    assert same(*(weights(tmp_path / workers / LAST) for workers in ("0", "4")))
    # Two ranks find them in halves of each batch, and agree on the sum; a resumed run does not say them again.
    both = run_script(PRETRAIN, *SMALL, "--epochs", 1, "--ckpt_path", tmp_path / "two", data, launcher=[*TORCHRUN, "--nproc-per-node=2"])
    assert log(tmp_path / "two")[0]["bad_images"] == records[0][0]["bad_images"] and both.stderr.count("bad image, replaced") >= 3
    again = run_script(PRETRAIN, *SMALL, "--epochs", 4, "--resume", "auto", "--ckpt_path", tmp_path / "0", data)
    assert "bad image" not in again.stderr and log(tmp_path / "0")[3]["bad_images"] >= 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_bad_images_stop_the_run_with_their_list(tmp_path, ranks):
    data, bad = with_odd_images(tmp_path)
    launcher = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else []
    code, _, err = ended(started("--max-bad-images", 2, "--ckpt_path", tmp_path / "run", data, launcher=launcher))
    (told,) = (line for line in err.splitlines() if "more than --max-bad-images 2" in line)
    assert code == 1 and sum(path in told for path in bad) >= 3 and (tmp_path / "run" / "checkpoint_latest.pth.tar").exists()
    for path in bad:
        shutil.copy(data / "val" / "n01" / "n01_0.JPEG", path)        # mended
    more = run_script(PRETRAIN, *SMALL, "--max-bad-images", 2, "--epochs", 3, "--resume", "auto", "--ckpt_path", tmp_path / "run", data,
                      launcher=launcher)
    assert "epoch 3/3 [5/5]" in more.stdout and "bad image" not in more.stderr


def test_a_probe_replaces_bad_images_too_but_a_test_needs_all(tmp_path):
    data, _ = with_odd_images(tmp_path)
    settings = ["-a", "resnet10", "--image-size", 32, "-b", 8, "-j", 1, "--seed", 1, "--ckpt_path", tmp_path, data]
    run = run_script(PROBE, *settings, "--epochs", 1)
    assert 3 <= run.stderr.count("bad image, replaced") <= 4
    broken = data / "val" / "n02" / "n02_1.JPEG"
    broken.write_bytes(b"")
    for command in ([PROBE, *settings, "--evaluate", "--resume", tmp_path / "model_best_random.pth.tar"],
                    [EVALUATE, "--pretrained", tmp_path / "model_best_random.pth.tar", "--val", data, "--json", tmp_path / "r.json"]):
        run = run_script(*command, check=False)
        told = run.stderr.splitlines()[-1]
        assert run.returncode == 1 and f"error: {broken}: " in told and "counts every image" in told and "Traceback" not in run.stderr


def test_a_run_whose_data_lose_a_file_goes_on_and_one_whose_data_vanish_says_so(tmp_path):
    data = write_folder(tmp_path / "data", train=20)
    process = started("--epochs", 1000, "--print-freq", 1, "--ckpt_path", tmp_path / "run", data)
    wait_for(process, "epoch 1/1000 [5/5]")
    (data / "train" / "n01" / "n01_7.JPEG").unlink()
    wait_for(process, "epoch 4/1000 [5/5]")
    data.rename(tmp_path / "elsewhere")
    code, _, err = ended(process)
    first, *_, last = err.splitlines()
    assert code == 1 and "n01_7.JPEG: FileNotFoundError" in first
    assert "others of its class cannot be read; is the data still there?" in last and "Traceback" not in err
