"""Frozen backbones, heads on their features, accuracy, and heads whose learning rate is too large."""

import math

import pytest
import torch
import torch.nn as nn

from moco.encoders import build_encoder
from moco.errors import UsageError
from moco.evaluation import classifier
from moco.evaluation.classifier import LinearHeads, divergence_hint
from moco.training import checkpoint


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    state = build_encoder("resnet10", 5).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def test_probe_has_the_given_backbone_frozen_and_a_new_head(backbone):
    torch.manual_seed(1)
    model = classifier.build_probe("resnet10", 400, backbone)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in backbone.items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    assert model.fc.weight.shape == (400, 256) and not model.fc.bias.any()
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)


def linear_checkpoint(width, **extra):
    state = checkpoint.add_prefix(build_encoder("resnet10", width).state_dict())
    return {"arch": "resnet10", "state_dict": state, **extra}


def test_a_head_is_scored_only_on_its_own_classes():
    data = ["a", "b", "c"]
    classifier.check_classes(linear_checkpoint(3, wnids=data), data, "file")
    classifier.check_classes(linear_checkpoint(1000), data, "file")  # published: 1000 outputs, classes unsaid
    for saved, fault in (
        (linear_checkpoint(3, wnids=["a", "b", "x"]), "3 classes that differ from the 3"),
        (linear_checkpoint(1000, wnids=["a", "b"]), "2 classes that differ from the 3"),
        (linear_checkpoint(2), "2 outputs, the data 3 classes"),
        ({"arch": "resnet10", "state_dict": {"queue": torch.ones(1)}}, "no linear head"),
    ):
        with pytest.raises(UsageError, match=fault):
            classifier.check_classes(saved, data, "file")


def test_heads_that_do_not_fit_are_refused():
    saved = linear_checkpoint(3, lrs=[1.0, 30.0], heads=LinearHeads(nn.Linear(256, 3) for _ in range(2)).state_dict())
    classifier.check_linear(saved, "file")
    saved["heads"]["1.bias"][0] = math.nan  # a learning rate that was too large
    classifier.check_linear(saved, "file")
    for change in {"heads": {}}, {"heads": [1]}, {"lrs": [1.0]}, {"heads": saved["heads"] | {"0.bias": torch.ones(1)}}:
        with pytest.raises(UsageError, match="^file: "):
            classifier.check_linear(saved | change, "file")
    with pytest.raises(UsageError, match="4 classes, but its head has 3 outputs"):
        classifier.check_linear(saved | {"wnids": list("abcd")}, "file")


def test_a_linear_checkpoint_loads_with_a_head_of_its_width(tmp_path):
    saved = linear_checkpoint(1000, best_acc1=torch.tensor(77.0))
    torch.save(saved, tmp_path / "model_best_0199.pth.tar")
    model, loaded = classifier.load_classifier(tmp_path / "model_best_0199.pth.tar")
    assert model.fc.out_features == 1000 and not model.training and loaded["best_acc1"] == 77
    assert torch.equal(model.fc.weight, saved["state_dict"]["module.fc.weight"])


def test_the_best_head_wins_and_one_with_nan_never_does():
    best = classifier.BestHead([0.0, 0.0, 0.0], winner=0)

    def update(*acc1s, broken=(0, 0, 0)):
        return best.update([{"acc1": acc1, "not_finite": n} for acc1, n in zip(acc1s, broken)])

    assert update(10.0, 30.0, 20.0) and best.winner == 1 and best.acc1s == [10.0, 30.0, 20.0]
    assert not update(25.0, 20.0, 20.0) and best.winner == 0 and best.acc1s == [25.0, 30.0, 20.0]
    assert not update(0.0, 0.0, 30.0) and best.winner == 2  # as good as the best, and not better
    assert not update(5.0, 99.0, 0.0, broken=(0, 1, 0)) and best.winner == 0 and best.acc1s == [25.0, 30.0, 30.0]


# Learning rates that are too large


RATES = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]


@pytest.mark.parametrize(
    "classes, losses, rates",
    [
        # FashionMNIST, mean losses of the first epoch with RATES
        (10, [1.001, 0.992, 1.086, 1.682, 5.421, 16.891, 57.711, 169.737], "1 3 10 30"),
        (10, [2.077, 1.923, 1.759, 1.661, 4.584, 19.570, 71.898, 250.750], "3 10 30"),  # a random backbone
        (10, [2.49], ""),  # the quick start's slowest row
        (2, [math.nan, 0.771, math.inf, 713_068], "0.01 0.1 0.3"),
        (1000, [6.9, 12.0], ""),
        (1, [0.0], ""),
    ],
)
def test_a_loss_far_above_chance_shows_that_a_head_diverged(classes, losses, rates):
    hint = divergence_hint(RATES[: len(losses)], losses, classes)
    assert hint.startswith(f"loss diverged for --lr {rates} (") if rates else hint == ""


def test_the_hint_names_learning_rates_that_diverged_and_if_none_learns_some_to_try():
    all_diverged = divergence_hint([30, 3], [713_068, math.nan], 10)
    assert "--lr 30 3 (713068 nan; chance is 2.30); try --lr 0.003 0.03 0.3: " in all_diverged
    one = divergence_hint([0.1, 1, 30], [0.9, 1.1, 713_068], 10)
    assert one == "loss diverged for --lr 30 (713068; chance is 2.30); the best head is kept"
