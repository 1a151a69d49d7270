import json
import math

import pytest
import torch

from moco import metrics


def test_correct_counts_are_exact_for_every_k_and_few_classes():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = torch.tensor([0, 0, 0])
    assert metrics.correct_counts(logits, labels, ks=(1, 2, 3, 5)).tolist() == [1, 2, 3, 3]


def test_means_are_those_of_the_steps_added():
    means = metrics.RunningMeans()
    for loss in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(loss), "acc": torch.tensor(10 * loss)})
    assert means.read() == {"loss": 3.0, "acc": 30.0} == means.read(over_ranks=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_means_know_the_first_step_that_was_not_finite(bad):
    means = metrics.RunningMeans()
    assert means.finite_steps() == means.steps == 0
    for loss in (1.0, 2.0, bad, 4.0, -bad):
        means.add({"loss": torch.tensor(loss), "acc": torch.tensor(1.0)})
    assert means.finite_steps() == 2 and means.steps == 5
    fine = metrics.RunningMeans()
    fine.add({"loss": torch.tensor(1.0)})
    again = metrics.RunningMeans.restored(fine.state(), torch.device("cpu"))
    again.add({"loss": torch.tensor(1.0)})
    assert again.finite_steps() == again.steps == 2


def test_progress_reports_every_print_freq_steps_and_at_the_end(capsys):
    progress = metrics.Progress(list(range(7)), "epoch 1/2", images=4, print_freq=3, remaining_epochs=1)
    for _ in progress:
        if progress.due():
            progress.report("loss 1.0")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"epoch 1/2 [{step}/7]" for step in (3, 6, 7)]
    for wanted in ("loss 1.0", "images/s", "data", "ETA"):
        assert all(wanted in line for line in lines)


def test_progress_measures_the_wait_for_data(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])

    def slow_loader():
        for _ in range(4):
            clock[0] += 3
            yield None

    class Loader:
        def __iter__(self):
            return slow_loader()

        def __len__(self):
            return 4

    progress = metrics.Progress(Loader(), "", images=8, print_freq=100)
    for _ in progress:
        clock[0] += 1
    assert progress.speed() == {"images_per_s": 4 * 8 / 16, "data_share": 0.75}


def test_log_holds_one_json_object_a_line_and_drops_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "log.jsonl"
    for epoch in range(4):
        metrics.append_jsonl(path, {"epoch": epoch, "loss": math.pi})
    metrics.truncate_jsonl(path, before_epoch=2)
    metrics.truncate_jsonl(tmp_path / "none.jsonl", before_epoch=2)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert records[0]["loss"] == pytest.approx(math.pi, rel=1e-5)
