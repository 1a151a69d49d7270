"""Pre-training on a GPU: the whole script beside what limits it, and beside the plain baseline of plain.py.

    python -m tests.benchmarks.gpu [--photos FOLDER] [--trace FILE.json]      about 25 minutes, on one GPU
    python -m tests.benchmarks.gpu --short [--trace FILE.json]                5 minutes: the trace, one batch size
    python -m tests.benchmarks.gpu --tiny                                     tries this script on any machine

Prints a table for docs/speed.md. "limit": the same model and optimizer on images that are on the GPU already; the
script should reach 90 % of it while its loaders keep up (data: the share of time it waits for them). Without --photos
it writes JPEGs at ImageNet's usual size. The trace, for Perfetto, shows whether copies run beside kernels.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moco import augment
from moco.data import loader
from moco.encoders import configure_device
from moco.views import training_views
from tests.benchmarks import ours, plain
from tests.benchmarks.ours import row

KINDS = [("fp32", False), ("bf16", False), ("bf16", True)]  # precision, whether compiled
FULL = {
    "arch": "resnet50", "size": plain.SIZE, "patches": plain.PATCH_SIDES, "K": plain.K, "batches": (256, 32),
    "photos": 512, "links": 32, "workers": (4, 8, 16), "steps": 20, "kinds": KINDS, "plain": "resnet50",
}  # fmt: skip
SHORT = FULL | {"batches": (256,), "links": 16, "workers": (16,)}
TINY = {
    "arch": "resnet10", "size": 32, "patches": (4, 12), "K": 64, "batches": (8,), "photos": 4, "links": 4,
    "workers": (1,), "steps": 2, "kinds": KINDS[:2], "plain": "resnet18",  # it knows torchvision's networks only
}  # fmt: skip


class Training(ours.Training):
    """The training step of the script on one device, with the sizes of a case."""

    def __init__(self, case, precision, compiled, device):
        super().__init__(case["arch"], precision, device, compiled, case["K"])
        self.case, self.device = case, device

    def images_per_s(self, batch_size):
        """On images that are on the device already."""
        shape = (batch_size, 3, self.case["size"], self.case["size"])
        query, key, negative = (torch.randn(shape, device=self.device) for _ in range(3))
        for steps in (5, self.case["steps"]):  # the first to warm up
            finish(self.device)
            start = time.perf_counter()
            for _ in range(steps):
                self.step(query, key, negative.unsqueeze(1))
            finish(self.device)
        return batch_size * steps / (time.perf_counter() - start)

    def prefetched_steps(self, batch_size, steps):
        """Steps on crops that are on the host, as the script's loaders give them."""
        size = self.case["size"]
        crops = torch.randint(256, (batch_size, 2, 3, size, size), dtype=torch.uint8)
        crops = crops.pin_memory() if self.device.type == "cuda" else crops
        options = {"recipe": augment.V2, "robust": "patch", "num_nonsem": 1, "patch_ratio": self.case["patches"]}

        def prepare(batch, step):
            batch = batch.to(self.device, non_blocking=True)
            return training_views(batch, np.random.default_rng(step), **options)

        for views, _ in loader.prefetch(itertools.repeat((crops, []), steps), prepare, self.device):
            self.step(*views)
        finish(self.device)


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_photos(folder, count):
    """JPEGs of 500×375 px that are about as large as ImageNet's, 110 KB."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noise = rng.integers(-16, 17, (375, 500, 3))
        photo = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"{i}.jpg", quality=90)


def script(case, folder, batch_size, precision, compiled, workers):
    """(images/s, share of time spent waiting for data) of the script's last epoch, of three."""
    last = ours.pretrain(
        folder, "-a", case["arch"], "--image-size", case["size"], "--patch-ratio", *case["patches"], "-b", batch_size,
        "--moco-k", case["K"], "-j", workers, "--epochs", 3, "--precision", precision, *["--compile"] * compiled,
    )  # fmt: skip
    return last["images_per_s"], last["data_share"]


