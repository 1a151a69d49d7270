"""How scripts end: in one line, with what was finished saved, whatever their streams, environment and data do."""

import contextlib
import errno
import os
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
    PRETRAIN,
    PROBE,
    REPOSITORY,
    SMALL,
    SMALL_PROBE,
    TORCHRUN,
    log,
    run_script,
    same,
    weights,
    write_folder,
)

from moco.errors import RunError, UsageError
from moco.evaluation import results
from moco.processes import environment, exits
from moco.processes.exits import translate_error
from moco.training import checkpoint, files, metrics

SCRIPTS = (PRETRAIN, PROBE, EVALUATE)
# Runs a script after a change to its process:  changed.py CHANGE SCRIPT ARGUMENT…
CHANGED = """
import errno, multiprocessing, os, runpy, signal, sys, tempfile, threading
sys.path.insert(0, os.getcwd())
multiprocessing.set_start_method("fork", force=True)  # so that loading processes are changed, too
change, *sys.argv = sys.argv[1:]
exec(change)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    """A data set of 5 steps an epoch, undisturbed runs of two epochs, and changed.py."""
    root = tmp_path_factory.mktemp("ends")
    write_folder(root / "data", train=20)
    (root / "changed.py").write_text(CHANGED)
    for script, options in ((PRETRAIN, SMALL), (PROBE, SMALL_PROBE)):
        run_script(script, *options, "-j", 0, "--epochs", 2, "--ckpt_path", root / script, root / "data")
    return root


def changed(files_of, change, script, *arguments, **settings):
    return run_script(files_of / "changed.py", change, script, *arguments, check=False, **settings)


def evaluate(files_of, folder):
    head = files_of / PROBE / "model_best_random.pth.tar"
    return [EVALUATE, "--pretrained", head, "--val", files_of / "data", "-j", 0, "--json", folder / "r.json"]


def one_line(run, code, *told):
    assert run.returncode == code and run.stderr.count("\n") == 1, run.stderr
    assert all(text in run.stderr for text in told), run.stderr


# Streams

STREAMS = {
    "stdout cannot encode": "sys.stdout.reconfigure(encoding='ascii', errors='strict')",
    "stderr cannot encode": "sys.stderr.reconfigure(encoding='ascii', errors='strict')",
    "stdout is closed": "os.close(1); sys.stdout = None",
    "stderr is closed": "os.close(2); sys.stderr = None",
    "both are closed": "os.close(1); os.close(2); sys.stdout = sys.stderr = None",
}


@pytest.mark.parametrize("kind", STREAMS)
def test_an_evaluation_ends_well_whatever_its_streams(files_of, tmp_path, kind):
    run = changed(files_of, STREAMS[kind], *evaluate(files_of, tmp_path))
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    assert (tmp_path / "r.json").stat().st_size > 500
    if kind == "stdout cannot encode":
        assert "| \\u2013 | \\u2013 |" in run.stdout and "val: 6 images" in run.stdout


def test_a_file_does_not_take_the_place_of_a_closed_stream(files_of, tmp_path):
    change = STREAMS["both are closed"] + "; import atexit; atexit.register(os.write, 2, b'a library complains')"
    assert changed(files_of, change, *evaluate(files_of, tmp_path)).returncode == 0
    assert b"complains" not in (tmp_path / "r.json").read_bytes()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_whose_output_is_not_read_ends_silently(files_of, tmp_path, script):
    """As in `… | head -1`, with a reader that has ended already."""
    arguments = {
        PRETRAIN: [*SMALL, "--dry-run", files_of / "data"],
        PROBE: [*SMALL_PROBE, "--dry-run", files_of / "data"],
        EVALUATE: evaluate(files_of, tmp_path)[1:],
    }[script]
    unread = "r, w = os.pipe(); os.close(r); os.dup2(w, 1); sys.stdout = os.fdopen(1, 'w', closefd=False)"
    run = changed(files_of, unread, script, *arguments)
    assert run.returncode == 128 + signal.SIGPIPE and "error" not in run.stderr.lower(), run.stderr
    assert script != EVALUATE or (tmp_path / "r.json").exists()


def test_a_run_whose_reader_ends_saves_its_steps(files_of, tmp_path):
    """The reader ends within the first epoch."""
    change = (
        "from moco import progress; report = progress.Progress.report\n"
        "def unread(self, *args):\n"
        "    r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n"
        "    report(self, *args)\n"
        "progress.Progress.report = unread"
    )
    options = [*SMALL, "-j", 0, "--epochs", 2, "-p", 3, "--ckpt_path", tmp_path, files_of / "data"]
    run = changed(files_of, change, PRETRAIN, *options)
    assert run.returncode == 128 + signal.SIGPIPE and run.stderr == ""
    assert_continues(PRETRAIN, options, tmp_path, files_of, step=3)


def test_a_full_device_as_stdout_ends_in_one_line(files_of, tmp_path):
    full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    run = changed(files_of, full, EVALUATE, "--list-released")
    one_line(run, 1, "no space left")


def test_messages_with_surrogates_are_printed(files_of):
    run = changed(files_of, "pass", EVALUATE, "--pretrained", "\udcff.pth", "--val", files_of / "data")
    one_line(run, 2, "--pretrained", "no such file")


# The environment


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"])
def test_a_variable_left_over_from_torchrun_is_ignored(files_of, variable):
    run = run_script(
        EVALUATE, "--pretrained", "nowhere.pth", "--val", files_of / "data", env={variable: "3"}, check=False
    )
    one_line(run, 2, "nowhere.pth: no such file")


def test_torchruns_own_variables_are_not_ignored(monkeypatch):
    for name in environment.TORCHRUN_RANKS:
        monkeypatch.setenv(name, "1")
    assert not environment.under_torchrun()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert environment.under_torchrun() and not environment.is_local_main()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert environment.is_local_main() and not environment.is_main()
    monkeypatch.setenv("RANK", "0")
    assert environment.is_main()
    monkeypatch.setenv("LOCAL_RANK", "x")
    assert not environment.under_torchrun()


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_pytorch_is_imported_is_silent(tmp_path, script):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(9)")
    command = [sys.executable, str(REPOSITORY / script)]
    run = subprocess.run(command, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == -signal.SIGINT and run.stderr == ""


def test_ctrl_c_later_ends_with_130(files_of):
    change = "from moco import options; options.OptionParser.parse_args = lambda self: os.kill(os.getpid(), 2)"
    run = changed(files_of, change, EVALUATE, "--list-released")
    assert run.returncode == 130 and run.stderr == ""


def test_an_interrupt_that_is_ignored_stays_ignored(files_of):
    """As of a job in the background of a script."""
    change = "signal.signal(signal.SIGINT, signal.SIG_IGN); import threading; "
    change += "threading.Timer(0, os.kill, (os.getpid(), 2)).start()"
    run = changed(files_of, change, EVALUATE, "--list-released")
    assert run.returncode == 0 and "drive.google.com" in run.stdout


def test_a_home_that_cannot_be_written_to_does_not_matter(files_of, tmp_path):
    change = "os.environ.update(HOME='/proc/nobody', XDG_CACHE_HOME='/proc/nobody')"
    assert changed(files_of, change, *evaluate(files_of, tmp_path)).returncode == 0


LIMITS = {
    "no process": "def fork():\n    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))\nos.fork = fork",
    "no thread": 'def start(self):\n    raise RuntimeError("can\'t start new thread")\nthreading.Thread.start = start',
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_of_processes_ends_in_one_line(files_of, tmp_path, limit, script):
    arguments = {
        PRETRAIN: [*SMALL, "--ckpt_path", tmp_path, files_of / "data"],
        PROBE: [*SMALL_PROBE, "--ckpt_path", tmp_path, files_of / "data"],
        EVALUATE: [*evaluate(files_of, tmp_path)[1:], "-j", 1],
    }[script]
    run = changed(files_of, LIMITS[limit], script, *arguments)
    if run.returncode != 0:  # without a GPU, a script need not start a thread
        assert run.returncode == 1 and "no further process or thread" in run.stderr.splitlines()[-1], run.stderr
        assert "Traceback" not in run.stderr
    assert run.returncode == 1 or limit == "no thread"


ERRORS = {
    "no thread": (RuntimeError("can't start new thread"), "no further process or thread"),
    "no process": (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no further process or thread"),
    "no thread in C++": (RuntimeError("std::system_error: Resource temporarily unavailable"), "ulimit -u"),
    "stale": (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), "no longer answers"),
    "stale, in a worker": (OSError("Caught OSError in a worker\n[Errno 116] Stale file handle"), "no longer answers"),
    "input/output": (OSError(errno.EIO, os.strerror(errno.EIO)), "no longer answers"),
    "unmounted": (OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)), "no longer answers"),
    "open files": (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_of_the_system_is_explained(kind):
    error, told = ERRORS[kind]
    assert told in str(translate_error(error))


def can(*command):
    return subprocess.run(["unshare", *command, "true"], capture_output=True).returncode == 0


def unshared(option, prepare, *command):
    script = f'{prepare} && exec "$@"'
    return subprocess.run(
        ["unshare", option, "sh", "-c", script, "sh", sys.executable, *map(str, command)],
        cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.skipif(not can("--mount"), reason="mounting takes root")
def test_a_read_only_shared_memory_ends_in_one_line(files_of, tmp_path):
    command = [PRETRAIN, *SMALL, "--ckpt_path", tmp_path, files_of / "data"]
    one_line(unshared("--mount", "mount -t tmpfs -o ro tmpfs /dev/shm", *command), 1, "/dev/shm", "-j 0")


@pytest.mark.skipif(not can("--net"), reason="a network of its own takes root")
def test_a_loopback_that_is_down_ends_in_one_line(files_of, tmp_path):
    command = [PRETRAIN, *SMALL, "--multiprocessing-distributed", "--ckpt_path", tmp_path, files_of / "data"]
    one_line(unshared("--net", "true", *command), 1, "127.0.0.1", "ip link set lo up")


# Loading


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_long_tmpdir_does_not_matter(files_of, tmp_path, script):
    """Sockets have paths of at most 107 characters."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    change = "tempfile.tempdir = None; multiprocessing.current_process()._config.pop('tempdir', None)"
    arguments = {
        PRETRAIN: [*SMALL, "--epochs", 1, "--ckpt_path", tmp_path, files_of / "data"],
        PROBE: [*SMALL_PROBE, "--epochs", 1, "--ckpt_path", tmp_path, files_of / "data"],
        EVALUATE: [*evaluate(files_of, tmp_path)[1:], "-j", 1],
    }[script]
    run = changed(files_of, change, script, *arguments, env={"TMPDIR": str(folder)}, timeout=60)
    assert run.returncode == 0 and "they use /tmp" in run.stderr and "Traceback" not in run.stderr, run.stderr


