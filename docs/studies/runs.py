"""Runs of a study: stages of them, the repository's scripts on one thread each, and a JSON line for each result."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]


def read_results(path: Path) -> dict[str, dict]:
    """{name of the run: its line}; {} where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def script(log: Path, *arguments: object) -> float:
    """Run one of the repository's scripts on one thread, its output appended to `log`; returns its wall time, s."""
    start = time.monotonic()
    with log.open("a") as file:
        subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=True,
        )
    return time.monotonic() - start


def work_through(
    work: Path,
    jobs: int,
    stages: Callable[[Mapping[str, dict]], Mapping[str, Sequence[NamedTuple]]],
    measure: Callable[[NamedTuple], dict],
    make_data: Callable[[str], object],
    only: Sequence[str] = (),
) -> None:
    """Work through the stages that are named, or all, `jobs` runs at a time.

    stages: {stage: its runs, which have `name` and `data`}, given the results so far; measure(run): its line of
    work/results.jsonl. Runs with a line there are not repeated, so that it can be stopped and restarted.
    """
    work.mkdir(parents=True, exist_ok=True)
    path, lock = work / "results.jsonl", threading.Lock()

    def one(run: NamedTuple) -> None:
        line = measure(run)
        with lock, path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['finished']}  {run.name}  {line['figures']}", flush=True)

    for stage in stages({}):
        if only and stage not in only:
            continue
        results = read_results(path)
        todo = [run for run in stages(results)[stage] if run.name not in results]
        for data in sorted({run.data for run in todo}):
            make_data(data)
        print(f"{stage}: {len(todo)} runs to do", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(one, todo):
                pass