def overlap(trace):
    """The share of the time of copies to the GPU during which a kernel of another stream runs."""
    events = [event for event in json.loads(Path(trace).read_text())["traceEvents"] if event.get("ph") == "X"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    hidden = total = 0.0
    for copy in copies:
        start, end = copy["ts"], copy["ts"] + copy["dur"]
        covered = start
        for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
            if kernel["args"]["stream"] != copy["args"]["stream"]:
                first, last = max(covered, kernel["ts"]), min(end, kernel["ts"] + kernel["dur"])
                hidden, covered = hidden + max(0.0, last - first), max(covered, last)
        total += end - start
    return hidden / total if total else None


def write_trace(case, batch_size, path, device):
    training = Training(case, *case["kinds"][-2], device)
    training.prefetched_steps(batch_size, 3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        training.prefetched_steps(batch_size, 6)
    profile.export_chrome_trace(str(path))


def describe(device, arguments):
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    cores = len(os.sched_getaffinity(0))
    print(
        f"*Measured here*: `python -m tests.benchmarks.gpu {' '.join(arguments)}`, {card}, {cores} cores, torch"
        f" {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()},"
        f" {time.strftime('%Y-%m-%d')}\n"
    )


def speeds(case, folder, device):
    row(f"{case['arch']}, {case['size']} px, K {case['K']}", "limit", "script", "of the limit", "data", "plain")
    row("---", "---", "---", "---", "---", "---")
    workers = max(case["workers"])
    for batch_size in case["batches"]:
        baseline = float(ours.run("tests/benchmarks/plain.py", case["plain"], batch_size, workers, 1, folder))
        for precision, compiled in case["kinds"]:
            limit = Training(case, precision, compiled, device).images_per_s(batch_size)
            speed, share = script(case, folder, batch_size, precision, compiled, workers)
            name = f"batch {batch_size}, {precision}{' --compile' if compiled else ''}, images/s"
            row(name, f"{limit:.0f}", f"{speed:.0f}", f"{speed / limit:.0%}", f"{share:.0%}", f"{baseline:.0f}")
            torch.cuda.empty_cache()


def worker_shares(case, folder):
    print()
    row("workers", "images/s", "data")
    row("---", "---", "---")
    for workers in case["workers"]:
        speed, share = script(case, folder, case["batches"][0], *case["kinds"][-2], workers)
        row(str(workers), f"{speed:.0f}", f"{share:.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="a folder of photos at ImageNet's size")
    parser.add_argument("--trace", default="gpu-trace.json", help="where to write the profiler's trace")
    parser.add_argument("--short", action="store_true", help="the most important figures, in 5 minutes")
    parser.add_argument("--tiny", action="store_true", help="small sizes, also without a GPU")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        raise SystemExit("there is no CUDA GPU; --tiny tries this script on the CPU")
    case = TINY if args.tiny else SHORT if args.short else FULL
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    configure_device(device, strict_fp32=False, deterministic=False)
    describe(device, sys.argv[1:])
    write_trace(case, case["batches"][-1], args.trace, device)
    hidden = overlap(args.trace)
    print(f"Copies to the GPU beside kernels of another stream: {hidden:.0%} of their time" if hidden else "No copies.")
    print(f"The trace is {args.trace}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        photos, data = Path(folder, "photos"), Path(folder, "data")
        if args.photos:
            shutil.copytree(args.photos, photos)
        else:
            write_photos(photos, case["photos"])
        for link in range(case["links"]):  # hard links: the script refuses symbolic ones to the same files
            shutil.copytree(photos, data / "train" / f"n{link}", copy_function=os.link)
        speeds(case, data, device)
        if len(case["workers"]) > 1 or args.tiny:
            worker_shares(case, data)


if __name__ == "__main__":
    main()
