"""The pool with threads in the place of processes; tests/faults/test_preprocess_ends.py has the processes."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pool
import pytest

from moco.errors import RunError


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(pool, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))


def test_results_come_in_the_order_of_the_jobs(threads, capsys):
    assert list(pool.in_processes(str, range(100), 3, "job")) == [str(job) for job in range(100)]
    assert capsys.readouterr().err.startswith("100/100 jobs, ")


def test_a_log_gets_a_line_every_half_minute_and_at_the_end(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 8))
    monkeypatch.setattr(pool.time, "monotonic", lambda: next(seconds))
    assert list(pool.progress("abcdefghij", 10, "photo", "out")) == list("abcdefghij")
    lines = [f"out: {done}/10 photos, 0.125 a second, {left} left" for done, left in ((4, "00:48"), (8, "00:16"))]
    assert capsys.readouterr().err.splitlines() == [*lines, "out: 10/10 photos, 0.125 a second, 00:00 left"]


def test_few_jobs_are_shared_by_all_workers(threads):
    both = threading.Barrier(2, timeout=5)  # broken unless two workers meet
    assert sorted(pool.in_processes(lambda job: both.wait(), range(2), 2, "job")) == [0, 1]


def test_a_worker_without_memory_ends_the_script(threads):
    def fail(job):
        raise MemoryError

    with pytest.raises(RunError, match="fewer --workers"):
        list(pool.in_processes(fail, range(9), 2, "job"))


def test_an_interrupt_cancels_no_job_that_waits():
    """On Python 3.10 and 3.11, a pool that loses its workers would print a traceback for each."""
    waiting = [Future() for _ in range(3)]
    waiting[-1].set_exception(KeyboardInterrupt())
    left = waiting[:-1]
    with pytest.raises(KeyboardInterrupt):
        list(pool._results(waiting))
    assert waiting == left and not any(future.cancelled() for future in left)
