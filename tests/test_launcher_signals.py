"""Signals to a launcher and at any moment of a run; launchers that are killed, ranks that stop."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import (
    EVALUATE,
    FAULTS,
    PRETRAIN,
    PROBE,
    SMALL,
    SMALL_PROBE,
    TORCHRUN,
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

LATEST = "checkpoint_latest.pth.tar"
TWO = [*TORCHRUN, "--nproc-per-node=2"]
ALL_SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    """A data set of 5 steps an epoch, an undisturbed run of two epochs, and a script that changes another."""
    root = tmp_path_factory.mktemp("signals")
    write_folder(root / "data", train=20)
    (root / "changed.py").write_text(
        "import os, runpy, signal, sys\nsys.path.insert(0, os.getcwd())\nchange, *sys.argv = sys.argv[1:]\n"
        "exec(change)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run_script(PRETRAIN, *SMALL, "-j", 0, "--knn", "--epochs", 2, "--ckpt_path", root / "whole", root / "data")
    return root


# At any moment

MOMENTS = {  # a function that is interrupted at its so many-th call, and whether the run has something to save then
    "listing": ("moco.data.folders.list_images", 1, False),
    "building": ("moco.training.run.Run.__init__", 1, True),
    "resuming": ("moco.training.run.Run.resume", 1, True),
    "decoding": ("moco.data.datasets.RetryDataset.__getitem__", 12, True),
    "making views": ("moco.views.training_views", 2, True),
    "in a step": ("moco.training.run.Run.after_step", 2, True),
    "saving": ("moco.training.checkpoint.save", 1, True),
    "saving again": ("moco.training.checkpoint.save", 2, True),
    "logging": ("moco.training.metrics.append_jsonl", 1, True),
    "kNN": ("moco.evaluation.knn.accuracy", 1, True),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", [pytest.param(name, marks=[pytest.mark.slow] * (name != "kNN")) for name in MOMENTS])
def test_a_signal_at_any_moment_costs_no_step(files_of, tmp_path, moment, number):
    name, call, saves = MOMENTS[moment]
    module, _, name = name.partition(".")[2].partition(".")
    owner = ".".join([module, *name.split(".")[:-1]])
    name = name.split(".")[-1]
    change = (
        f"from moco import {module}\noriginal, calls = {owner}.{name}, []\n"
        "def interrupted(*args, **settings):\n    calls.append(1)\n"
        f"    if len(calls) == {call}:\n        os.kill(os.getpid(), {int(number)})\n"
        f"    return original(*args, **settings)\n{owner}.{name} = interrupted"
    )
    settings = [PRETRAIN, *SMALL, "-j", 0, "--knn", "--epochs", 2, "--ckpt_path", tmp_path, files_of / "data"]
    run = run_script(files_of / "changed.py", change, *settings, check=False)
    assert run.returncode == (128 + number if saves else -number) and run.stderr == "", (run.returncode, run.stderr)
    assert not saves or f"stopped by {number.name}" in run.stdout and (tmp_path / LATEST).exists()
    run_script(*settings, "--resume", "auto")
    assert log(tmp_path) == log(files_of / "whole")
    assert same(weights(tmp_path / LATEST), weights(files_of / "whole" / LATEST))


# Launchers


@pytest.mark.slow
def test_a_restart_by_torchrun_equals_an_undisturbed_run(files_of, tmp_path):
    settings = [*SMALL, "-j", 0, "--epochs", 2, files_of / "data", "--ckpt_path"]
    once = (
        f"flag = {str(tmp_path / 'flag')!r}\nfrom moco.run import Run\nafter = Run.after_step\n"
        "def die(self, **values):\n    after(self, **values)\n"
        "    if self.epoch == 1 and os.environ['RANK'] == '1' and not os.path.exists(flag):\n"
        "        open(flag, 'w').close(); os.kill(os.getpid(), 9)\n"
        "Run.after_step = die"
    )
    changed = [files_of / "changed.py", once, PRETRAIN, *settings]
    run_script(*changed, tmp_path / "again", launcher=[*TWO, "--max-restarts=1"])
    assert (tmp_path / "flag").exists()
    run_script(PRETRAIN, *settings, tmp_path / "whole", launcher=TWO)
    assert log(tmp_path / "again") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "again" / LATEST), weights(tmp_path / "whole" / LATEST))


def assert_nothing_left(process, seconds=20):
    process.kill()
    process.wait()
    deadline = time.monotonic() + seconds
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process)
    process.communicate()


SPAWNED = ["--multiprocessing-distributed", "--world-size", 1, "--rank", 0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher, options", [([], SPAWNED), (TWO, [])], ids=["spawned", "torchrun"])
@pytest.mark.parametrize("script, small", [(PRETRAIN, SMALL), (PROBE, SMALL_PROBE)])
def test_a_killed_launcher_leaves_no_process(files_of, tmp_path, launcher, options, script, small):
    """In the middle of the run, while its data do not come."""
    hang = (
        "from moco import datasets\nget = datasets.RetryDataset.__getitem__\n"
        "def hang(self, key):\n    if os.path.exists({!r}):\n        os.read(os.pipe()[0], 1)\n"
        "    return get(self, key)\ndatasets.RetryDataset.__getitem__ = hang"
    ).format(str(tmp_path / "hang"))
    settings = [*small, "-j", 0, "--epochs", 1000, "-p", 1, *options, "--ckpt_path", tmp_path / "run"]
    if launcher:
        process = started(files_of / "changed.py", hang, script, *settings, files_of / "data", launcher=launcher)
    else:  # spawned ranks are not changed: their data are
        process = started(script, *settings, files_of / "data")
    wait_for(process, "epoch 1 ")
    (tmp_path / "hang").touch()
    time.sleep(1)
    assert_nothing_left(process)


@pytest.mark.slow
def test_an_evaluation_ends_with_a_killed_torchrun(files_of, tmp_path):
    run_script(PROBE, *SMALL_PROBE, "-j", 0, "--epochs", 1, "--ckpt_path", tmp_path, files_of / "data")
    slow = (
        "import time\nfrom moco import datasets\nget = datasets.StrictDataset.__getitem__\n"
        "def slowly(self, key):\n    print('evaluating', flush=True); time.sleep(30)\n    return get(self, key)\n"
        "datasets.StrictDataset.__getitem__ = slowly"
    )
    command = [files_of / "changed.py", slow, EVALUATE, "--pretrained", tmp_path / "model_best_random.pth.tar"]
    process = started(*command, "--val", files_of / "data", "-j", 0, "--json", tmp_path / "r.json", launcher=TWO)
    wait_for(process, "evaluating")
    assert_nothing_left(process)


# Ranks that stop


def ranks_of(process):
    """The process ids of torchrun's ranks, by rank."""
    found = {}
    for pid in alive(process):
        words = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
        parent = subprocess.run(["ps", "-o", "ppid=", str(pid)], capture_output=True, text=True).stdout.strip()
        for word in words:
            if word.startswith(b"LOCAL_RANK=") and parent == str(process.pid):
                found[int(word[11:])] = pid
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_a_rank_that_stops_for_a_while_goes_on(files_of, tmp_path):
    settings = [*SMALL, "--epochs", 60, "-p", 1, "--ckpt_path", tmp_path, files_of / "data"]
    process = started(PRETRAIN, *settings, launcher=TWO)
    wait_for(process, "epoch 1 ")
    rank = ranks_of(process)[1]
    os.kill(rank, signal.SIGSTOP)
    time.sleep(60)
    os.kill(rank, signal.SIGCONT)
    code, _, err = ended(process, timeout=240)
    assert code == 0 and "error" not in err and len(log(tmp_path)) == 60


@pytest.mark.slow
def test_a_rank_that_stops_for_longer_ends_the_run(files_of, tmp_path):
    settings = [*SMALL, "-j", 0, "--epochs", 1000, "-p", 1, "--ckpt_path", tmp_path, files_of / "data"]
    process = started(PRETRAIN, *settings, launcher=[*TWO, FAULTS, "impatient"])
    wait_for(process, "epoch 1 ")
    rank = ranks_of(process)[1]
    os.kill(rank, signal.SIGSTOP)
    stopped = completed(process)
    ours, _, _ = stopped.stderr.partition("ChildFailedError")
    assert stopped.returncode == 1 and ours.count("has not answered for 3 s") == 1, stopped.stderr
