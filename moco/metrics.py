"""Exact accuracy counts, running means without waiting for the GPU, progress on the terminal, log.jsonl."""

import contextlib
import json
import os
import sys
import time

import torch
from tqdm import tqdm

from moco import distributed
from moco.failures import RunFailed


def correct_counts(logits, labels, ks=(1, 5)):
    """How many of the labels (N,) are among the k largest logits (N, classes), for each k: (len(ks),) int64."""
    ranked = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices == labels.view(-1, 1)
    return torch.stack([ranked[:, :k].sum() for k in ks])


class Means:
    """Means of named 0-d tensors over steps, kept on their device; `read` and `finite_steps` alone wait for it."""

    def __init__(self):
        self.names, self.sums, self.steps = (), 0, 0
        self._finite = 0

    @torch.no_grad()
    def add(self, values):
        self.names = tuple(values)
        self.sums = self.sums + torch.stack([value.detach().float() for value in values.values()])
        self._finite = self._finite + self.sums.isfinite().all()     # once infinite or NaN, a sum stays so
        self.steps += 1

    def finite_steps(self):
        """How many steps went by before the first with an infinite value or NaN; all of them if there was none."""
        return int(self._finite)

    def state(self):
        """What `restored` takes: the sums of all ranks, which must all call this."""
        return {"names": list(self.names), "sums": distributed.gather(self.sums.unsqueeze(0)).cpu(), "steps": self.steps}

    @classmethod
    def restored(cls, state, device):
        means, sums = cls(), state["sums"]
        means.names, means.steps, means._finite = tuple(state["names"]), state["steps"], state["steps"]
        means.sums = (sums[distributed.rank()] if len(sums) == distributed.world_size() else sums.mean(dim=0)).to(device)
        return means

    def read(self, over_ranks=False):
        """{name: mean}; over_ranks: the mean over all processes, which must all call this."""
        sums = self.sums.clone()
        if over_ranks:
            sums = distributed.all_reduce(sums) / distributed.world_size()
        return dict(zip(self.names, (sums / self.steps).tolist()))


class Progress:
    """One epoch's steps: a bar on a terminal, else a line every `print_freq` steps. Iterates over the loader,
    measuring the time it waits for data.

    images: images a step, over all processes; remaining_epochs: whole epochs after this one, for the ETA;
    first_step: where a resumed epoch begins.
    """

    def __init__(self, loader, title, images, print_freq, remaining_epochs=0, first_step=0):
        self.loader, self.title, self.images, self.print_freq = loader, title, images, print_freq
        self.steps_to_come = len(loader) * remaining_epochs
        self.waited, self.done, self.first_step = 0.0, first_step, first_step
        self.bar = None

    def __iter__(self):
        self.start = time.perf_counter()
        terminal = distributed.is_main() and sys.stderr.isatty()
        self.bar = tqdm(total=len(self.loader), initial=self.done, desc=self.title, unit="step") if terminal else None
        asked = time.perf_counter()
        for batch in self.loader:
            self.waited += time.perf_counter() - asked
            yield batch
            self.done += 1
            if self.bar:
                self.bar.update()
            asked = time.perf_counter()
        if self.bar:
            self.bar.close()

    def due(self):
        """Whether the step now running ends in a report. Reading its values then waits for the device: once in
        print_freq steps, nowhere else."""
        step = self.done + 1
        return distributed.is_main() and (step % self.print_freq == 0 or step == len(self.loader))

    def report(self, text):
        speed = self.speed()
        eta = (len(self.loader) - self.done - 1 + self.steps_to_come) * self.images / speed["images_per_s"]
        rates = f"{speed['images_per_s']:.0f} images/s  data {speed['data_share']:.0%}  ETA {_clock(eta)}"
        if self.bar:
            self.bar.set_postfix_str(f"{text}  {rates}")
        else:
            print(f"{self.title} [{self.done + 1}/{len(self.loader)}]  {text}  {rates}", flush=True)

    def speed(self):
        """Images a second of all processes and the share of time spent waiting for data, since the epoch began."""
        elapsed = time.perf_counter() - self.start
        steps = min(self.done + 1, len(self.loader)) - self.first_step
        return {"images_per_s": steps * self.images / elapsed, "data_share": self.waited / elapsed}


def _clock(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def append_jsonl(path, record):
    """Add one line to the log. Floats keep six significant digits."""
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in record.items()}
    with _writing(path), open(path, "a") as file:
        file.write(json.dumps(rounded) + "\n")


def keep_jsonl(path, before_epoch):
    """Drop the lines of `before_epoch` and later ones, which a resumed run will write again."""
    if os.path.exists(path):
        with open(path) as file:
            whole = [line for line in file if line.endswith("\n")]   # a killed process may leave half a line
        partial = f"{path}.partial"
        with _writing(path), open(partial, "w") as file:
            file.writelines(line for line in whole if json.loads(line)["epoch"] < before_epoch)
        os.replace(partial, path)


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{path} could not be written ({error}); make room, then go on with --resume auto") from error
