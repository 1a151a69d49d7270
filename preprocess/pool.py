"""A pool of worker processes with a progress bar; the workers end with the script, however it ends."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from common import RESUME, RunError, note_reading, printable, read_last, signals, write_atomically
from tqdm import tqdm

LINE_SECONDS = 30  # between lines in a log
Make = Callable[[str], tuple[dict[Path, bytes], bool]]  # photo → ({path: content}, whether the photo was enlarged)


def in_processes(function: Callable[[Any], Any], jobs: Sequence, workers: int, unit: str) -> Iterator:
    """Yield function(job) for all jobs, in order, with `progress`.

    Raises RunError if a worker is killed, and what `function` raises.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)  # forked, they share their notes
    pool, processes = ProcessPoolExecutor(workers, context, _leave_with_parent), []
    chunk = max(1, min(8, len(jobs) // (4 * workers)))  # few long jobs are shared by all workers
    try:
        # Not pool.map: interrupted, it cancels what is waiting, and a pool that loses its workers while something is
        # cancelled ends in a traceback on Python 3.10 and 3.11.
        waiting = [pool.submit(_call_each, function, jobs[i : i + chunk]) for i in range(0, len(jobs), chunk)]
        processes = multiprocessing.active_children()
        yield from progress(_results(waiting[::-1]), len(jobs), unit)
    except (BrokenProcessPool, MemoryError):
        pool.shutdown(cancel_futures=True)  # then all have exit codes: -15 or -9 if it ended them, or memory ran out
        crashed = [read_last(each.pid) for each in processes if each.exitcode not in (None, 0, -9, -15)]
        why = f"reading {', '.join(crashed)}" if crashed else "out of memory?"
        way = "without that file" if crashed else "with fewer --workers if memory ran out"
        raise RunError(f"a worker process was killed ({why}); {RESUME}, {way}") from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        with contextlib.suppress(RuntimeError):  # a signal while its thread was being started: it cannot be joined
            pool.shutdown(cancel_futures=True)


def progress(results: Iterable, total: int, unit: str, title: str = "") -> Iterator:
    """Yield the results; a bar shows the rate and the remaining time, in a log a line about every LINE_SECONDS."""
    if sys.stderr.isatty():
        yield from tqdm(results, title, total, unit=unit, smoothing=0.02)
        return
    start = said = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        if (now := time.monotonic()) - said >= LINE_SECONDS or done == total:
            said, rate = now, done / max(now - start, 1e-9)
            left = tqdm.format_interval((total - done) / rate)
            speed = f"{float(f'{rate:.3g}'):g} a second"
            text = f"{title}{': ' * bool(title)}{done}/{total} {unit}s, {speed}, {left} left"
            print(text, file=sys.stderr, flush=True)


def write_files(make: Make, photos: Sequence[str], done: Callable[[str], bool], workers: int) -> tuple[int, int, int]:
    """Write the files that are made of each photo that is not done, and list the broken photos on stderr.

    Returns the numbers of photos whose files were written, of enlarged ones among them, and of broken ones.
    """
    jobs, small, broken = [photo for photo in photos if not done(photo)], 0, []
    print(f"{len(photos)} photos, {len(photos) - len(jobs)} of them done; {workers} processes", flush=True)
    for enlarged, reason in in_processes(functools.partial(_write, make), jobs, workers, "photo"):
        small += enlarged
        broken += filter(None, [reason])
    if broken:
        print(f"{len(broken)} broken images were left out:", *map(printable, broken), sep="\n  ", file=sys.stderr)
    return len(jobs) - len(broken), small, len(broken)


def _write(make: Make, photo: str) -> tuple[bool, str | None]:
    """Write the files of one photo: (whether it was enlarged, None), or (False, why it was left out)."""
    note_reading(photo)
    try:
        files, enlarged = make(photo)
    except Exception as error:  # a decoder may raise anything on a broken file; the other photos go on
        return False, f"{photo}: {type(error).__name__}: {error}"
    for path, data in files.items():
        write_atomically(path, data)
    return enlarged, None


def _call_each(function: Callable[[Any], Any], jobs: Sequence) -> list:
    return [function(job) for job in jobs]


def _results(waiting: list[Future]) -> Iterator:
    """The results of the futures, the last one first; none is kept."""
    while waiting:
        yield from waiting.pop().result()


def _leave_with_parent() -> None:
    """In a worker: end when the parent does, even if that is killed, and take along the programs that run for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()  # a group of this worker and its programs; an interrupt at the terminal reaches the parent only
        signal.signal(signal.SIGTERM, lambda signum, frame: os.killpg(0, signal.SIGKILL))
    signals.end_with_parent()
