"""What the scripts here share: one-line errors, lists of images, files written whole or not at all, a process pool."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

# One thread per worker process. numpy reads these when it is loaded: import this module first.
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help as wide as the terminal, with the defaults of those options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and errors of one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)

    def add_workers(self) -> None:
        self.add_argument("--workers", type=at_least_one, default=os.cpu_count(), metavar="N", help="worker processes")

    def error(self, message: str) -> NoReturn:
        self.exit(2, " ".join(f"{self.prog}: error: {message}".split()) + "\n")


def at_least_one(text: str) -> int:
    """A whole number of 1 or more; argparse.ArgumentTypeError otherwise."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def class_folders(folder: Path) -> list[str]:
    """The names of a folder's subfolders, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def images_in(folder: Path) -> list[str]:
    """The names of the images in a folder, sorted; images are recognised by their suffix."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that, even after a crash, there is either nothing or all of it. OSError if it cannot be written."""
    partial = Path(f"{path}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def in_processes(function: Callable[[Any], Any], jobs: Sequence, workers: int, unit: str) -> Iterator:
    """Yield function(job) for all jobs, in order, from a pool of processes; a bar shows rate and remaining time."""
    with ProcessPoolExecutor(workers) as pool:
        try:
            # In a log, where every update is a line, update every 30 s.
            yield from tqdm(
                pool.map(function, jobs, chunksize=8),
                total=len(jobs),
                unit=unit,
                smoothing=0.02,
                mininterval=0.1 if sys.stderr.isatty() else 30,
            )
        except BrokenProcessPool:
            sys.exit("a worker process was killed (out of memory?); run the same command again to resume")
        finally:
            pool.shutdown(cancel_futures=True)


def report_broken(broken: Sequence[tuple[object, str]]) -> int:
    """List the broken images, (path, reason), on stderr. Returns the exit code: 1 if there are any."""
    if broken:
        print(f"{len(broken)} broken images were left out:", file=sys.stderr)
        for path, reason in broken:
            print(f"  {path}: {reason}", file=sys.stderr)
    return int(bool(broken))
