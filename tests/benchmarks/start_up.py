"""What a list of 1.28 million files costs: seconds until the first step, and memory per data loader worker.

    python -m tests.benchmarks.start_up BEFORE

BEFORE: a commit to compare the working tree with. The files are links to one small photo, in memory (/dev/shm, 2 GB,
removed afterwards); the runs use a ResNet-10 on 32 px. Memory is measured with items that only look up their path: at
the first batch, and after rank 0 of 8 has read its eighth of an epoch with 4 workers. Prints a table, in half an hour.
"""

import json
import math
import multiprocessing
import os
import pickle
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
COUNTS = {100_000: 100, 1_281_167: 1000}  # files: classes
RANKS, WORKERS = 8, 4
CORES = len(os.sched_getaffinity(0))  # so many ranks do not wait for each other's imports
LIMIT = 90  # seconds to the first step; before, 8 ranks × 4 workers with their lists took more than 24 GB
OPTIONS = shlex.split("-a resnet10 --image-size 32 --patch-ratio 4 12 --moco-k 64 --seed 1 --print-freq 1")
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node={}"
RUNS = {  # (what Python is to run, by the number of ranks; an option; ranks)
    "one process": ("", "", 1),
    f"{CORES} ranks of torchrun": (TORCHRUN, "", CORES),
    f"{RANKS} ranks of torchrun": (TORCHRUN, "", RANKS),
    f"{CORES} ranks of --multiprocessing-distributed": ("", "--multiprocessing-distributed", CORES),
    f"{RANKS} ranks of --multiprocessing-distributed": ("", "--multiprocessing-distributed", RANKS),
}
# What is put into the script: that many ranks and workers on a CPU, whatever its cores.
CHANGE = """
from moco import options
launch.usable_gpus = torch.cuda.device_count = lambda: {}
options.workers_per_rank = lambda total, ranks: -(-total // ranks)
"""


def write_links(root, files, classes):
    """The layout and the lengths of the names of ImageNet."""
    Image.new("RGB", (40, 32), "gray").save(root / "photo.JPEG")
    noise = np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375), Image.BICUBIC).save(root / "large.JPEG")
    (root / "bad.JPEG").write_bytes((root / "large.JPEG").read_bytes()[:-2000])
    for label in range(classes):
        name = f"n{1440764 + 7 * label:08d}"
        (root / "train" / name).mkdir(parents=True)
        for i in range(label, files, classes):
            os.link(root / "photo.JPEG", root / "train" / name / f"{name}_{i // classes * 13}.JPEG")


# In a process of the measured version


class Lookup(torch.utils.data.Dataset):
    """A data set whose items are cheap: what remains is to look up the path."""

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, index):
        return len(self.paths[index])


def measure(root, method):
    """Figures of the version on PYTHONPATH, with this default start method."""

    from moco.data import datasets, folders, loader
    from moco.distributed import DistContext

    multiprocessing.set_start_method(method)
    times = [time.perf_counter()]
    data = folders.list_training_images(root)
    times.append(time.perf_counter())
    pickled = len(pickle.dumps(data))
    dataset = datasets.RetryDataset(Lookup(data.photos), data.labels)
    sampler = loader.GlobalBatchSampler(len(dataset), 32, 0, DistContext(0, RANKS, 0, RANKS))
    batches = loader.train_loader(dataset, sampler, WORKERS, torch.device("cpu"))
    times.append(time.perf_counter())
    steps = iter(batches)
    next(steps)
    times.append(time.perf_counter())
    first = private_memory()
    for _ in steps:
        pass
    last = private_memory()
    return {
        "listing, s": times[1] - times[0],
        "pickled list, MB": pickled / 1e6,
        f"from the list to the first batch, {method}, s": times[3] - times[2],
        f"private memory of a worker at the first batch, {method}, MB": first,
        f"private memory of a worker after an epoch, {method}, MB": last,
    }


