"""Cost of a list of 1.28 million files: seconds until the first step, and memory per data loader worker.

    python -m tests.benchmarks.start_up [RUN…]

The files are links to one small photo, in memory (/dev/shm, 2 GB, removed afterwards); the runs use a ResNet-10 on
32 px, with 4 workers per rank. RUN: only the runs whose name holds this. Prints a table, in five minutes on two cores.
"""

import json
import multiprocessing
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image

from moco.data import datasets, folders, loader
from moco.distributed import DistContext

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
FILES, CLASSES, RANKS, WORKERS, LIMIT = 1_281_167, 1000, 8, 4, 90  # seconds to the first step
OPTIONS = shlex.split("-a resnet10 --image-size 32 --patch-ratio 4 12 --moco-k 64 --seed 1 --print-freq 1")
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node={}"
RUNS = {  # (what Python is to run, by the number of ranks; an option; ranks)
    "one process": ("", "", 1),
    "2 ranks of torchrun": (TORCHRUN, "", 2),
    "8 ranks of torchrun": (TORCHRUN, "", 8),
    "2 ranks of --multiprocessing-distributed": ("", "--multiprocessing-distributed", 2),
    "8 ranks of --multiprocessing-distributed": ("", "--multiprocessing-distributed", 8),
}
# What is put into the script: that many ranks and workers on a CPU, whatever its cores.
CHANGE = """
launch.usable_gpus = torch.cuda.device_count = lambda: {}
options.workers_per_rank = lambda total, ranks: -(-total // ranks)
"""


def write_links(root: Path) -> None:
    """The layout and the lengths of the names of ImageNet."""
    Image.new("RGB", (40, 32), "gray").save(root / "photo.JPEG")
    for label in range(CLASSES):
        name = f"n{1440764 + 7 * label:08d}"
        (root / "train" / name).mkdir(parents=True)
        for i in range(-(-(FILES - label) // CLASSES)):
            os.link(root / "photo.JPEG", root / "train" / name / f"{name}_{i * 13}.JPEG")


class Lookup(torch.utils.data.Dataset):
    """A data set whose items are cheap: what remains is to look up the path."""

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, index):
        return len(self.paths[index])


def measured(root: Path) -> dict[str, float]:
    """Figures of a list, in a process of its own, whose default start method is Python 3.14's."""
    command = [sys.executable, __file__, "--measure", root]
    return json.loads(subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE).stdout)


def measure(root: str) -> dict[str, float]:
    """Figures of rank 0 of 8, which reads its eighth of an epoch."""
    multiprocessing.set_start_method("forkserver")
    start = time.perf_counter()
    data = folders.list_training_images(root)
    found = {"listing, s": time.perf_counter() - start, "pickled list, MB": len(pickle.dumps(data)) / 1e6}
    start = time.perf_counter()
    dataset = datasets.RetryDataset(Lookup(data.photos), data.labels)
    sampler = loader.GlobalBatchSampler(len(data.photos), 32, 0, DistContext(0, RANKS, 0, RANKS))
    batches = loader.train_loader(dataset, sampler, WORKERS, torch.device("cpu"))
    steps = iter(batches)
    next(steps)
    found["from the list to the first batch, s"] = time.perf_counter() - start
    found["private memory of a worker at the first batch, MB"] = private_memory()
    for _ in steps:
        pass
    return found | {"private memory of a worker after an epoch, MB": private_memory()}


def private_memory() -> float:
    """MB of the largest loading process that no other shares."""
    found = []
    for process in multiprocessing.active_children():
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        found.append(sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024)
    return max(found)


def first_step(root: Path, launcher: str, option: str, ranks: int) -> float:
    """Seconds from the start of the script to its first step; images in batches of 8 per rank."""
    with tempfile.TemporaryDirectory() as folder:
        before, main, after = (REPOSITORY / "moco-non-sem-neg.py").read_text().partition("\nif __name__ ==")
        script = Path(folder, "script.py")
        script.write_text(before + CHANGE.format(ranks) + main + after)
        options = [*option.split(), "-b", 8 * ranks, "-j", WORKERS * ranks, "--ckpt_path", folder]
        start = time.perf_counter()
        run = subprocess.Popen(
            list(map(str, [sys.executable, *launcher.format(ranks).split(), script, *OPTIONS, *options, root])),
            env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        timer = threading.Timer(LIMIT, run.kill)  # the ranks end with it
        timer.start()
        reached = next((time.perf_counter() for line in run.stdout if line.startswith("epoch 0 ")), float("nan"))
        timer.cancel()
        run.kill()
        run.wait()
        time.sleep(6)  # until the last worker has noticed
    return reached - start


def main() -> None:
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        write_links(root)
        figures = measured(root)
        for name, run in RUNS.items():
            if not sys.argv[1:] or any(each in name for each in sys.argv[1:]):
                figures[f"to the first step, {name}, s"] = min(first_step(root, *run) for _ in range(2))
    finally:
        shutil.rmtree(root)
    for name, value in figures.items():
        print(f"| {name} | {value:.3g} |")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2]))) if sys.argv[1:2] == ["--measure"] else main()
