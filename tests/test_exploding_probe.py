"""A probe whose learning rate is too large for its data says so in one line, and one that learns does not."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import PROBE, SMALL_PROBE, run_script

from moco.evaluation import classifier
from moco.evaluation.classifier import LinearHeads, exploded, explosion_hint


@pytest.mark.parametrize(
    "classes, losses, heads",
    [
        # FashionMNIST, mean losses of the first epoch with --lr 0.01 0.03 0.1 0.3 1 3 10 30
        (10, [1.001, 0.992, 1.086, 1.682, 5.421, 16.891, 57.711, 169.737], {4, 5, 6, 7}),
        (10, [2.077, 1.923, 1.759, 1.661, 4.584, 19.570, 71.898, 250.750], {5, 6, 7}),  # a random backbone
        (10, [2.49], set()),  # the quick start's slowest row
        (2, [math.nan, 0.771, math.inf, 713_068], {0, 2, 3}),
        (1000, [6.9, 12.0], set()),
        (1, [0.0], set()),
    ],
)
def test_a_loss_above_that_of_guessing_tells_an_exploded_head(classes, losses, heads):
    assert exploded(losses, classes) == heads


def test_the_hint_names_the_learning_rates_to_try():
    assert explosion_hint({1, 0}, [30, 3], [713_068, math.nan], 10) == (
        "the loss exploded with --lr 30 3: it is 713068 nan, where guessing has 2.30; try --lr 0.003 0.03 0.3: a head"
        " for each on the same features; the best head is kept"
    )


def test_the_hint_names_the_learning_rates_that_do():
    assert explosion_hint({3}, [0.1, 1, 3, 30], [0.9, 1.1, 99, 713_068], 10) == (
        "the loss exploded with --lr 30: it is 713068, where guessing has 2.30; not so with --lr 0.1 1; the best head"
        " is kept"
    )


def test_heads_that_learn_are_never_called_exploded():
    torch.manual_seed(0)
    centres = torch.randn(10, 64)
    heads = LinearHeads(nn.Linear(64, 10) for _ in range(6))
    lrs = [0.001, 0.01, 0.1, 1, 100, 1000]
    for head in heads:
        nn.init.normal_(head.weight, std=0.01)
    optimizer = torch.optim.SGD([{"params": h.parameters(), "lr": lr} for h, lr in zip(heads, lrs)], 1.0, momentum=0.9)
    losses = []
    for _ in range(100):
        labels = torch.randint(10, (64,))
        own = [F.cross_entropy(logits, labels) for logits in heads(centres[labels] + 2 * torch.randn(64, 64))]
        optimizer.zero_grad()
        sum(own).backward()
        optimizer.step()
        losses.append([loss.item() for loss in own])
    mean = torch.tensor(losses).mean(dim=0).tolist()
    assert mean[0] < math.log(10) and exploded(mean, 10) == {4, 5} and classifier.EXPLODED * math.log(10) < mean[4] / 5


def test_a_probe_that_explodes_says_once_which_option_to_try(shared_data, tmp_path):
    settings = [*SMALL_PROBE, "--epochs", 3, "--lr", 8000, 5000, "--ckpt_path", tmp_path, shared_data]
    lines = [line for line in run_script(PROBE, *settings).stdout.splitlines() if "exploded" in line]
    assert len(lines) == 1 and lines[0].startswith("the loss exploded with --lr 8000 5000: it is ")
    assert lines[0].endswith("try --lr 5 50 500: a head for each on the same features; the best head is kept")
