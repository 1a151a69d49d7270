"""Weighted k-nearest-neighbour accuracy of the encoder, to monitor pre-training.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018, section 3.4.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from moco import distributed
from moco.data import datasets, loader
from moco.distributed import DistContext
from moco.evaluation.classifier import predictions

K, TEMPERATURE = 200, 0.07
BLOCK, CHUNK = 4096, 512  # training images, about, and validation images that are compared at a time


class _ReadableImages(datasets.RetryDataset):
    """Labelled images; an unreadable one is replaced by another of its class, as in training."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return super().__getitem__((index, index))[0]


def loaders(
    folders: Sequence[NamedTuple], image_size: int, batch_size: int, workers: int, ctx: DistContext
) -> list[DataLoader]:
    """Loaders of the training and validation images for `accuracy`."""
    transform = datasets.eval_transform(image_size, datasets.read_rgb)
    images = [datasets.ImageList(each.paths, each.labels, transform) for each in folders]
    return [loader.eval_loader(_ReadableImages(each, each.labels), batch_size, workers, ctx) for each in images]


def _top_k(cosines: torch.Tensor, labels: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the cosines (N, M ≥ k), and their labels."""
    cosines, indices = cosines.topk(k, dim=1)
    return cosines, labels.gather(1, indices)


def _unit_features(encoder: nn.Module, batches: Iterable, device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    """(features, labels (N,)) of each batch: unit-length inputs (N, d) of the encoder's `fc`."""
    # A copy that shares all weights. Unlike a compiled encoder, it is not compiled again for each batch size.
    backbone = copy.copy(encoder)
    backbone._modules = {**encoder._modules, "fc": nn.Identity()}
    return predictions(lambda images: F.normalize(backbone(images).float(), dim=1), batches, device, dtype)


def accuracy(
    encoder: nn.Module, train_batches: Iterable, val_batches: Iterable, classes: int, device: torch.device, k: int = K,
    dtype: torch.dtype = torch.float32,
) -> float:  # fmt: skip
    """Top-1 in percent of val_batches by their neighbours in train_batches, over all ranks, each with its share.

    The encoder computes in `dtype`, and is in eval mode meanwhile. Each rank keeps the features of all V validation
    images, and compares them with a few batches of its training images, whose features are not kept, CHUNK validation
    images at a time. That takes 4 V (d + 3 k) bytes on each rank, 0.53 GB for ImageNet and a ResNet-50, and some 50 MB
    more.
    """
    was_training = encoder.training
    encoder.eval()
    # One rank's BatchNorm statistics for all images: rank 0's, which are the saved ones.
    distributed.broadcast_buffers(encoder)
    width = next(layer.in_features for layer in encoder.fc.modules() if isinstance(layer, nn.Linear))
    # for a rank that has no validation image
    empty = torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.long, device=device)
    shares = map(torch.cat, zip(empty, *_unit_features(encoder, val_batches, device, dtype)))
    queries, targets = map(distributed.gather_in_order, shares)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(targets), CHUNK)]
    top_cosines = queries.new_full((len(queries), k), -math.inf)  # -inf: an empty slot, whose vote is exp(-inf) = 0
    top_labels = targets.new_zeros(len(queries), k)
    training = _unit_features(encoder, train_batches, device, dtype)
    for batch in training:
        bank, bank_labels = map(torch.cat, zip(batch, *itertools.islice(training, BLOCK // len(batch[1]))))
        for own in chunks:
            cosines = torch.cat([top_cosines[own], queries[own] @ bank.T], dim=1)
            labels = torch.cat([top_labels[own], bank_labels.expand(len(cosines), -1)], dim=1)
            top_cosines[own], top_labels[own] = _top_k(cosines, labels, k)
    encoder.train(was_training)
    hits = 0
    for own in chunks:
        of_all_ranks = [distributed.gather(top[own].T).T for top in (top_cosines, top_labels)]
        cosines, labels = _top_k(*of_all_ranks, k)
        weights = ((cosines - 1) / TEMPERATURE).exp()  # the -1 is a common factor that avoids overflow
        votes = weights.new_zeros(len(cosines), classes).scatter_add_(1, labels, weights)
        hits += (votes.argmax(dim=1) == targets[own]).sum()
    return 100 * hits.item() / len(targets)
