import argparse
import itertools
import math
import os
import signal

import pytest
import torch
import torch.nn as nn
from helpers import log

from moco import distributed
from moco.data import loader
from moco.distributed import DistContext
from moco.errors import Finished, RunError, UsageError
from moco.training import checkpoint, run
from moco.training.run import Run, check_resumable, open_folder

IMAGES, BATCH, STEPS, LATEST = 12, 2, 6, "checkpoint_latest.pth.tar"
pytestmark = pytest.mark.usefixtures("handlers")  # a run handles signals


class Numbers(torch.utils.data.Dataset):
    """(number, its unreadable files) as RetryDataset gives them."""

    def __init__(self, unreadable=()):
        self.unreadable = unreadable

    def __len__(self):
        return IMAGES

    def __getitem__(self, key):
        index, _ = key
        return torch.tensor([float(index)]), [(f"{index}.png", "empty")] if index in self.unreadable else []


class Training:
    """A small model with its run: what a script builds around the loop. options: the script's."""

    def __init__(self, folder, resume="auto", heads=1, unreadable=(), saved=None, **options):
        torch.manual_seed(0)
        distributed.seed_everything(0)
        self.args = argparse.Namespace(
            **{"ckpt_path": str(folder), "epochs": 2, "start_epoch": 0, "print_freq": 100, "precision": "fp32",
               "save_steps": None, "max_bad_images": 100, "changes": [], **options},
            resume=resume.replace("auto", str(folder / LATEST)),
        )  # fmt: skip
        folder.mkdir(exist_ok=True)
        self.model = nn.ModuleList(nn.Linear(1, 1) for _ in range(heads))
        groups = [{"params": head.parameters(), "lr": 0.001 / 10**i} for i, head in enumerate(self.model)]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        sampler = loader.GlobalBatchSampler(IMAGES, BATCH, 0, DistContext())
        self.loader = loader.train_loader(Numbers(unreadable), sampler, 0, torch.device("cpu"))
        if saved is None:
            path = checkpoint.resume_path(resume, folder, LATEST)
            saved = checkpoint.load(path) if path else {}
        if saved:
            self.model.load_state_dict(saved["state_dict"])
        self.run = Run(
            DistContext(), self.args, 0, latest=LATEST, state=lambda: {"state_dict": self.model.state_dict()},
            sampler=sampler, optimizer=self.optimizer, probe="0199" if heads > 1 else None,
        )  # fmt: skip
        self.run.resume(saved)

    def train(self, on_step=lambda epoch, step: None, save_freq=1):
        """The loop of a script. on_step(epoch, steps done of it) is called before run.after_step."""
        for epoch in range(self.run.epoch, self.args.epochs):
            for batch in self.run.steps(self.loader, lambda batch, rng: (batch, rng.random()), epoch):
                numbers, noise = batch
                losses = torch.stack([(head(numbers) - noise).square().mean() for head in self.model])
                self.optimizer.zero_grad()
                losses.sum().backward()
                self.optimizer.step()
                on_step(epoch, self.run.step)
                self.run.after_step(loss=losses if len(self.model) > 1 else losses[0])
            numbered = [f"checkpoint_{epoch:04d}.pth.tar"] if (epoch + 1) % save_freq == 0 else []
            self.run.end_epoch(self.run.epoch_stats(), numbered)
        return self


def final(folder):
    return checkpoint.load(folder / LATEST)


def assert_same_training(folder, whole):
    for name, value in final(whole)["state_dict"].items():
        assert torch.equal(value, final(folder)["state_dict"][name])
    assert log(folder) == log(whole)


@pytest.mark.parametrize("heads, epoch, step", [(1, 0, 2), (2, 1, 5), (1, 0, STEPS), (2, 0, STEPS)])
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(tmp_path, capsys, heads, epoch, step):
    Training(tmp_path / "whole", heads=heads).train()
    stopped = Training(tmp_path / "parts", heads=heads)

    def on_step(*now):
        if now == (epoch, step):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        stopped.train(on_step)
    assert end.value.code == 128 + signal.SIGTERM
    where = f"in epoch {epoch} after step {step}" if step < STEPS else f"after epoch {epoch}"
    assert f"stopped by SIGTERM {where}, saved" in capsys.readouterr().out
    Training(tmp_path / "parts", heads=heads).train()
    start = f"epoch {epoch} step {step}" if step < STEPS else f"epoch {epoch + 1}"
    assert f"starting at {start} (" in capsys.readouterr().out
    assert_same_training(tmp_path / "parts", tmp_path / "whole")