def assert_continues(script, options, folder, files_of, step=None):
    """The run was saved (after this many steps of the first epoch), and continues as if undisturbed."""
    name = {PRETRAIN: "checkpoint_latest.pth.tar", PROBE: "checkpoint_robust_random.pth.tar"}[script]
    saved = torch.load(folder / name, weights_only=True)
    assert saved["epoch"] == 0 and saved["step"] == (saved["step"] if step is None else step)
    run_script(script, *options, "--resume", "auto")
    assert log(folder) == log(files_of / script)
    assert same(weights(folder / name), weights(files_of / script / name))


def failing_at(item, error):
    """A change that lets the dataset fail at its so many-th item: a step has 8."""
    return (
        "from moco import datasets, errors; get, calls = datasets.RetryDataset.__getitem__, []\n"
        "def fail(self, key):\n"
        "    calls.append(key)\n"
        f"    if len(calls) == {item}:\n"
        f"        raise {error}\n"
        "    return get(self, key)\n"
        "datasets.RetryDataset.__getitem__ = fail"
    )


@pytest.mark.parametrize("script, options", [(PRETRAIN, SMALL), (PROBE, SMALL_PROBE)])
@pytest.mark.parametrize(
    "error", ["errors.RunError('data are gone')", "OSError(errno.ESTALE, 'Stale file handle')", "MemoryError()"]
)
def test_trouble_with_data_saves_the_finished_steps(files_of, tmp_path, script, options, error):
    options = [*options, "-j", 0, "--epochs", 2, "--ckpt_path", tmp_path, files_of / "data"]
    one_line(changed(files_of, failing_at(2 * 8 + 3, error), script, *options), 1)
    assert_continues(script, options, tmp_path, files_of, step=2)


