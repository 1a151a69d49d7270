"""One writer at a time in a run's folder or a report: another one is refused, and nothing is mixed."""

import signal
import time
from pathlib import Path

import pytest
from helpers import EVALUATE, PRETRAIN, PROBE, SMALL, SMALL_PROBE, completed, ended, run_script, started

pytestmark = pytest.mark.slow


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


def test_a_second_evaluation_of_a_report_is_refused(stopped, shared_data, tmp_path):
    run_script(PROBE, *SMALL_PROBE, "-j", 0, "--epochs", 1, "--ckpt_path", tmp_path, shared_data)
    settings = ["--pretrained", tmp_path / "model_best_random.pth.tar", "--val", shared_data, "-j", 0, "--json"]
    first = stopped(EVALUATE, tmp_path / ".r.json.lock", *settings, tmp_path / "r.json")
    assert_refused(run_script(EVALUATE, *settings, tmp_path / "r.json", check=False), first, "--json")
    run_script(EVALUATE, *settings, tmp_path / "other.json")
    first.send_signal(signal.SIGCONT)
    assert completed(first).returncode == 0