def measure_damaged(root, share):
    """Seconds to read 15,000 images of a million, of which this share is damaged."""
    from moco.data import datasets

    good, bad = (os.path.join(root, name) for name in ("large.JPEG", "bad.JPEG"))
    damaged = round(float(share) * 100)
    labels = [label for label in range(1000) for _ in range(1000)]
    reader = datasets.RetryDataset(
        datasets.TwoCrops(([bad] * damaged + [good] * (100 - damaged)) * 10_000, 224), labels
    )
    start = time.perf_counter()
    for index in range(15_000):
        reader[index, index]
    return {"seconds": time.perf_counter() - start}


def private_memory():
    """MB of the largest loading process that no other shares."""
    found = []
    for process in multiprocessing.active_children():
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        found.append(sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024)
    return max(found)


# Whole runs


def first_step(repository, root, launcher, option, ranks):
    """Seconds from the start of the script to its first step; images in batches of 8 per rank."""
    with tempfile.TemporaryDirectory() as folder:
        before, main, after = Path(repository, "moco-non-sem-neg.py").read_text().partition("\nif __name__ ==")
        script = Path(folder, "script.py")
        script.write_text(before + CHANGE.format(ranks) + main + after)
        options = [*option.split(), "-b", 8 * ranks, "-j", WORKERS * ranks, "--ckpt_path", folder]
        command = [sys.executable, *launcher.format(ranks).split(), script, *OPTIONS, *options, root]
        start = time.perf_counter()
        run = subprocess.Popen(
            list(map(str, command)), cwd=repository, env=environment(repository), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        kill = ["pkill", "-KILL", "--session", str(run.pid)]  # ranks have process groups of their own
        timer = threading.Timer(LIMIT, subprocess.run, (kill,))
        timer.start()
        reached = next((time.perf_counter() for line in run.stdout if line.startswith("epoch 0 ")), None)
        timer.cancel()
        subprocess.run(kill)
        run.wait()
        time.sleep(6)  # until the last worker has noticed
    if reached is None:
        print(f"no first step within {LIMIT} s: {run.args}", file=sys.stderr)
        return math.nan
    return reached - start


def environment(repository):
    return {**os.environ, "PYTHONPATH": str(repository), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def measured(repository, *arguments):
    """What this script prints with these arguments and one version on PYTHONPATH."""
    result = subprocess.run(
        [sys.executable, __file__, *arguments], cwd=repository, env=environment(repository), check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


def figures(repository, root):
    """All figures of one version on one folder."""
    found = {}
    for method in ("fork", "forkserver"):
        found |= measured(repository, "--measure", root, method)
    for name, run in RUNS.items():
        found[f"to the first step, {name}, {WORKERS} workers each, s"] = min(
            first_step(repository, root, *run) for _ in range(2)
        )
    return found


def damaged_images(repository, root):
    """How much longer reading takes with one damaged image in a hundred: the median of five pairs of processes."""
    pairs = [[measured(repository, "--damaged", root, share)["seconds"] for share in ("0", "0.01")] for _ in range(5)]
    return statistics.median(with_some / without for without, with_some in pairs)


def main():
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        before.mkdir()
        archive = subprocess.run(["git", "archive", sys.argv[1]], cwd=REPOSITORY, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", before], input=archive.stdout, check=True)
        versions, columns, damaged = {"before": before, "now": REPOSITORY}, {}, {}
        for count, classes in COUNTS.items():
            root = tempfile.mkdtemp(dir="/dev/shm")
            try:
                write_links(Path(root), count, classes)
                for name, repository in versions.items():
                    columns[f"{count:,} files, {name}"] = figures(repository, root)
                    print(name, count, columns[f"{count:,} files, {name}"], file=sys.stderr, flush=True)
                if not damaged:
                    damaged = {name: damaged_images(version, root) for name, version in versions.items()}
            finally:
                shutil.rmtree(root)
    print(f"time with 1 % damaged images, of that without: {damaged}")
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(f'{column[row]:.3g}' for column in columns.values())} |")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(*sys.argv[2:])))
    elif sys.argv[1] == "--damaged":
        print(json.dumps(measure_damaged(*sys.argv[2:])))
    else:
        main()