def test_data_that_vanish_for_a_worker_save_the_steps(files_of, tmp_path):
    options = [*SMALL, "--epochs", 2, "--ckpt_path", tmp_path, files_of / "data"]
    run = changed(files_of, failing_at(3 * 8 + 1, "errors.RunError('data are gone')"), PRETRAIN, *options)
    one_line(run, 1, "error: data are gone")
    assert_continues(PRETRAIN, options, tmp_path, files_of, step=3)


def test_a_killed_worker_costs_no_finished_step(files_of, tmp_path):
    options = [*SMALL, "--epochs", 2, "--ckpt_path", tmp_path, files_of / "data"]
    run = changed(files_of, failing_at(3 * 8 + 1, "os.kill(os.getpid(), 9)"), PRETRAIN, *options)
    one_line(run, 1, "a data loading process was killed")
    assert_continues(PRETRAIN, options, tmp_path, files_of)


def test_trouble_in_the_evaluation_costs_no_epoch(files_of, tmp_path):
    """The resumed run begins with the evaluation."""
    change = (
        "from moco import datasets, errors\n"
        "def fail(self, index):\n    raise errors.RunError('a bad image')\n"
        "datasets.StrictDataset.__getitem__ = fail"
    )
    options = [*SMALL_PROBE, "-j", 0, "--epochs", 2, "--ckpt_path", tmp_path, files_of / "data"]
    one_line(changed(files_of, change, PROBE, *options), 1, "a bad image")
    assert_continues(PROBE, options, tmp_path, files_of, step=5)