def test_a_killed_run_continues_from_its_last_saved_step(tmp_path):
    Training(tmp_path / "whole").train()

    def killed(epoch, step):
        if (epoch, step) == (1, 5):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Training(tmp_path / "parts", save_steps=2).train(killed)
    saved = final(tmp_path / "parts")
    assert (saved["epoch"], saved["step"]) == (1, 4)
    Training(tmp_path / "parts", save_steps=2).train()
    assert_same_training(tmp_path / "parts", tmp_path / "whole")


def test_short_epochs_do_not_wait_for_saving(tmp_path, monkeypatch):
    """The latest state is written after the first epoch, the last, and those that end a minute after the last time."""
    clock, written = itertools.count(0, 25), []  # read once at the end of an epoch, and once for each time of saving
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda path, state, names: written.append(state["epoch"]) or save(path, state)
    )
    Training(tmp_path, epochs=9).train(save_freq=100)
    assert written == [1, 4, 7, 9]


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_killed_between_two_savings_equals_uninterrupted(tmp_path, killed_in):
    Training(tmp_path / "whole", epochs=4).train(save_freq=3)

    def killed(epoch, step):
        if (epoch, step) == (killed_in, 3):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Training(tmp_path / "parts", epochs=4).train(killed, save_freq=3)
    assert final(tmp_path / "parts")["epoch"] == (3 if killed_in == 3 else 1)
    assert len(log(tmp_path / "parts")) == killed_in  # its lines are made again
    Training(tmp_path / "parts", epochs=4).train(save_freq=3)
    assert_same_training(tmp_path / "parts", tmp_path / "whole")


def test_a_numbered_checkpoint_and_the_latest_are_one_file(tmp_path):
    Training(tmp_path).train()
    assert os.path.samefile(tmp_path / "checkpoint_0001.pth.tar", tmp_path / LATEST)
    assert checkpoint.load(tmp_path / "checkpoint_0000.pth.tar")["epoch"] == 1  # and the next one replaces it


def test_a_probe_shares_the_log_of_its_pretraining(tmp_path):
    Training(tmp_path).train()
    before = log(tmp_path)
    assert before[1].keys() == {"epoch", "lr", "loss", "bad_images"} and before[1]["lr"] == 0.001
    for _ in range(2):  # from its start again: its own lines are replaced, and no others
        Training(tmp_path, heads=2, resume="").train()
    lines = log(tmp_path)
    assert lines[:2] == before and len(lines) == 4
    assert lines[2].keys() == {"probe", "epoch", "lr", "loss", "bad_images"} and lines[2]["probe"] == "0199"
    assert lines[2]["lr"] == [0.001, 0.0001] and len(lines[2]["loss"]) == 2
    Training(tmp_path, resume="").train()  # and a pre-training leaves a probe's
    assert log(tmp_path) == [*lines[2:], *before]


def break_head(training, number, at=(1, 3)):
    def on_step(*now):
        if now == at:
            training.model[number].weight.data[0, 0] = math.nan

    return on_step


@pytest.mark.parametrize(
    "print_freq, precision, advice", [(1, "fp32", "a smaller --lr"), (100, "fp16", "use --precision bf16")]
)
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, print_freq, precision, advice):
    training = Training(tmp_path, print_freq=print_freq, precision=precision)
    message = rf"the loss is not finite in epoch 1 by step {4 if print_freq == 1 else STEPS}, at lr .*{advice}"
    with pytest.raises(RunError, match=message):
        training.train(break_head(training, 0))
    saved = final(tmp_path)
    assert saved["epoch"] == 1 and all(weight.isfinite().all() for weight in saved["state_dict"].values())
    assert [line["epoch"] for line in log(tmp_path)] == [0]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    training = Training(tmp_path, save_steps=3)
    with pytest.raises(RunError, match="weights are not finite in epoch 1 by step 3"):
        training.train(break_head(training, 0))  # the loss of this step was still finite
    assert (final(tmp_path)["epoch"], final(tmp_path)["step"]) == (1, 0)


