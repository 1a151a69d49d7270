import json
import math

import pytest
import torch

from moco.errors import RunError
from moco.evaluation import classifier
from moco.training import metrics


def test_correct_counts_are_exact_for_every_k_and_few_classes():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = torch.tensor([0, 0, 0])
    assert classifier.correct_counts(logits, labels, ks=(1, 2, 3, 5)).tolist() == [1, 2, 3, 3]


def test_means_are_those_of_the_steps_added():
    means = metrics.RunningMeans()
    for loss in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(loss), "acc": torch.tensor([10 * loss, loss]), "one": torch.tensor([loss])})
    expected = {"loss": 3.0, "acc": [30.0, 3.0], "one": [3.0]}
    assert means.compute() == expected == means.compute(over_ranks=True)
    assert means.steps == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_steps_end_before_the_first_bad_value(bad):
    means = metrics.RunningMeans()
    for loss in (1.0, 2.0, bad, 4.0, -bad):
        means.add({"loss": torch.tensor(loss), "acc": torch.tensor(1.0)})
    assert means.finite_steps("loss") == 2 and means.finite_steps("acc") == means.steps == 5


def test_finite_steps_are_counted_by_name():
    means = metrics.RunningMeans()
    for step in range(4):
        early, late = (math.nan if step >= first else 1.0 for first in (1, 3))
        means.add(
            {
                "some": torch.tensor([early, 1.0]),  # a head that diverged beside one that did not
                "all": torch.tensor([early, late]),
                "scalar": torch.tensor(late),
            }
        )
    assert [means.finite_steps(name) for name in ("some", "all", "scalar")] == [4, 3, 3]


def test_a_restored_mean_continues_with_sizes_and_steps():
    first = metrics.RunningMeans()
    first.add({"loss": torch.tensor([1.0, 3.0]), "acc": torch.tensor(5.0)})
    again = metrics.RunningMeans()
    again.load_state_dict(first.state_dict(), torch.device("cpu"))
    again.add({"loss": torch.tensor([2.0, math.inf]), "acc": torch.tensor(7.0)})
    assert again.compute() == {"loss": [1.5, math.inf], "acc": 6.0}
    assert again.finite_steps("acc") == again.finite_steps("loss") == again.steps == 2
    again.add({"loss": torch.tensor([math.nan, 0.0]), "acc": torch.tensor(7.0)})
    assert again.finite_steps("loss") == 2 and again.finite_steps("acc") == 3


def test_a_state_saved_before_means_had_sizes_is_restored():
    old = {"names": ["loss", "q_k"], "sums": torch.tensor([[6.0, 3.0]]), "steps": 3}
    means = metrics.RunningMeans()
    means.load_state_dict(old, torch.device("cpu"))
    assert means.compute() == {"loss": 2.0, "q_k": 1.0} and means.finite_steps("loss") == 3


def test_another_number_of_ranks_takes_the_mean_of_their_sums():
    saved = {"names": ["loss"], "sizes": [None], "sums": torch.tensor([[6.0], [2.0]]), "steps": 2}
    means = metrics.RunningMeans()
    means.load_state_dict(saved, torch.device("cpu"))
    assert means.compute() == {"loss": 2.0}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_the_log_lines_it_repeats(tmp_path):
    path = tmp_path / "log.jsonl"
    for epoch in range(4):
        metrics.append_jsonl(path, {"epoch": epoch, "loss": math.pi, "by_head": [math.pi, 1]})
    with open(path, "a") as file:
        file.write('{"epoch": 1')  # a killed process may leave half a line
    metrics.truncate_jsonl(path, 2)
    metrics.truncate_jsonl(tmp_path / "none.jsonl", 2)
    assert [record["epoch"] for record in records(path)] == [0, 1]
    assert records(path)[0] == {"epoch": 0, "loss": 3.14159, "by_head": [3.14159, 1]}
    assert not (tmp_path / "none.jsonl").exists()


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path):
    with pytest.raises(RunError, match="log.jsonl could not be written.*--resume auto"):
        metrics.append_jsonl(tmp_path / "nowhere" / "log.jsonl", {"epoch": 0})