@pytest.mark.slow
def test_trouble_on_one_of_two_ranks_saves_the_steps_of_both(files_of, tmp_path):
    change = "if os.environ['RANK'] == '1':\n    " + failing_at(2 * 4 + 1, "errors.RunError('gone')").replace(
        "\n", "\n    "
    )
    launcher = [*TORCHRUN, "--nproc-per-node=2"]
    options = [*SMALL, "-j", 0, "--epochs", 2, files_of / "data", "--ckpt_path"]
    run = changed(files_of, change, PRETRAIN, *options, tmp_path / "cut", launcher=launcher)
    assert run.returncode == 1 and run.stderr.count("error: gone") == 1, run.stderr
    assert torch.load(tmp_path / "cut" / "checkpoint_latest.pth.tar", weights_only=True)["step"] == 2
    run_script(PRETRAIN, *options, tmp_path / "cut", "--resume", "auto", launcher=launcher)
    run_script(PRETRAIN, *options, tmp_path / "whole", launcher=launcher)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


# A signal while data do not come

HANGING = (  # the item is read from a pipe that nobody writes to, as from a mount that does not answer
    "from moco import datasets; get, calls = datasets.{dataset}.__getitem__, []\n"
    "def hang(self, key):\n"
    "    calls.append(key)\n"
    "    if len(calls) == {item}:\n"
    "        print('hanging', flush=True)\n"
    "        {how}\n"
    "    return get(self, key)\n"
    "datasets.{dataset}.__getitem__ = hang"
)
PIPE, STOP = "os.read(os.pipe()[0], 1)", "os.kill(os.getpid(), signal.SIGSTOP)"