def test_the_run_continues_while_one_head_is_finite(tmp_path):
    training = Training(tmp_path, heads=2, save_steps=1)
    training.train(break_head(training, 0))
    assert math.isnan(log(tmp_path)[1]["loss"][0]) and math.isfinite(log(tmp_path)[1]["loss"][1])
    training = Training(tmp_path / "all", heads=2, save_steps=1)

    def on_step(*now):
        break_head(training, 0)(*now)
        break_head(training, 1, at=(1, 4))(*now)

    with pytest.raises(RunError, match="weights are not finite in epoch 1 by step 4"):
        training.train(on_step)


def test_too_many_unreadable_images_end_the_run_resumably(tmp_path, capsys):
    Training(tmp_path, unreadable={3}, max_bad_images=1).train()
    assert [line["bad_images"] for line in log(tmp_path)] == [1, 1]
    assert capsys.readouterr().err.count("3.png: empty") == 1
    with pytest.raises(RunError, match="2 images could not be read, more than --max-bad-images 1.*3.png, 5.png"):
        Training(tmp_path, unreadable={3, 5}, max_bad_images=1, epochs=4).train()
    assert "3.png" not in capsys.readouterr().err  # it was reported by the run before
    saved = final(tmp_path)
    assert saved["epoch"] == 2 and saved["step"] > 0 and saved["bad_images"].keys() == {"3.png", "5.png"}
    Training(tmp_path, epochs=4).train()  # they were repaired
    assert [line["epoch"] for line in log(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("probe", [None, "0199"])
def test_a_folder_with_another_run_is_not_begun(tmp_path, probe):
    Training(tmp_path, heads=2 if probe else 1).train()

    def opened(folder, resume="", probe=probe):
        args = argparse.Namespace(ckpt_path=str(folder), resume=str(resume), dry_run=True, start_epoch=0, epochs=9)
        return open_folder(args, r"checkpoint_(\d{4}|latest)\.pth\.tar", probe)[1]

    for resume, epoch in ("auto", 2), (tmp_path / "checkpoint_0000.pth.tar", 1):
        assert opened(tmp_path, resume)["epoch"] == epoch
    with pytest.raises(UsageError, match=rf"--ckpt_path {tmp_path}: it holds another run \({LATEST}\); continue"):
        opened(tmp_path)
    assert opened(tmp_path / "new") == {} and not (tmp_path / "new").exists()
    (tmp_path / LATEST).rename(tmp_path / "kept")
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(UsageError, match=r"it holds another run \(2 epochs in log.jsonl\)"):
        opened(tmp_path)
    assert opened(tmp_path, "auto") == {}  # it ended before it saved
    assert opened(tmp_path, probe="0100" if probe else "0199") == {}  # a probe may share it
    assert opened(tmp_path / "new", tmp_path / "kept")["epoch"] == 2


MEANS = {"names": ["loss"], "sizes": [None], "sums": torch.ones(1, 1), "steps": 3}
OPTIONS = {
    "robust": "patch", "num_nonsem": 1, "alpha": 1.0, "patch_ratio": [4, 8], "moco_t": 0.07, "moco_m": 0.999,
    "lr": 0.03, "cos": False, "schedule": [120, 160], "momentum": 0.9, "precision": "fp32", "epochs": 3,
    "classes": ["a"],
}  # fmt: skip


def check(saved, auto=False, folder="other", seed=None, epochs=3, **settings):
    """The changes that check_resumable records of a checkpoint saved within its second epoch, in the current folder."""
    args = argparse.Namespace(resume="file", auto_resume=auto, epochs=epochs, seed=seed, ckpt_path=folder)
    within = {"epoch": 1, "step": 3, "images": 10, "images_per_step": 2, "seed": 5, "means": MEANS, "options": OPTIONS}
    here = OPTIONS | {"epochs": epochs} | settings
    check_resumable(args, within | saved, loader.GlobalBatchSampler(10, 2, 0, DistContext()), [], "options", here)
    return args.changes


def test_only_a_run_that_can_continue_is_resumed():
    """Within an epoch the order of the data must be the same; between epochs it may change."""
    assert check({}) == []
    changed = [{"epoch": 1, "seed": [5, 6], "images": [11, 10], "images_per_step": [4, 2]}]
    assert check({"step": 0, "images": 11, "images_per_step": 4}, seed=6) == changed
    for saved, seed in ({}, 6), ({"images": 11}, 5), ({"images_per_step": 3}, 5):
        with pytest.raises(UsageError, match="it was saved with"):
            check(saved, seed=seed)
    for auto, error in (False, UsageError), (True, Finished):  # a job script that is run again is no failure
        with pytest.raises(error, match=r"already finished \(3 epochs\)"):
            check({"epoch": 3}, auto)


@pytest.mark.parametrize("setting, value", [
    ("alpha", 3.0), ("moco_t", 0.2), ("num_nonsem", 2), ("patch_ratio", [4, 9]), ("lr", 0.1), ("moco_m", 0.99),
    ("cos", True), ("schedule", [2]), ("momentum", 0.0), ("precision", "bf16"), ("robust", "none"), ("classes", ["b"]),
    ("classes", [str(i) for i in range(20)])])  # fmt: skip
def test_a_run_keeps_what_makes_its_result(setting, value):
    """In its own folder; in another one a checkpoint is continued with other options, which file and log then tell."""
    with pytest.raises(UsageError, match=rf"it was saved with (--)?{setting.replace('_', '-')} .*another --ckpt_path"):
        check({}, folder=".", **{setting: value})
    (change,) = check({}, **{setting: value})
    told = [OPTIONS[setting], value] if setting != "classes" else [1, len(value)]
    assert change["epoch"] == 1 and change[setting] == told
    assert check({"changes": [{"epoch": 0}]}, **{setting: value}) == [{"epoch": 0}, change]
    check({"options": {}}, folder=".", **{setting: value})  # a published file does not tell


def test_options_without_effect_may_change():
    """A longer run is another one only with --cos, whose learning rate follows from the number of epochs."""
    assert check({}, folder=".", epochs=9) == []
    cosine = {"options": OPTIONS | {"cos": True}}
    assert check(cosine, folder=".", cos=True, schedule=[7]) == []
    with pytest.raises(UsageError, match="it was saved with --epochs 3, this run has 9"):
        check(cosine, folder=".", cos=True, epochs=9)
    plain = {"options": OPTIONS | {"robust": "none", "num_nonsem": 0}}
    assert check(plain, folder=".", robust="none", num_nonsem=0, alpha=7.0, patch_ratio=[1, 2]) == []
    texture = {"options": OPTIONS | {"robust": "texture"}}
    assert check(texture, folder=".", robust="texture", patch_ratio=[1, 2]) == []


def test_going_back_to_an_earlier_checkpoint_begins_by_saving_it(tmp_path):
    """Killed at any moment after that, --resume auto and the log follow the same run."""
    Training(tmp_path).train()
    earlier = checkpoint.load(tmp_path / "checkpoint_0000.pth.tar")
    Training(tmp_path, saved=earlier, resume=str(tmp_path / "checkpoint_0000.pth.tar"))
    assert final(tmp_path)["epoch"] == 1 and [line["epoch"] for line in log(tmp_path)] == [0, 1]
    whole = log(tmp_path)
    Training(tmp_path, epochs=1).train()
    Training(tmp_path).train()
    assert log(tmp_path) == whole


@pytest.mark.parametrize(
    "odd",
    [{"step": 10**6}, {"images": 0}, {"seed": None, "images": None}, {"means": None}, {"means": {"names": ["loss"]}}],
)
def test_an_epoch_that_cannot_be_continued_is_refused_in_one_line(odd):
    with pytest.raises(UsageError, match="^--resume file: damaged, or not written by these scripts"):
        check(odd)
