import json
import math
import os

import pytest
import torch

from moco.training import metrics


def test_means_are_those_of_the_steps_added():
    means = metrics.RunningMeans()
    for loss in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(loss), "acc": torch.tensor([10 * loss, loss]), "one": torch.tensor([loss])})
    expected = {"loss": 3.0, "acc": [30.0, 3.0], "one": [3.0]}
    assert means.compute() == expected == means.compute(over_ranks=True)
    assert means.steps == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_mean_that_once_was_not_finite_stays_so(bad):
    means = metrics.RunningMeans()
    for loss in (1.0, 2.0, bad, 4.0, -bad):
        means.add({"loss": torch.tensor([loss, 1.0]), "acc": torch.tensor(1.0)})
    found = means.compute()
    assert not math.isfinite(found["loss"][0]) and found["loss"][1] == found["acc"] == 1.0


def restored(state):
    means = metrics.RunningMeans()
    means.load_state_dict(state, torch.device("cpu"))
    return means


def test_a_restored_mean_continues_with_sizes_and_steps():
    first = metrics.RunningMeans()
    first.add({"loss": torch.tensor([1.0, 3.0]), "acc": torch.tensor(5.0)})
    again = restored(first.state_dict())
    again.add({"loss": torch.tensor([2.0, math.inf]), "acc": torch.tensor(7.0)})
    assert again.compute() == {"loss": [1.5, math.inf], "acc": 6.0}
    assert again.steps == 2


def test_earlier_states_and_those_of_other_ranks_are_restored():
    old = restored({"names": ["loss", "q_k"], "sums": torch.tensor([[6.0, 3.0]]), "steps": 3})  # means had no sizes
    assert old.compute() == {"loss": 2.0, "q_k": 1.0}
    two_ranks = {"names": ["loss"], "sizes": [None], "sums": torch.tensor([[6.0], [2.0]]), "steps": 2}
    assert restored(two_ranks).compute() == {"loss": 2.0}  # of the mean of their sums


def test_a_resumed_run_replaces_the_log_lines_it_repeats(tmp_path):
    path = tmp_path / "log.jsonl"
    for epoch in (0, 1, 2, 3, 1):
        metrics.log_epoch(path, {"epoch": epoch, "loss": math.pi, "by_head": [math.pi, 1]})
        if epoch == 0:
            os.link(path, tmp_path / "copy.jsonl")
    assert (tmp_path / "copy.jsonl").read_text().count("\n") == 1  # a copy by hard links keeps its own log
    expected = [{"epoch": epoch, "loss": 3.14159, "by_head": [3.14159, 1]} for epoch in (0, 1)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


@pytest.mark.parametrize(
    "damage", ["\0" * 500 + "\n", "\n", "[1]\n", '{"loss": 1}\n', '{"epoch": 0, "lo', "\xff\xfe\n"]
)
def test_damaged_log_lines_are_dropped_and_counted(tmp_path, damage):
    path, sound = tmp_path / "log.jsonl", [{"epoch": 0}, {"epoch": 1}, {"probe": "0001", "epoch": 0}]
    path.write_text("".join([*(json.dumps(line) + "\n" for line in sound), damage]), encoding="latin-1")
    assert metrics.log_epoch(str(path), {"epoch": 1, "lr": 1}) == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == [sound[0], sound[2], {"epoch": 1, "lr": 1}]


# Progress

MEANS = {"loss": 8.123, "contrast_acc": 12.5, "q_k": 0.812, "q_t": -0.123, "q_queue": 0.01, "spread": 0.974}


class Batches:
    """So many batches, each of which takes its seconds of a clock that does not run otherwise."""

    def __init__(self, monkeypatch, steps, seconds):
        self.steps, self.seconds, self.now = steps, seconds, 0.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)

    def __len__(self):
        return self.steps

    def __iter__(self):
        for step in range(self.steps):
            self.now += self.seconds
            yield step


def test_a_log_gets_a_line_every_print_freq_steps_and_at_the_end(monkeypatch, capsys):
    batches = Batches(monkeypatch, 10, seconds=9)
    epoch = metrics.Progress(batches, 3, images_per_step=8, print_freq=4, epochs_left=2)
    for _ in epoch:
        batches.now += 1
        if epoch.due():
            epoch.report(MEANS, 0.0301)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"epoch 3 [{step}/10]" for step in (4, 8, 10)]
    wanted = ("loss 8.123", "q·k 0.812", "q·t -0.123", "spread 0.974", "lr 0.0301", "1 images/s", "data 90%")
    for line, eta in zip(lines, ("04:20", "03:40", "03:20")):  # 26, 22 and 20 steps of 10 s, of all epochs
        assert all(text in line for text in [*wanted, f"ETA {eta}"])
    assert epoch.speed() == {"images_per_s": 0.8, "data_share": 0.9}


def test_a_resumed_epoch_starts_at_its_step_and_heads_are_reported_side_by_side(monkeypatch, capsys):
    batches = Batches(monkeypatch, 10, seconds=1)
    epoch = metrics.Progress(batches, 0, images_per_step=8, print_freq=10, first_step=6)
    rest = iter(epoch)
    for _ in range(4):
        next(rest)
        if epoch.due():
            epoch.report({"loss": [1.0, 2.5]}, [30.0, 0.1])
    assert "[10/10]  loss 1.000 2.500  lr 30 0.1  " in capsys.readouterr().out
    assert epoch.speed()["images_per_s"] == 8  # of the steps that it did itself
