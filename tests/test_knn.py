import math

import pytest
import torch
import torch.nn.functional as F

from moco import knn


def unit(*shape, seed=0):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("k", [1, 5, 200])
def test_votes_equal_the_definition_written_out_in_loops(k):
    queries, bank = unit(6, 8), unit(30, 8, seed=1)
    labels = torch.arange(30) % 3
    expected = []
    for query in queries:
        cosines = sorted(((query @ feature).item(), label.item()) for feature, label in zip(bank, labels))[::-1][:k]
        votes = [sum(math.exp(cosine / 0.07) for cosine, label in cosines if label == c) for c in range(3)]
        expected.append(votes.index(max(votes)))
    assert classifier.knn_predict(queries, bank, labels, 3, k).tolist() == expected


class Sign(torch.nn.Module):
    """A network whose features before fc are an image's mean colours; in training mode it would fail."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, images):
        assert not self.training
        return self.fc(images.mean(dim=(2, 3)))


def test_accuracy_by_the_features_before_fc():
    def batch(reds, labels):
        images = torch.zeros(len(reds), 3, 4, 4, dtype=torch.uint8)
        images[:, 0] = torch.tensor(reds).view(-1, 1, 1)
        images[:, 2] = 255 - images[:, 0]
        return images, torch.tensor(labels)
    encoder = Sign().train()
    train = [batch([250, 240], [0, 0]), batch([10, 20, 15], [1, 1, 1])]
    val = [batch([245, 5], [0, 1]), batch([230], [1])]
    assert classifier.knn_accuracy(encoder, train, val, 2, torch.device("cpu")) == pytest.approx(100 * 2 / 3)
    assert encoder.training and not encoder.fc._forward_pre_hooks
