"""Repeat the study of docs/effect.md: what non-semantic negatives do on the generated data and on FashionMNIST.

    python -m tests.benchmarks.effect run --work effect-work --jobs 2       # 5 hours on two cores; can be stopped and restarted
    python -m tests.benchmarks.effect report --results docs/effect.jsonl --docs docs     # tables and pictures from the results

`run` trains, probes and tests with the three scripts, as a user would, and appends a JSON line to WORK/results.jsonl for
each finished run; runs with a line there are not repeated. `report` rewrites the tables between the marks in docs/effect.md.
The seeds below were fixed before the first result; none is left out.
"""

import argparse
import datetime
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "preprocess"))                    # shapes, for this file and effect_mechanism

DATA_SEED, SECOND_DATA_SEED = 2001, 2002
SEEDS, SECOND_SEEDS = (101, 102, 103, 104, 105), (106, 107, 108)
DEFAULTS = {"lr": 0.06, "moco-k": 512, "moco-t": 0.2, "epochs": 20}   # what the study varies, with alpha
PRETRAIN = ("-a resnet10 --image-size 56 --batch-size 64 -j 1 --mlp --moco-m 0.99 --aug-plus --cos --patch-ratio 4 18"
            " --precision bf16 --print-freq 62").split()
PROBE = "-a resnet10 -j 1 --lr 0.1 --batch-size 128 --epochs 20 --schedule 8 14 18 --precision bf16 --print-freq 1000".split()
COLUMNS = {"val": "val", "Corruption": "Corruption", "Sketch": "Sketch", "Stylized": "Stylized", "Rendition": "Rendition",
           "Shape bias": "Shape bias"}


class Run(NamedTuple):
    """One pre-training with its probe and tests."""

    data: str                       # "shapes-2001", "fashion"
    alpha: float | None             # None: no negatives, plain MoCo v2
    seed: int
    settings: tuple = ()            # (name, value) that differ from DEFAULTS

    @property
    def name(self) -> str:
        parts = ["plain" if self.alpha is None else f"alpha{self.alpha:g}", *(f"{name}{value:g}" for name, value in self.settings)]
        return f"{self.data}_{'_'.join(parts)}_seed{self.seed}"

    def pretraining_options(self) -> list[str]:
        options = [f"--{name}={value:g}" for name, value in (DEFAULTS | dict(self.settings)).items()]
        negatives = ["--robust=none"] if self.alpha is None else ["--robust=patch", f"--alpha={self.alpha:g}"]
        return [*options, *negatives, f"--seed={self.seed}"]


def changed(**settings: float) -> tuple:
    """Settings as a Run keeps them: without those that are the defaults."""
    named = {name.replace("_", "-"): value for name, value in settings.items()}
    return tuple((name, value) for name, value in named.items() if DEFAULTS[name] != value)


MAIN = f"shapes-{DATA_SEED}"
GRID = [changed(lr=lr, moco_k=k, moco_t=t) for lr, k, t in itertools.product((0.06, 0.03, 0.12), (512, 2048), (0.2, 0.1))]


def stages(results: dict[str, dict]) -> dict[str, list[Run]]:
    """All runs, in order. Which settings are plain's best follows from the grid's val accuracies, once they are there."""
    queue = {
        "paired": [Run(MAIN, alpha, seed) for seed in SEEDS for alpha in (None, 2)],
        "sweep": [Run(MAIN, alpha, seed) for seed in SEEDS[:3] for alpha in (2.5, 3, 1, 1.5)],
        "grid": [Run(MAIN, None, SEEDS[0], settings) for settings in GRID],
        "equal time": [Run(MAIN, None, seed, changed(epochs=24)) for seed in SEEDS],
    }
    best = best_settings(results)
    queue["best"] = [Run(MAIN, None, seed, best) for seed in SEEDS] if best is not None else []
    queue["fashion"] = [Run("fashion", alpha, seed) for seed in SEEDS[:3] for alpha in (None, 2)]
    queue["best, alpha 2"] = [Run(MAIN, 2, seed, best) for seed in SEEDS] if best is not None else []
    queue["second data seed"] = [Run(f"shapes-{SECOND_DATA_SEED}", alpha, seed) for seed in SECOND_SEEDS for alpha in (None, 2)]
    queue["alpha 0"] = [Run(MAIN, 0, seed) for seed in SEEDS[:3]]
    return queue


