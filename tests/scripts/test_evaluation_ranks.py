"""Several ranks share an evaluation: the figures are those of one process."""

from unittest import mock

import pytest
import torch
from helpers import run_ranks

from moco import distributed
from moco.distributed import DistContext
from moco.encoders import build_encoder
from moco.evaluation import classifier, knn

ALONE = DistContext()


class Pixels(torch.nn.Module):
    """A network whose features before fc are an image's pixels."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(48, 4)

    def forward(self, images):
        return self.fc(images.flatten(1))


def batches_of(n, seed, ctx, side=4):
    """This rank's share of n random images, whose labels show in their brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=generator)
    images = torch.randint(200, (n, 3, side, side), generator=generator) + 11 * labels.view(-1, 1, 1, 1)
    share = slice(ctx.rank, None, ctx.world_size)
    return [pair for pair in zip(images.to(torch.uint8)[share].split(8), labels[share].split(8)) if len(pair[1])]


def knn_accuracies(ctx):
    """With many images, with fewer validation images than ranks, and with fewer training images."""
    sizes = (200, 50), (200, 1), (2, 50)
    sets = [[batches_of(n, seed, ctx) for seed, n in enumerate(pair)] for pair in sizes]
    with mock.patch.object(knn, "CHUNK", 7):
        return [knn.accuracy(Pixels(), *each, 5, ctx.device, k=15) for each in sets]


def knn_with_own_statistics(ctx):
    """kNN accuracy where BatchNorm statistics are far from rank 0's on the other ranks."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet10", 4)
    if ctx.rank:
        encoder.norm.running_mean += torch.linspace(-50, 50, 256)
        encoder.norm.running_var *= 100
    batches = batches_of(24, 1, ctx, side=32)
    return knn.accuracy(encoder, batches, batches, 5, ctx.device), encoder.norm.running_mean


def accuracies(ctx):
    """The accuracy of two heads on a single image."""
    heads = [lambda images, c=c: torch.eye(3)[c].expand(len(images), 3) for c in (0, 1)]
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    batches = [] if ctx.rank else [(images, torch.tensor([1]))]
    return classifier.evaluate(lambda images: [head(images) for head in heads], batches, ctx.device)


def features_in_order(ctx):
    """Test sets of more images than ranks, and of fewer."""
    rows = [torch.arange(2.0 * n).reshape(n, 2) for n in (5, 2)]
    return [distributed.gather_in_order(each[ctx.rank :: ctx.world_size].to(ctx.device)) for each in rows]


def test_ranks_share_the_work_also_ranks_without_an_image(tmp_path):
    ranks = run_ranks(3, tmp_path, knn_accuracies, knn_with_own_statistics, accuracies, features_in_order)
    assert ranks["knn_accuracies"] == [pytest.approx(knn_accuracies(ALONE), abs=1e-9)] * 3
    alone = accuracies(ALONE)
    assert [result["acc1"] for result in alone] == [0, 100] and alone[0]["n"] == 1
    assert ranks["accuracies"] == [alone] * 3
    assert str(ranks["features_in_order"]) == str([features_in_order(ALONE)] * 3)
    accuracy, statistics = knn_with_own_statistics(ALONE)
    for own_accuracy, own_statistics in ranks["knn_with_own_statistics"]:
        assert own_accuracy == pytest.approx(accuracy) and torch.equal(own_statistics, statistics)
