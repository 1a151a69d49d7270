"""Half an hour of short epochs on small images in two processes: does anything grow, does it slow down?

    python -m tests.benchmarks.soak [MINUTES]

Watches every process of the run (two that train, their loading processes, torchrun's) twice a second, and prints for
each the resident memory, file descriptors and threads over the second and the last quarter, and the throughput of the
first and the last tenth. Exits with 1 where memory grows by more than 2 %, the usual count of a process changes (kNN
opens files for a moment), or throughput falls by more than 10 %.
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = (
    "-m torch.distributed.run --standalone --nproc-per-node=2 moco-non-sem-neg.py -a resnet10 --image-size 32"
    " --patch-ratio 4 12 -b 32 --moco-k 512 -j 2 --epochs 1000000 --knn --knn-freq 20 --save-freq 50 --keep 2"
)


def write_data(folder, images=320):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", images), ("val", 20)):
        for i in range(count):
            path = Path(folder, split, f"n0{i % 2}", f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.rand(3, 48, 48, generator=generator)).save(path)


def descendants(pid):
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listing.splitlines())}
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return [pid, *found]


def observe(pid):
    """(name, resident kB, file descriptors, threads) of a process; None once it is gone."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        memory, files = int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd"))
        return status["Name"].strip(), memory, files, int(status["Threads"])
    except (FileNotFoundError, KeyError, ProcessLookupError):
        return None


def main():
    seconds = 60 * float(sys.argv[1] if len(sys.argv) > 1 else 30)
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder)
        command = f"{COMMAND} --ckpt_path {folder}/run {folder}"
        command, environment = [sys.executable, *shlex.split(command)], {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
        log, seen, epochs = Path(folder, "run", "log.jsonl"), {}, []
        while not log.exists() or not log.read_text():  # imports and the first epoch are not part of it
            time.sleep(0.5)
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if run.poll() is not None:
                sys.exit(f"the run ended with {run.returncode}")
            for pid in descendants(run.pid):
                if (now := observe(pid)) is not None:
                    seen.setdefault(pid, []).append(now)
            epochs.append((time.monotonic(), log.read_text().count("\n")))
            time.sleep(0.5)
        run.terminate()
        run.wait()
    sys.exit(0 if report(seen, epochs) else 1)


def report(seen, epochs):
    good = True
    print(
        "| process | resident, MB, 2nd quarter | last quarter | change | file descriptors | threads |\n"
        "|---|---|---|---|---|---|"
    )
    longest = max(map(len, seen.values()))
    for pid, observations in seen.items():
        if len(observations) < longest / 2:  # the ps of this script, knn's loading processes
            continue
        quarter, (names, memory, *counted) = len(observations) // 4, zip(*observations)
        second, last = slice(quarter, 2 * quarter), slice(3 * quarter, None)
        before, after = (statistics.mean(memory[part]) / 1024 for part in (second, last))
        counts = [f"{min(values[quarter:])}–{max(values[quarter:])}" for values in counted]
        same = all(statistics.mode(values[second]) == statistics.mode(values[last]) for values in counted)
        good &= after < 1.02 * before and same
        change = f"{after / before - 1:+.2%}"
        print("|", " | ".join([f"{names[0]} {pid}", f"{before:.1f}", f"{after:.1f}", change, *counts]), "|")
    tenth = len(epochs) // 10
    times, counts = zip(*epochs)
    first = (counts[tenth] - counts[0]) / (times[tenth] - times[0])
    last = (counts[-1] - counts[-tenth]) / (times[-1] - times[-tenth])
    print(f"\n{counts[-1]} epochs; per second {first:.2f} in the first tenth, {last:.2f} in the last")
    return good and last > 0.9 * first


if __name__ == "__main__":
    main()