def best_settings(results: dict[str, dict]) -> tuple | None:
    """The settings of the grid at which plain MoCo's val is highest; None until the grid is complete."""
    found = {settings: results.get(Run(MAIN, None, SEEDS[0], settings).name) for settings in GRID}
    if None in found.values():
        return None
    return max(found, key=lambda settings: found[settings]["figures"]["val"])


def read_results(path: Path) -> dict[str, dict]:
    """{name of the run: its line}; {} where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


# --- running

def script(log: Path, *arguments: object) -> float:
    """Run one of the repository's scripts on one thread, its output appended to `log`; returns its wall time, s."""
    start = time.monotonic()
    with log.open("a") as file:
        subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
                       stdout=file, stderr=subprocess.STDOUT, check=True)
    return time.monotonic() - start


def make_data(work: Path, name: str) -> Path:
    """The data set of that name below `work`, made if it is not there."""
    folder = work / name
    log = work / "data.log"
    if name.startswith("shapes-"):
        script(log, "preprocess/shapes.py", "--out", folder, "--seed", name.removeprefix("shapes-"), "--workers", 1)
    elif not (folder / "complete").exists():
        from tests.benchmarks import effect_fashion
        script(log, "preprocess/torchvision_folders.py", "--dataset", "fashionmnist", "--root", effect_fashion.RAW,
               "--out", work / "fashion-all")
        effect_fashion.subset(work / "fashion-all", folder)
        (folder / "complete").touch()
    return folder


def measure(run: Run, work: Path, data: Path) -> dict:
    """Pre-train, probe and test one run: its line of the results."""
    folder = work / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    epochs = dict(DEFAULTS | dict(run.settings))["epochs"]
    last = f"{epochs - 1:04}.pth.tar"
    seconds = {"pretrain": script(log, "moco-non-sem-neg.py", *PRETRAIN, *run.pretraining_options(), "--ckpt_path", folder,
                                  "--resume", "auto", data)}
    seconds["probe"] = script(log, "main_lincls.py", *PROBE, f"--seed={run.seed}", "--pretrained", folder / f"checkpoint_{last}",
                              "--ckpt_path", folder, data)
    head = folder / f"checkpoint_robust_{last}"                      # after the last epoch: none is chosen by val
    suites = [argument for suite, place in (("val", ""), ("corruption", "corruption"), ("sketch", "sketch"),
                                            ("stylized", "stylized"), ("rendition", "rendition"))
              if (data / place).is_dir() for argument in (f"--{suite}", data / place)]
    report = folder / "table.json"
    seconds["test"] = script(log, "eval_robustness.py", "-j", 1, "--pretrained", f"row={head}", *suites, "--json", report)
    figures = {column: value for column, (value,) in json.loads(report.read_text())["table"]["row"].items()}
    training = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    line = {"name": run.name, "data": run.data, "alpha": run.alpha, "seed": run.seed, "settings": dict(run.settings),
            "figures": figures, "last_epoch": training, "seconds": seconds,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    for path in folder.glob("*.pth.tar"):
        if path != head:
            path.unlink()
    return line


def run_all(work: Path, jobs: int, only: list[str]) -> None:
    """Work through the stages; each finished run is a line of work/results.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    path, lock = work / "results.jsonl", threading.Lock()

    def one(run: Run) -> None:
        line = measure(run, work, work / run.data)
        with lock, path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['finished']}  {run.name}  {line['figures']}", flush=True)

    for stage in stages({}):
        if only and stage not in only:
            continue
        results = read_results(path)
        todo = [run for run in stages(results)[stage] if run.name not in results]
        for data in sorted({run.data for run in todo}):
            make_data(work, data)
        print(f"{stage}: {len(todo)} runs to do", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(one, todo):
                pass


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Repeat the study of docs/effect.md.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, probe and test what is not done yet")
    run.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of data, runs and results.jsonl")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, one thread each (default: 1)")
    run.add_argument("--only", nargs="+", default=[], choices=list(stages({})), metavar="STAGE",
                     help=f"these stages only: {', '.join(stages({}))}")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    run_all(args.work.resolve(), args.jobs, args.only)


if __name__ == "__main__":
    main()
