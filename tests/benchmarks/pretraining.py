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
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import default_collate

from moco import augment, distributed, encoders, views
from moco.data.datasets import RetryDataset, TwoCrops
from tests.benchmarks import ours, plain
from tests.benchmarks.ours import row

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


def our_loader(photos, prepare=lambda crops: None):
    dataset = RetryDataset(TwoCrops(photos, plain.SIZE), [0] * len(photos))
    for crops, _ in in_batches(dataset, [(i, i) for i in range(len(photos))]):
        prepare(crops)


def our_input(photos):
    options = {"recipe": augment.V2, "robust": "patch", "num_nonsem": 1, "patch_ratio": plain.PATCH_SIDES}
    our_loader(photos, functools.partial(views.training_views, rng=np.random.default_rng(0), **options))


class OurStep(ours.Training):
    def step_without_encoders(self):
        """The rest of the step: features are given, gradients of the weights are those of the last step."""
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
    query, key, negative = batch()
    trainer(kind).step(query, key, negative if kind == "plain" else negative.unsqueeze(1))


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
        encoders.configure_device(torch.device("cpu"), strict_fp32=False, deterministic=False)


def medians(rounds, threads, **calls):
    """{name: median seconds} of calls (kind, function, *arguments). They take turns; a kind has its own process."""
    times = {name: [] for name in calls}
    with contextlib.ExitStack() as stack:
        kinds = {kind for kind, *_ in calls.values()}
        processes = {kind: stack.enter_context(own_process(kind, threads)) for kind in kinds}
        for _ in range(rounds + 1):
            for name, (kind, *call) in calls.items():
                times[name].append(processes[kind].apply(seconds, call))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first turn warms up


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
        distributed.exchange_rows(images.to(dtype), distributed.draw_shuffle(len(images)))
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
        options = ["-a", "resnet18", "-b", BATCH, "-j", workers, "--epochs", 2, "--patch-ratio", *plain.PATCH_SIDES]
        for _ in range(rounds):
            speeds["plain"].append(float(ours.run("tests/benchmarks/plain.py", "resnet18", BATCH, workers, 2, folder)))
            for precision in ("fp32", "bf16"):
                last = ours.pretrain(folder, *options, "--precision", precision)
                speeds[precision].append(last["images_per_s"])
    return {name: statistics.median(values) for name, values in speeds.items()}


def compare(what, plain_figure, our_figure, digits=".1f", ratio=None):
    """A row of the table; the ratio is plain's figure over ours unless it is given."""
    ratio = plain_figure / our_figure if ratio is None else ratio
    row(what, f"{plain_figure:{digits}}", f"{our_figure:{digits}}", f"{ratio:.2f}")


def main():
    photos = photos_in(sys.argv[1])
    cores = len(os.sched_getaffinity(0))
    print(f"{len(photos)} photos, {plain.SIZE} px, patch negatives, {cores} cores, torch {torch.__version__}\n")
    row("", "plain", "here", "ratio")
    row(*["---"] * 4)

    inputs = {"plain": ("plain", plain_input), "loader": ("ours", our_loader), "input": ("ours", our_input)}
    times = medians(5, 1, **{name: (*call, photos) for name, call in inputs.items()})
    each = {name: 1000 * value / len(photos) for name, value in times.items()}
    compare("a loading process, ms per image", each["plain"], each["loader"], ".2f")
    compare("whole input path on one core, ms per image", each["plain"], each["input"], ".2f")
    theirs = peak_memory("plain", plain_input, photos)
    compare("peak memory of a loading process, MB", theirs, peak_memory("ours", our_loader, photos), ".0f")
    compare("peak memory of the input path's process, MB", theirs, peak_memory("ours", our_input, photos), ".0f")

    calls = {kind: (kind, step, kind) for kind in ("plain", "fp32", "bf16")}
    times = medians(5, cores, **calls, rest=("bf16", step_without_encoders, "bf16"))
    for precision in ("fp32", "bf16"):
        name = f"training step, ResNet-50, {BATCH} images, K {plain.K}, {precision}, s"
        compare(name, times["plain"], times[precision], ".2f")
    row("of the bf16 step, what is not an encoder pass", "", f"{times['rest'] / times['bf16']:.1%}", "")

    gathered, *dealt = (count / 2**20 for count in shuffled_bytes())
    for name, received in zip(("fp32", "bf16"), dealt):
        compare(f"shuffling over 4 ranks, {name}, MB received by a rank", gathered, received, ".2f")

    speeds = end_to_end(sys.argv[1])
    for precision in ("fp32", "bf16"):
        ratio = speeds[precision] / speeds["plain"]
        compare(f"the script, ResNet-18, -j 2, {precision}, images/s", speeds["plain"], speeds[precision], ratio=ratio)


if __name__ == "__main__":
    main()
