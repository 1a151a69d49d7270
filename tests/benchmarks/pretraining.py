"""Pre-training against the plain baseline of plain.py: every figure of the table in docs/speed.md.

    python -m tests.benchmarks.pretraining PHOTOS

PHOTOS: a folder of photos at ImageNet size. Plain and ours take turns; medians over the rounds and their ratio.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import default_collate

from moco import augment, distributed, memory, views
from moco.builder import MoCo
from moco.data.datasets import RetryDataset, TwoCrops
from moco.encoders import DTYPES, build_encoder
from tests.benchmarks import plain

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH = 16


def photos_in(folder):
    return sorted(str(path) for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


def in_batches(dataset, keys):
    """Batches of a dataset, as a loading process makes them."""
    for start in range(0, len(keys), BATCH):
        yield default_collate([dataset[key] for key in keys[start : start + BATCH]])


def plain_input(photos):
    for _ in in_batches(plain.Views(photos), range(len(photos))):
        pass


def our_loader(photos):
    dataset = RetryDataset(TwoCrops(photos, plain.SIZE), [0] * len(photos))
    for _ in in_batches(dataset, [(i, i) for i in range(len(photos))]):
        pass


def our_input(photos):
    rng = np.random.default_rng(0)
    dataset = RetryDataset(TwoCrops(photos, plain.SIZE), [0] * len(photos))
    for crops, _ in in_batches(dataset, [(i, i) for i in range(len(photos))]):
        views.training_views(crops, rng, recipe=augment.V2, robust="patch", num_nonsem=1, patch_ratio=plain.PATCH_SIDES)


class OurStep:
    """One training step of moco-non-sem-neg.py."""

    def __init__(self, arch, precision):
        self.model = MoCo(
            lambda num_classes: build_encoder(arch, num_classes),
            K=plain.K,
            T=plain.T,
            mlp=True,
            alpha=plain.ALPHA,
            dtype=DTYPES[precision],
        ).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)

    def step(self, query, key, negative):
        logits, labels = self.model(query, key, negative.unsqueeze(1))
        self.optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        self.optimizer.step()

    def step_without_encoders(self):
        """The rest of it: features are given, gradients of the weights are those of the last step."""
        features = F.normalize(torch.randn(BATCH, 128), dim=1).requires_grad_()
        images = torch.empty(BATCH, 3, 1, 1)
        self.model._features = lambda encoder, images: features
        try:
            logits, labels = self.model(images, images, images.unsqueeze(1))
        finally:
            del self.model._features
        F.cross_entropy(logits, labels).backward()
        self.optimizer.step()


@functools.cache
def trainer(kind):
    return plain.Trainer("resnet50") if kind == "plain" else OurStep("resnet50", kind)


@functools.cache
def batch():
    return [torch.randn(BATCH, 3, plain.SIZE, plain.SIZE) for _ in range(3)]


def step(kind):
    trainer(kind).step(*batch())


def step_without_encoders(kind):
    trainer(kind).step_without_encoders()


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def own_process(kind, threads):
    """A process for one of the two sides: what ours does to its memory must not serve plain."""
    return multiprocessing.get_context("spawn").Pool(1, _set_up, (kind, threads))


def _set_up(kind, threads):
    torch.set_num_threads(threads)
    if kind != "plain":
        memory.keep_freed_memory(torch.device("cpu"))


def medians(rounds, threads, **calls):
    """{name: median seconds} of calls (kind, function, *arguments). They take turns, and the first turn warms up. Calls
    of one kind share a process."""
    with contextlib.ExitStack() as stack:
        processes = {
            kind: stack.enter_context(own_process(kind, threads)) for kind in {call[0] for call in calls.values()}
        }
        times = [
            {name: processes[kind].apply(seconds, call) for name, (kind, *call) in calls.items()}
            for _ in range(rounds + 1)
        ][1:]
    return {name: statistics.median(turn[name] for turn in times) for name in calls}


def peak_memory(kind, function, photos):
    """MB that a fresh process with one thread takes at most while it runs function(photos)."""
    with own_process(kind, threads=1) as process:
        return process.apply(_peak_memory, (function, photos))


def _peak_memory(function, photos):
    function(photos)
    # Not getrusage's maximum, which a new process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def shuffled_bytes(world=4):
    """Bytes that a rank receives for the key images of a step: with plain's gathering, and ours in fp32 and bf16."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_count_bytes, (world, folder), nprocs=world)
        counts = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world)]
    return [sum(values) / world for values in zip(*counts)]