def signalled(files_of, number, change, script, *options):
    """(exit code, stdout, stderr) of a script that gets a signal once it hangs."""
    command = [sys.executable, files_of / "changed.py", change, script, *options]
    process = subprocess.Popen(
        list(map(str, command)), cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        seen = ""
        while "hanging" not in seen:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            seen += line
        time.sleep(2)  # until the steps before are done
        process.send_signal(number)
        out, err = process.communicate(timeout=40)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, seen + out, err


@pytest.mark.parametrize(
    "how, workers, number",
    [
        (STOP, 1, signal.SIGTERM),
        (PIPE, 0, signal.SIGINT),
        pytest.param(PIPE, 1, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(STOP, 1, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_data_do_not_come_saves_and_ends(files_of, tmp_path, how, workers, number):
    change = HANGING.format(dataset="RetryDataset", item=2 * 8 + 3, how=how)
    options = [*SMALL, "-j", workers, "--epochs", 2, "-p", 1, "--ckpt_path", tmp_path, files_of / "data"]
    code, out, err = signalled(files_of, number, change, PRETRAIN, *options)
    assert code == 128 + number and f"stopped by {number.name} in epoch 0 after step" in out and err == ""
    # A stopped worker cannot hand over either what it has read before.
    assert_continues(PRETRAIN, options, tmp_path, files_of, step=None if how == STOP else 2)


@pytest.mark.parametrize("how", [STOP, pytest.param(PIPE, marks=pytest.mark.slow)])
def test_a_signal_while_an_evaluation_hangs_ends_the_run(files_of, tmp_path, how):
    change = HANGING.format(dataset="StrictDataset", item=2, how=how)
    options = [*SMALL_PROBE, "--epochs", 2, "--ckpt_path", tmp_path, files_of / "data"]
    code, out, err = signalled(files_of, signal.SIGTERM, change, PROBE, *options)
    assert code == 128 + signal.SIGTERM and err == ""
    assert "stopped by SIGTERM in the evaluation after epoch 0, saved before it" in out
    assert_continues(PROBE, options, tmp_path, files_of, step=5)


# Files


def write_checkpoint(path):
    checkpoint.save(str(path), {"epoch": 1})


def write_report(path):
    results.save(str(path), {"cells": {}})


def write_log(path):
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n')
    metrics.truncate_jsonl(str(path), 1)


@pytest.mark.parametrize("write", [write_checkpoint, write_report, write_log])
def test_a_link_beside_a_file_is_not_followed(tmp_path, write):
    for name in ("victim", "other"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "file.partial").symlink_to(tmp_path / "victim")
    (tmp_path / f"file.{'0' * 16}.partial").symlink_to(tmp_path / "other")
    write(tmp_path / "file")
    assert (tmp_path / "victim").read_text() == (tmp_path / "other").read_text() == "precious"
    assert (tmp_path / "file").stat().st_size > 0 and not (tmp_path / "file").is_symlink()


def test_names_of_unfinished_files_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(3):
        with files.atomic_write(tmp_path / "file") as file:
            names.add(file.name)
    assert len(names) == 3 and {os.path.dirname(name) for name in names} == {str(tmp_path)}


def test_a_file_that_fails_leaves_the_old_one_alone(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), files.atomic_write(tmp_path / "file") as file:
        file.write("new")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / f"file.{'a' * 16}.partial").write_text("half")
    (tmp_path / "file.mine.partial").write_text("not ours")
    with files.atomic_write(tmp_path / "file") as file:
        file.write("new")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "file.mine.partial"}


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_checkpoint(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error, code", [(UsageError("no"), 2), (RunError("no"), 1), (SystemExit(5), 5)])
def test_exit_codes_are_kept(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        exits.cli_main(main)
    assert stop.value.code == code and capsys.readouterr().err.count("\n") == (code != 5)
    assert Path(sys.argv[0]).name  # used in the message
