"""One epoch's progress: a bar on a terminal, a line every `print_freq` steps in a log."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping

from tqdm import tqdm

from moco import distributed

# The figures come first and the bar takes what is left, so that 80 columns cut off the bar and not the figures.
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}|"
SYMBOLS = {"q_k": "q·k", "q_t": "q·t", "q_queue": "q·queue"}
WATCHED = ("q_k", "q_t", "spread")  # on the bar, where they are among the figures


class Progress:
    """Iterate over an epoch's batches, measure the time spent waiting for them, and report.

    images_per_step: over all ranks; epochs_left: whole epochs after this one, for the ETA; first_step: where a resumed
    epoch begins.
    """

    def __init__(
        self,
        batches: Iterable,
        epoch: int,
        images_per_step: int,
        print_freq: int,
        epochs_left: int = 0,
        first_step: int = 0,
    ):
        self.batches, self.title, self.images_per_step = batches, f"epoch {epoch}", images_per_step
        self.print_freq, self.first_step, self.done = print_freq, first_step, first_step
        self.steps_after = len(batches) * epochs_left
        self.waited = 0.0
        self.bar = None

    def __iter__(self) -> Iterator:
        self.start = time.perf_counter()
        if distributed.is_main() and sys.stderr.isatty():
            self.bar = tqdm(
                total=len(self.batches), initial=self.done, desc=self.title, bar_format=BAR_FORMAT, dynamic_ncols=True
            )
        asked = time.perf_counter()
        for batch in self.batches:
            self.waited += time.perf_counter() - asked
            yield batch
            self.done += 1
            if self.bar:
                self.bar.update()
            asked = time.perf_counter()
        if self.bar:
            self.bar.close()

    def due(self) -> bool:
        """Whether the current step ends with a report, whose values are a CPU-GPU sync: once in print_freq steps."""
        step = self.done + 1
        return distributed.is_main() and (step % self.print_freq == 0 or step == len(self.batches))

    def report(self, means: Mapping[str, float | list[float]], lr: float | list[float]) -> None:
        speed = self.speed()
        steps_left = len(self.batches) - self.done - 1 + self.steps_after
        eta = f"ETA {_clock(steps_left * self.images_per_step / speed['images_per_s'])}"
        rate = f"{speed['images_per_s']:.0f} images/s"
        if self.bar:
            watched = {name: means[name] for name in WATCHED if name in means} or means
            self.bar.set_description_str(" ".join([self.title, *_figures(watched), rate, eta]))
        else:
            figures = [*_figures(means), f"lr {_text(lr, '.4g')}", rate, f"data {speed['data_share']:.0%}", eta]
            print(f"{self.title} [{self.done + 1}/{len(self.batches)}]  {'  '.join(figures)}", flush=True)

    def speed(self) -> dict[str, float]:
        """Images per second over all ranks, and the share of time spent waiting for data, since the epoch began."""
        elapsed = time.perf_counter() - self.start
        steps = min(self.done + 1, len(self.batches)) - self.first_step
        return {"images_per_s": steps * self.images_per_step / elapsed, "data_share": self.waited / elapsed}


def _figures(means: Mapping[str, float | list[float]]) -> list[str]:
    return [f"{SYMBOLS.get(name, name)} {_text(value, '.3f')}" for name, value in means.items()]


def _text(value: float | list[float], form: str) -> str:
    return " ".join(format(item, form) for item in value) if isinstance(value, list) else format(value, form)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