def _count_bytes(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=world, rank=rank)
    exchange, received = dist.all_to_all_single, 0

    def counted(output, *rest):
        nonlocal received
        received = output.nbytes
        return exchange(output, *rest)

    dist.all_to_all_single = counted
    images = torch.randn(BATCH, 3, plain.SIZE, plain.SIZE)
    counts = [distributed.gather(images).nbytes]
    for dtype in (torch.float32, torch.bfloat16):
        distributed.batch_shuffle(images.to(dtype))
        counts.append(received)
    Path(folder, str(rank)).write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


def end_to_end(photos, workers=2, rounds=3):
    """Images per second of the scripts, each in a process of its own: {name: median}."""
    speeds = {"plain": [], "fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        for copy in range(4):
            shutil.copytree(photos, Path(folder, "train", f"n{copy}"))

        def run(*command):
            return subprocess.run(
                [sys.executable, *map(str, command)], cwd=REPOSITORY, check=True, capture_output=True, text=True
            ).stdout

        for turn in range(rounds):
            speeds["plain"].append(float(run("tests/benchmarks/plain.py", "resnet18", BATCH, workers, 2, folder)))
            for precision in ("fp32", "bf16"):
                out = Path(folder, f"{precision}-{turn}")
                run(
                    "moco-non-sem-neg.py",
                    "-a",
                    "resnet18",
                    "-b",
                    BATCH,
                    "-j",
                    workers,
                    "--epochs",
                    2,
                    "--mlp",
                    "--aug-plus",
                    "--moco-t",
                    plain.T,
                    "--alpha",
                    plain.ALPHA,
                    "--patch-ratio",
                    *plain.PATCH_SIDES,
                    "--precision",
                    precision,
                    "--ckpt_path",
                    out,
                    folder,
                )
                speeds[precision].append(json.loads((out / "log.jsonl").read_text().splitlines()[-1])["images_per_s"])
    return {name: statistics.median(values) for name, values in speeds.items()}


def row(what, plain_figure, our_figure, ratio):
    print(f"| {what} | {plain_figure} | {our_figure} | {ratio} |", flush=True)


def main():
    photos = photos_in(sys.argv[1])
    cores = len(os.sched_getaffinity(0))
    print(f"{len(photos)} photos, {plain.SIZE} px, patch negatives, {cores} cores, torch {torch.__version__}\n")
    print("| | plain | here | ratio |\n|---|---|---|---|")

    times = medians(
        5,
        1,
        plain=("plain", plain_input, photos),
        loader=("ours", our_loader, photos),
        input=("ours", our_input, photos),
    )
    each = {name: 1000 * value / len(photos) for name, value in times.items()}
    row(
        "a loading process, ms per image",
        f"{each['plain']:.1f}",
        f"{each['loader']:.2f}",
        f"{each['plain'] / each['loader']:.1f}",
    )
    row(
        "whole input path on one core, ms per image",
        f"{each['plain']:.1f}",
        f"{each['input']:.2f}",
        f"{each['plain'] / each['input']:.2f}",
    )
    theirs = peak_memory("plain", plain_input, photos)
    for what, function in (("a loading process", our_loader), ("the input path's process", our_input)):
        ours = peak_memory("ours", function, photos)
        row(f"peak memory of {what}, MB", f"{theirs:.0f}", f"{ours:.0f}", f"{theirs / ours:.2f}")

    times = medians(
        5,
        cores,
        plain=("plain", step, "plain"),
        fp32=("fp32", step, "fp32"),
        bf16=("bf16", step, "bf16"),
        rest=("bf16", step_without_encoders, "bf16"),
    )
    for precision in ("fp32", "bf16"):
        row(
            f"training step, ResNet-50, {BATCH} images, K {plain.K}, {precision}, s",
            f"{times['plain']:.2f}",
            f"{times[precision]:.2f}",
            f"{times['plain'] / times[precision]:.2f}",
        )
    row("of the bf16 step, what is not an encoder pass", "", f"{times['rest'] / times['bf16']:.1%}", "")

    gathered, *dealt = shuffled_bytes()
    for name, received in zip(("fp32", "bf16"), dealt):
        row(
            f"shuffling over 4 ranks, {name}, MB received by a rank",
            f"{gathered / 2**20:.1f}",
            f"{received / 2**20:.2f}",
            f"{gathered / received:.1f}",
        )

    speeds = end_to_end(sys.argv[1])
    for precision in ("fp32", "bf16"):
        row(
            f"the script, ResNet-18, -j 2, {precision}, images/s",
            f"{speeds['plain']:.1f}",
            f"{speeds[precision]:.1f}",
            f"{speeds[precision] / speeds['plain']:.2f}",
        )


if __name__ == "__main__":
    main()
