"""What the scripts here share: errors of one line, lists of images, files that appear whole or not at all, a pool."""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and errors of one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, 36, width=120))

    def add_workers(self):
        self.add_argument("--workers", type=at_least_one, default=os.cpu_count(), metavar="N", help="processes")

    def error(self, message):
        self.exit(2, " ".join(f"{self.prog}: error: {message}".split()) + "\n")


def at_least_one(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def class_folders(folder):
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def images_in(folder):
    """The names of the images in a folder, sorted, by their suffix."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES))


def write_whole(path, data):
    """Write bytes to a path at which, whatever happens, there is either nothing or all of them."""
    partial = Path(f"{path}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def in_processes(function, jobs, workers, unit):
    """Yield function(job) for all jobs, in order, from a pool of processes; a bar shows the rate and the time left."""
    with ProcessPoolExecutor(workers) as pool:
        try:
            # In a log, where every update is a line, one in half a minute.
            yield from tqdm(pool.map(function, jobs, chunksize=8), total=len(jobs), unit=unit, smoothing=0.02,
                            mininterval=0.1 if sys.stderr.isatty() else 30)
        except BrokenProcessPool:
            sys.exit("a worker process was killed (is there memory enough for all?); start again to go on from here")
        finally:
            pool.shutdown(cancel_futures=True)


def report_broken(broken):
    """Name the broken images, one a line, and tell the exit code: 1 if there are any."""
    if broken:
        print(f"{len(broken)} broken images were left out:", file=sys.stderr)
        for path, reason in broken:
            print(f"  {path}: {reason}", file=sys.stderr)
    return int(bool(broken))
