"""preprocess/ killed, interrupted and on a full disk: one line, no process left, and a second run that completes it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ENVIRONMENT, REPOSITORY, alive, children, run_script, started, write_photo
from preprocessing import SHAPES, subset_command, texture_command, tree

pytestmark = pytest.mark.slow
SHAPES_OPTIONS = ("--train", 10, "--test", 10, "--cell", 10, "--workers", 2)


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def killed_after(count, folder, *command):
    """Kill a script with all its workers once it has written so many images."""
    process = started(*command)
    wait_until(lambda: len(list(folder.rglob("*.png"))) >= count)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not alive(process))


def test_killed_and_started_again_textures_equal_an_uninterrupted_run(imagenet):
    for number in range(3, 40):
        write_photo(imagenet / "train" / "n02" / f"n02_{number}.JPEG", seed=number)
    run_script(*texture_command(imagenet))
    target, whole = imagenet.parent / "t", tree(imagenet.parent / "t")
    target.rename(imagenet.parent / "whole")
    for wanted in (5, 14, 23):
        killed_after(wanted, target, *texture_command(imagenet))
        assert len(list(target.rglob("*.png"))) < len(whole)
    run_script(*texture_command(imagenet))
    assert tree(target) == whole


def test_killed_and_started_again_shapes_equal_an_uninterrupted_run(tmp_path):
    run_script(SHAPES, "--out", tmp_path / "whole", *SHAPES_OPTIONS)
    killed_after(20, tmp_path / "cut", SHAPES, "--out", tmp_path / "cut", *SHAPES_OPTIONS)
    assert not (tmp_path / "cut" / "shapes.json").exists()
    run_script(SHAPES, "--out", tmp_path / "cut", *SHAPES_OPTIONS)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.fixture
def working(imagenet):
    """A script with two workers, each of which waits for a program."""
    program = imagenet.parent / "program"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    # In a job in the background interrupts are ignored, and children inherit that.
    heed_interrupts = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    run = started(*texture_command(imagenet, "--texture-synthesis", program), preexec_fn=heed_interrupts)
    try:
        wait_until(lambda: len(alive(run)) == 5)
        yield run
    finally:
        for process in alive(run):
            os.kill(process, signal.SIGKILL)
        run.stderr.close()


@pytest.mark.parametrize(
    "send, signum",
    [*((os.kill, name) for name in ("SIGTERM", "SIGHUP", "SIGKILL", "SIGINT")), (os.killpg, "SIGINT")],  # as a terminal
)
def test_no_worker_outlives_the_script(working, send, signum):
    signum = signal.Signals[signum]
    send(working.pid, signum)
    code = working.wait(10)
    assert code == (-signum if signum == signal.SIGKILL else 128 + signum)
    wait_until(lambda: not alive(working), seconds=10)
    stderr = working.stderr.read()
    assert "Traceback" not in stderr
    assert stderr.count("interrupted; run the same command again") == (signum == signal.SIGINT)


@pytest.mark.parametrize("signum, told", [(signal.SIGKILL, "(out of memory?)"), (signal.SIGSEGV, "(reading train/n0")])
def test_a_worker_that_is_killed_is_one_line(working, signum, told):
    os.kill(min(children(working.pid)), signum)
    assert working.wait(15) == 1
    stderr = working.stderr.read()
    assert f"a worker process was killed {told}" in stderr and "Traceback" not in stderr


COMMANDS = {
    "subset": lambda imagenet: subset_command(imagenet, "--resize", 64),
    "textures": texture_command,
    "shapes": lambda imagenet: [SHAPES, "--out", imagenet.parent / "s", *SHAPES_OPTIONS],
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_full_disk_ends_in_one_line(imagenet, kind):
    """A limit on the size of files stands for it: writing fails in the middle of a file."""
    limit = ["bash", "-c", 'ulimit -f 1; exec "$@"', "limit", sys.executable, *map(str, COMMANDS[kind](imagenet))]
    run = subprocess.run(limit, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    lines = [line for line in run.stderr.splitlines() if "error:" in line]
    assert run.returncode == 1 and "Traceback" not in run.stderr and len(lines) == 1, run.stderr
    assert "File too large" in lines[0] and "run the same command again" in lines[0]
    run_script(*COMMANDS[kind](imagenet))
    assert not list(imagenet.parent.rglob("?*.partial"))  # a worker that was ended for it may have left one
