"""How good features are without training anything on them: weighted k-nearest-neighbour classification.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018, section 3.4.
"""

import os

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from moco import distributed, folders, loader
from moco.classifier import to_input

K, TEMPERATURE = 200, 0.07


class _Readable(Dataset):
    """Labelled images by index; one that cannot be read gives way to another of its class, as in training."""

    def __init__(self, paths, labels, view):
        self.views = loader.RandomViews(labels, loader.LabelledViews(paths, labels, view))

    def __len__(self):
        return len(self.views)

    def __getitem__(self, index):
        labelled, _ = self.views[index, index]
        return labelled


def neighbour_loaders(data, image_size, batch_size, workers, place):
    """Loaders of train/ and val/ for `accuracy`, and the number of classes; None where val/ is missing or has others."""
    if not os.path.isdir(os.path.join(data, "val")):
        return None
    splits = [folders.list_photos(os.path.join(data, split)) for split in ("train", "val")]
    if splits[0][2] != splits[1][2]:
        return None
    view = loader.test_view(image_size)
    return *[loader.evaluation_loader(_Readable(paths, labels, view), batch_size, workers, place)
             for paths, labels, _ in splits], len(splits[0][2])


def weighted_vote(queries, bank, labels, classes, k=K, temperature=TEMPERATURE):
    """The class of each query by its k nearest neighbours in the bank, each weighing exp(cosine / temperature).

    queries: (N, C); bank: (M, C), both of unit length; labels: (M,). k is at most M. Returns (N,) int64.
    """
    cosine, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    votes.scatter_add_(1, labels[nearest], ((cosine - 1) / temperature).exp())  # the common factor keeps it finite
    return votes.argmax(dim=1)


@torch.inference_mode()
def backbone_features(encoder, batches, device):
    """Unit features (N, C) of the input of the encoder's `fc`, as the linear probe sees them, and the labels (N,)."""
    features, labels = [], []
    hook = encoder.fc.register_forward_pre_hook(lambda _, inputs: features.append(F.normalize(inputs[0].float(), dim=1)))
    for images, some in batches:
        encoder(to_input(images, device))
        labels.append(some.to(device))
    hook.remove()
    return torch.cat(features), torch.cat(labels)


def accuracy(encoder, train_batches, val_batches, classes, device, chunk=512):
    """Top-1 in percent of val_batches by their neighbours in train_batches; over all processes, each with its share.

    The encoder is in eval mode meanwhile.
    """
    training = encoder.training
    encoder.eval()
    bank, labels = (distributed.gather_uneven(share) for share in backbone_features(encoder, train_batches, device))
    queries, truth = backbone_features(encoder, val_batches, device)
    encoder.train(training)
    correct = torch.zeros(2, dtype=torch.long, device=device)
    for some, wanted in zip(queries.split(chunk), truth.split(chunk)):
        correct[0] += (weighted_vote(some, bank, labels, classes) == wanted).sum()
        correct[1] += len(wanted)
    right, n = distributed.all_reduce(correct).tolist()
    return 100 * right / n
