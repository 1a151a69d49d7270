"""Running means without CPU-GPU syncs, log.jsonl, and the progress of an epoch."""

import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from tqdm import tqdm

from moco import distributed
from moco.training import files


class RunningMeans:
    """Means over steps of named tensors, 0-d or 1-d, accumulated on their device.

    Only `compute` is a CPU-GPU sync point. A mean that once was NaN or infinite stays so.
    """

    def __init__(self):
        self.sizes: dict[str, int | None] = {}  # of each named tensor; None if 0-d
        self.sums = torch.zeros(())
        self.steps = 0

    @torch.no_grad()
    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        self.sizes = {name: len(value) if value.dim() else None for name, value in values.items()}
        flat = torch.cat([value.detach().float().reshape(-1) for value in values.values()])
        self.sums = self.sums + flat if self.steps else flat
        self.steps += 1

    def compute(self, over_ranks: bool = False) -> dict[str, float | list[float]]:
        """{name: mean}; over_ranks: the mean over all ranks, which must all call this."""
        sums = self.sums.clone()
        if over_ranks:
            sums = distributed.all_reduce(sums) / distributed.world_size()
        rest = iter((sums / self.steps).tolist())
        return {name: next(rest) if n is None else list(itertools.islice(rest, n)) for name, n in self.sizes.items()}

    def state_dict(self) -> dict:
        """The sums of all ranks, which must all call this."""
        sums = distributed.gather(self.sums.unsqueeze(0)).cpu()
        return {"names": list(self.sizes), "sizes": list(self.sizes.values()), "sums": sums, "steps": self.steps}

    def load_state_dict(self, state: Mapping, device: torch.device) -> None:
        """Continue from a saved state; with another number of ranks, each takes the mean of their sums."""
        names, sums = state["names"], state["sums"]
        self.sizes = dict(zip(names, state.get("sizes", [None] * len(names))))
        same_world = len(sums) == distributed.world_size()
        self.sums = (sums[distributed.rank()] if same_world else sums.mean(dim=0)).to(device)
        self.steps = state["steps"]


def log_epoch(path: str, record: Mapping) -> int:
    """Add a line to the log, in place of those of this and later epochs; return how many damaged ones were dropped.

    record: of an epoch; of a probe, which may share the folder with its pre-training, under its own key `probe`. Floats
    keep six significant digits. The file is replaced as a whole: a copy of the folder by hard links keeps its own.
    """
    lines, damaged = read_jsonl(path)
    earlier = [line for line in lines if line.get("probe") != record.get("probe") or line["epoch"] < record["epoch"]]
    rounded = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}"))
    with files.atomic_write(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in [*earlier, rounded])
    return damaged


def read_jsonl(path: str) -> tuple[list[dict], int]:
    """The records of a log, and how many damaged lines it has: a crash may leave half a line, zeros or an empty one."""
    records, damaged = [], 0
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and type(record.get("epoch")) is int:
                records.append(record)
            else:
                damaged += 1
    return records, damaged


# Progress

SYMBOLS = {"q_k": "q·k", "q_t": "q·t", "q_queue": "q·queue"}


class Progress:
    """Iterate over an epoch's batches, measure the time spent waiting for them, and report.

    images_per_step: over all ranks; epochs_left: whole epochs after this one, for the ETA; first_step: where a resumed
    epoch begins.
    """

    def __init__(
        self, batches: Iterable, epoch: int, images_per_step: int, print_freq: int, epochs_left: int = 0, first_step=0
    ):
        self.batches, self.title, self.images_per_step = batches, f"epoch {epoch}", images_per_step
        self.print_freq, self.first_step, self.done = print_freq, first_step, first_step
        self.steps_after = len(batches) * epochs_left
        self.waited = 0.0

    def __iter__(self) -> Iterator:
        self.start = time.perf_counter()
        asked = time.perf_counter()
        for batch in self.batches:
            self.waited += time.perf_counter() - asked
            yield batch
            self.done += 1
            asked = time.perf_counter()

    def due(self) -> bool:
        """Whether the current step ends with a report, whose values are a CPU-GPU sync: once in print_freq steps."""
        step = self.done + 1
        return distributed.is_main() and (step % self.print_freq == 0 or step == len(self.batches))

    def report(self, means: Mapping[str, float | list[float]], lr: float | list[float]) -> None:
        images_per_s, waiting = self.speed().values()
        steps_left = len(self.batches) - self.done - 1 + self.steps_after
        eta = tqdm.format_interval(steps_left * self.images_per_step / images_per_s)
        figures = [f"{SYMBOLS.get(name, name)} {_text(value, '.3f')}" for name, value in means.items()]
        figures += [f"lr {_text(lr, '.4g')}", f"{images_per_s:.0f} images/s", f"data {waiting:.0%}", f"ETA {eta}"]
        print(f"{self.title} [{self.done + 1}/{len(self.batches)}]  {'  '.join(figures)}", flush=True)

    def speed(self) -> dict[str, float]:
        """Images per second over all ranks, and the share of time spent waiting for data, since the epoch began."""
        elapsed = time.perf_counter() - self.start
        steps = min(self.done + 1, len(self.batches)) - self.first_step
        return {"images_per_s": steps * self.images_per_step / elapsed, "data_share": self.waited / elapsed}


def _text(value: float | list[float], form: str) -> str:
    """The value, or those of all heads."""
    return " ".join(format(each, form) for each in (value if isinstance(value, list) else [value]))
