"""A training run around its loop: resume, save, log, report, and stop on a signal."""

import argparse
import contextlib
import math
import operator
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch.utils.data import DataLoader

from moco import distributed
from moco.data.loader import GlobalBatchSampler, prefetch
from moco.distributed import DistContext
from moco.errors import Finished, RunError, UsageError, one_line
from moco.processes import environment
from moco.processes.exits import exit_now
from moco.processes.signals import StopSignal, StopWaiting
from moco.training import checkpoint, files, metrics

LOG = "log.jsonl"
SAVE_SECONDS = 60  # before the latest state is written again after an epoch: all ranks wait for it
WITHIN_EPOCH = {"seed", "images", "images_per_step"}  # what the order of the data follows from


class Run:
    """The state of a run and its files. It never calls the model and owns no loop:

        run.resume(saved)
        for epoch in range(run.epoch, args.epochs):
            for batch in run.steps(loader, prepare, epoch):
                ...                              # forward, backward, optimizer step
                run.after_step(loss=loss)        # may save, or end the run
            run.end_epoch(run.epoch_stats(), [])

    args: ckpt_path, the folder of checkpoints and log.jsonl; epochs, precision, print_freq, save_steps, max_bad_images.
    latest: name of the checkpoint that is written after an epoch (if the last time was SAVE_SECONDS ago, and always
    after the first and the last), beside every other, every `save_steps` steps and on a signal; also at once if another
    one is resumed, whose run the log and `--resume auto` then follow.
    state(): the script's own part of a checkpoint. probe: a key of this run's lines in the log, if it is a probe, which
    may share the folder with its pre-training.
    """

    def __init__(
        self, ctx: DistContext, args: argparse.Namespace, seed: int, *, latest: str, state: Callable[[], dict],
        sampler: GlobalBatchSampler, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None,
        probe: str | None = None,
    ):  # fmt: skip
        self.ctx, self.args, self.seed, self.latest, self.state = ctx, args, seed, latest, state
        self.sampler, self.optimizer, self.scaler, self.probe = sampler, optimizer, scaler, probe
        self.stop = StopSignal()
        # {path: reason} of unreadable images, which all ranks know: of this run and, until met again, of the one it
        # resumes, since they may have been repaired; then those met by this process, and the epoch's count.
        self.bad_images, self.bad_now, self.bad_in_epoch = {}, set(), 0
        self.means = metrics.RunningMeans()
        self.epoch = self.step = 0  # whole epochs done, and steps of the epoch after them
        self.saved_at, self.due = -math.inf, 0  # when rank 0 wrote `latest`; whether an epoch's end is to
        self.signum = 0  # of a stop signal that came to any rank by the end of an epoch

    def resume(self, saved: Mapping) -> None:
        """Continue from a checkpoint that `save` wrote; an empty one starts at --start-epoch.

        Restores all but the script's own part. All ranks must call this.
        """
        self.epoch, self.step = saved.get("epoch", self.args.start_epoch), saved.get("step", 0)
        self.first_epoch = self.epoch
        if saved:
            momenta = saved["optimizers"] if "optimizers" in saved else saved.get("optimizer")
            checkpoint.load_optimizer(self.optimizer, momenta)
            if self.scaler is not None and saved.get("scaler"):  # empty if it was saved in another precision
                self.scaler.load_state_dict(saved["scaler"])
            self.bad_images, self.bad_in_epoch = dict(saved.get("bad_images", {})), saved.get("bad_in_epoch", 0)
        if self.step:
            self.means.load_state_dict(saved["means"], self.ctx.device)
        latest = self._path(self.latest)
        if saved and not (os.path.exists(latest) and os.path.samefile(self.args.resume, latest)):
            self.save([self.latest])
        where = f"epoch {self.epoch}" + (f" step {self.step}" if self.step else "")
        self.print(f"starting at {where} (counted from 0), device {self.ctx.device}, seed {self.seed}")

    def steps(self, loader: DataLoader, prepare: Callable, epoch: int) -> Iterator:
        """The epoch's batches, each as prepare(batch, rng) returns it on the device; done steps are skipped.

        rng: a NumPy generator. All randomness of a step follows from (seed, epoch, step, rank), so that a resumed run
        repeats an uninterrupted one.
        """
        first_step = self.step
        self.sampler.epoch, self.sampler.first_step = epoch, first_step
        epochs_left = self.args.epochs - epoch - 1
        self.progress = metrics.Progress(
            loader, epoch, self.sampler.global_batch_size, self.args.print_freq, epochs_left, first_step
        )

        ready = lambda batch, step: prepare(batch, distributed.derive_rng(self.seed, epoch, step, self.ctx.rank))
        batches = prefetch(self.progress, ready, self.ctx.device, first_step)
        while self.step < len(self.sampler):
            batch = self._next(batches)
            self.step += 1
            distributed.seed_shuffles(self.seed, epoch, self.step)
            yield batch
        next(batches, None)  # ends the pass over the loader

    def _next(self, batches: Iterator[tuple]) -> tuple:
        """The next batch, once all ranks have theirs: the one exchange between the hosts in a step.

        If any rank got a stop signal or cannot load, or too many images are unreadable, save the finished steps and end
        the run.
        """
        batch, unreadable, trouble = None, [], None
        try:
            with self.stop.interruptible():
                batch, unreadable = next(batches)
        except StopWaiting:
            pass
        except Exception as error:
            trouble = error
        signum, troubled, bad = distributed.all_reduce_max(self.stop.signum, int(trouble is not None), len(unreadable))
        found = distributed.gather_lists(unreadable) if bad else []
        too_many = len(self.bad_now.union(path for path, _ in found)) > self.args.max_bad_images
        if signum or troubled or too_many:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loading process that ends now must not disturb the saving
            self.save([self.latest])
        self._count_unreadable(found)
        if trouble or too_many and distributed.is_main():
            raise trouble or RunError(
                f"{len(self.bad_now)} images could not be read, more than --max-bad-images {self.args.max_bad_images};"
                " repair them or raise the limit, then continue with --resume auto:"
                f" {', '.join(sorted(self.bad_now))}"
            )
        if troubled or too_many:
            distributed.barrier()  # until the rank in trouble ends, which reports it
        if signum:
            exit_on_signal(signum, f"in epoch {self.epoch} after step {self.step}")
        return batch

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """For an evaluation between `epoch_stats` and `end_epoch`: a signal ends the run at once.

        All ranks must call this. If saving is due it saves first, and a resumed run begins with the evaluation.
        """
        if self.due or self.signum:
            self.save([self.latest])
        distributed.barrier()  # a rank that fails from here on must not interrupt the saving
        try:
            with self.stop.interruptible():
                yield
        except StopWaiting:
            exit_on_signal(self.stop.signum, f"in the evaluation after epoch {self.epoch}", in_step=False)

    def after_step(self, **values: torch.Tensor) -> None:
        """Count the step and its figures, `loss` among them; report and save where that is due."""
        self.means.add(values)
        if self.progress.due():  # the one CPU-GPU sync point
            self._check_finite()
            with self.stop.no_broken_pipe():
                self.progress.report(self.means.compute(), self._learning_rate())
        if self.step == len(self.sampler):  # end_epoch saves
            due = distributed.is_main() and time.monotonic() - self.saved_at > SAVE_SECONDS
            self.signum, self.due = distributed.all_reduce_max(self.stop.signum, int(due))
        elif self.args.save_steps and self.step % self.args.save_steps == 0:
            self.save([self.latest])

    def epoch_stats(self) -> dict:
        """The epoch's line of the log: means over all steps and ranks. All ranks must call this."""
        means = self.means.compute(over_ranks=True)
        return {
            **({"probe": self.probe} if self.probe else {}),
            "epoch": self.epoch,
            "lr": self._learning_rate(),
            **means,
            "bad_images": self.bad_in_epoch,
            **self.progress.speed(),
        }

    def end_epoch(self, stats: Mapping, also: Sequence[str] = ()) -> None:
        """Log the epoch, save it where that is due and under the names `also`, end the run if a signal asked for it."""
        if distributed.is_main():
            self._check_finite(weights=True)
            changes = [each for each in self.args.changes if each["epoch"] == self.first_epoch == self.epoch]
            stats = {**stats, "changed": changes[-1]} if changes else stats
            if dropped := metrics.log_epoch(self._path(LOG), stats):
                print(f"{LOG}: dropped {dropped} damaged lines", flush=True)
        done = self.epoch
        self.epoch, self.step = self.epoch + 1, 0
        if also or self.due or self.signum or self.epoch == self.args.epochs:
            self.save([*also, self.latest])
        self.means, self.bad_in_epoch = metrics.RunningMeans(), 0
        if self.signum:
            exit_on_signal(self.signum, f"after epoch {done}")

    def print(self, text: str) -> None:
        """Print a line, on rank 0."""
        if distributed.is_main():
            with self.stop.no_broken_pipe():
                print(text, flush=True)

    def save(self, names: Sequence[str]) -> None:
        """Write the state of the run to files of these names, on rank 0. All ranks must call this."""
        self.due = 0
        means = self.means.state_dict() if self.step else None
        if not distributed.is_main():
            return
        if self.step:
            self._check_finite(weights=True)
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "means": means,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "seed": self.seed,
            "bad_images": self.bad_images,
            "bad_in_epoch": self.bad_in_epoch if self.step else 0,
            "images": self.sampler.num_images,
            "images_per_step": self.sampler.global_batch_size,
            "processes": self.ctx.world_size,
            "changes": self.args.changes,
            **self.state(),
        }
        first, *others = map(self._path, names)
        checkpoint.save(first, state, others)
        self.saved_at = time.monotonic()

    def _path(self, name: str) -> str:
        return os.path.join(self.args.ckpt_path, name)

    def _learning_rate(self) -> float | list[float]:
        """The learning rate; of a probe the list of its heads'."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return rates if self.probe else rates[0]

    def _count_unreadable(self, found: Sequence[tuple[str, str]]) -> None:
        """Count the images of a step, over all ranks, that could not be read; name each file once."""
        for path, reason in found:
            self.bad_in_epoch += 1
            if path not in self.bad_images and distributed.is_main():
                sys.stderr.write(one_line(f"unreadable image, replaced by another of its class: {path}: {reason}"))
                sys.stderr.flush()
            self.bad_images[path] = reason
            self.bad_now.add(path)

    def _check_finite(self, weights: bool = False) -> None:
        """Raise RunError rather than report or save a loss, or weights of every head, that are not finite."""
        losses, what = self.means.compute()["loss"], "the loss is"
        if any(map(math.isfinite, losses if isinstance(losses, list) else [losses])):
            groups = (group["params"] for group in self.optimizer.param_groups)
            if not weights or any(all(weight.isfinite().all() for weight in group) for group in groups):
                return
            what = "weights are"
        lr = min(group["lr"] for group in self.optimizer.param_groups)
        advice = f"use a smaller --lr, for example {lr / 10:g}"
        if self.args.precision == "fp16":
            advice = "fp16 ends at 65504: use --precision bf16, or a smaller --lr"
        raise RunError(
            f"{what} not finite in epoch {self.epoch} by step {self.step}, at lr {lr:g}; {advice}; saved checkpoints"
            " are intact: continue from one with --resume FILE in another --ckpt_path"
        )


def exit_on_signal(signum: int, where: str, in_step: bool = True) -> NoReturn:
    """End with exit code 128 + signum, as shells expect; in_step: all ranks do, once rank 0 has saved."""
    if in_step:
        distributed.barrier()
    if distributed.is_main():
        with contextlib.suppress(BrokenPipeError):
            where += ", saved" * in_step
            print(f"stopped by {signal.Signals(signum).name} {where}; continue with --resume auto", flush=True)
    if in_step:
        sys.exit(128 + signum)
    exit_now(128 + signum)  # other ranks may wait for this one


def open_folder(
    args: argparse.Namespace, pattern: str, probe: str | None = None, writes: bool = True
) -> tuple[files.FolderLock, dict]:
    """Lock --ckpt_path, then load the checkpoint of --resume, {} for a fresh start. Sets args.resume and auto_resume.

    pattern: a regular expression for the names of the run's files, of which --resume auto takes the last; probe: the
    key of its lines in the log, None for pre-training. writes: whether files will be written there (--dry-run aside,
    which locks nothing). Raises UsageError if another process has the folder, or if it holds another run, which this
    one would overwrite.
    """
    folder, restarted = args.ckpt_path, environment.restarted()
    lock = files.FolderLock(f"--ckpt_path {folder}", os.path.join(folder, ".lock"))
    if writes and not args.dry_run and environment.is_main(args):
        lock.acquire()
    args.auto_resume = args.resume == "auto" or restarted
    args.resume = checkpoint.resume_path(args.resume, folder, pattern, restarted)
    if args.start_epoch >= args.epochs:
        raise UsageError(f"--start-epoch {args.start_epoch}: it must be below --epochs {args.epochs}")
    args.changes = []  # of the settings of the run that --resume continues: set by check_resumable
    own = args.resume and os.path.realpath(os.path.dirname(args.resume)) == os.path.realpath(folder)
    if writes and not own and not args.auto_resume:  # which a run asks for that ended before it saved
        found = checkpoint.matching(folder, pattern)
        lines = [record for record in metrics.read_jsonl(os.path.join(folder, LOG))[0] if record.get("probe") == probe]
        if found or lines:
            what = found[-1] if found else f"{len(lines)} epochs in {LOG}"
            way = "continue that with --resume auto, or choose another folder"
            raise UsageError(f"--ckpt_path {folder}: it holds another run ({what}); {way}")
    return lock, checkpoint.load(args.resume) if args.resume else {}


def check_resumable(
    args: argparse.Namespace, saved: Mapping, sampler: GlobalBatchSampler, parameters: Sequence[torch.Tensor], key: str,
    settings: Mapping[str, object],
) -> None:  # fmt: skip
    """Refuse a checkpoint whose run is finished, had other settings or data, or whose momenta do not fit.

    settings: options of this run that make its result, {name: value}; the checkpoint has its own under `key`. A run
    keeps them in its own folder; in another one they may change, which args.changes then holds, [{"epoch", name: [old,
    new]}]. Raises Finished instead of UsageError for a finished run if --resume auto asked for it: job scripts can be
    rerun.
    """
    source = f"--resume {args.resume}"
    seed = saved.get("seed") if args.seed is None else args.seed
    images = {"images": sampler.num_images, "images_per_step": sampler.global_batch_size}
    with checkpoint.reading(source):
        here = checkpoint.effective({**settings, "seed": seed, **images})
        there = checkpoint.settings(saved, key, source)
        changed = {name: [there[name], here[name]] for name in here.keys() & there.keys() if there[name] != here[name]}
        earlier = [dict(each) for each in saved.get("changes", [])]
        if step := saved.get("step"):
            metrics.RunningMeans().load_state_dict(saved["means"], torch.device("cpu"))
            if step > saved["images"] // saved["images_per_step"]:  # as many: before the evaluation at the end
                raise ValueError(f"its step is {step}, more than an epoch has")
            operator.index(saved["seed"])  # the order of the data continues
        if not settings.get("cos"):
            changed.pop("epochs", None)  # the schedule stays as it was
        changed.pop("start_epoch", None)  # without effect beside --resume
        args.start_epoch = there.get("start_epoch", 0)
        own = os.path.realpath(os.path.dirname(args.resume)) == os.path.realpath(args.ckpt_path)
        refused = changed if own else {name for name in changed if step and name in WITHIN_EPOCH}
        for name in sorted(refused, key=list(here).index):
            old, new = changed[name]
            if name == "classes":
                other = next(iter(sorted(set(map(str, old)) ^ set(new))), "their order")
                old, new = len(old), f"{len(new)} ({other} differs)"
            label = name.replace("_", " ") if name in (*images, "classes") else f"--{name.replace('_', '-')}"
            way = "repeat it, or continue in another --ckpt_path" if own else "within an epoch its order must stay"
            raise UsageError(f"{source}: it was saved with {label} {old}, this run has {new}; {way}")
        changed |= {"classes": [*map(len, changed["classes"])]} if "classes" in changed else {}  # their numbers
    args.changes = [*earlier, {"epoch": saved["epoch"], **changed}] if changed else earlier
    if saved["epoch"] >= args.epochs:
        message = f"{source}: already finished ({saved['epoch']} epochs); use a larger --epochs to continue"
        raise Finished(message) if args.auto_resume else UsageError(message)
    if momenta := saved.get("optimizers") or saved.get("optimizer"):  # published files may come without them
        checkpoint.check_momenta(momenta, source, parameters)
