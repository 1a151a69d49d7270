"""A frozen backbone: linear heads on it, k-nearest neighbours on its features, and their accuracy.

Weighted k-nearest-neighbour classification: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance
Discrimination, CVPR 2018, section 3.4.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from moco import augment, checkpoint, contents, datasets, distributed, loader, metrics
from moco.distributed import DistContext
from moco.encoders import autocast, build_encoder
from moco.errors import UsageError, first_line

KNN_K, KNN_TEMPERATURE = 200, 0.07


# Models


def build_probe(arch: str, classes: int, backbone: Mapping[str, torch.Tensor]) -> nn.Module:
    """`arch` with these backbone weights, frozen, and a new head of `classes` outputs: N(0, 0.01), bias 0.

    backbone: the weights that checkpoint.find_backbone returns; {} for random ones.
    """
    model = build_encoder(arch, classes)
    if backbone:
        checkpoint.load_exactly(model, backbone, "--pretrained", allowed_missing=checkpoint.FC_KEYS)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    nn.init.normal_(model.fc.weight, mean=0.0, std=0.01)
    nn.init.zeros_(model.fc.bias)
    return model


class LinearHeads(nn.ModuleList):
    """Linear heads side by side on the same features (N, d): logits (heads, N, classes)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([head(features) for head in self])


def load_classifier(path: str, option: str = "--pretrained") -> tuple[nn.Module, dict]:
    """(model in eval mode, checkpoint) of a linear checkpoint, with a head as wide as the file's."""
    saved = checkpoint.load(path, option)
    check_linear(saved, f"{option} {path}")
    model = build_encoder(saved["arch"], checkpoint.num_outputs(saved, f"{option} {path}"))
    model.load_state_dict(checkpoint.strip_prefix(saved["state_dict"]), strict=False)
    return model.eval(), saved


def check_linear(saved: Mapping, source: str) -> None:
    """Raise UsageError unless this is a linear checkpoint whose weights are complete and finite."""
    outputs = checkpoint.num_outputs(saved, source)
    if "arch" not in saved:
        raise UsageError(f"{source}: not a linear checkpoint, it has no arch")
    contents.check_values(saved, source)
    with torch.device("meta"):
        model = build_encoder(saved["arch"], outputs)
    state = checkpoint.strip_prefix(saved["state_dict"])
    checkpoint.check_exactly(model, state, source)
    checkpoint.check_finite(state, source)
    contents.check_heads(saved, source, model.fc)
    if len(saved.get("wnids", [])) > outputs:
        raise UsageError(f"{source}: it names {len(saved['wnids'])} classes, but its head has {outputs} outputs")


def check_image_size(model: nn.Module, arch: str, image_size: int) -> None:
    """Raise UsageError if the model, on the meta device, does not accept images of that size."""
    try:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError) as error:  # only shapes can be wrong here
        raise UsageError(
            f"--image-size {image_size} does not suit --arch {arch} ({first_line(error)}); 224 px does"
        ) from error


def check_classes(saved: Mapping, classes: Sequence[str], source: str) -> None:
    """Raise UsageError unless the head of a linear checkpoint can be scored on data of these classes (sorted names).

    A published head does not say its classes; one at least as wide as the data is accepted.
    """
    own = saved.get("wnids")
    if own is not None and own != classes:
        other = sorted(set(own) ^ set(classes))
        raise UsageError(
            f"{source}: its head was trained on {len(own)} classes that differ from the {len(classes)} of this data"
            f" (for example {other[0] if other else own[0]}); use the data it was trained on"
        )
    width = checkpoint.num_outputs(saved, source)
    if width < len(classes):
        raise UsageError(
            f"{source}: its head has {width} outputs, the data {len(classes)} classes; use the data it was trained on"
        )


def check_frozen(backbone: nn.Module, frozen: Mapping[str, torch.Tensor]) -> None:
    """A guard against bugs: raise RuntimeError if the backbone's weights or statistics are no longer `frozen`."""
    own = backbone.state_dict()
    changed = [name for name, value in frozen.items() if not torch.equal(own[name], value)]
    if changed:
        raise RuntimeError(f"the frozen backbone changed during training: {', '.join(changed[:5])}")


class BestHead:
    """The best validation top-1 of each head so far, in percent (-1 before the first), and the last epoch's winner."""

    def __init__(self, acc1s: Sequence[float], winner: int):
        self.acc1s, self.winner = list(acc1s), winner

    def update(self, heads: LinearHeads, results: Sequence[Mapping]) -> bool:
        """Take an epoch's results of `evaluate`; True if its winner beats all before. NaN weights never win."""
        acc1s = [
            -1.0 if checkpoint.nonfinite(head.state_dict()) else result["acc1"] for head, result in zip(heads, results)
        ]
        self.winner = acc1s.index(max(acc1s))
        is_best = acc1s[self.winner] > max(self.acc1s)
        self.acc1s = [max(pair) for pair in zip(acc1s, self.acc1s)]
        return is_best


# Evaluation


def to_input(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images (N, 3, H, W) from a loader → normalised float32 images on the device."""
    return augment.normalize(images.to(device, non_blocking=True).float() / 255)


@torch.no_grad()
def extract_features(backbone: nn.Module, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Features (N, d), float32, of a backbone whose `fc` is Identity, computed in `dtype`."""
    with autocast(images.device, dtype):
        return backbone(images).float()


def predict(backbone: nn.Module, heads: nn.Module, dtype: torch.dtype, images: torch.Tensor) -> torch.Tensor:
    """The logits (heads, N, classes) of LinearHeads on a backbone whose `fc` is Identity."""
    return heads(extract_features(backbone, images, dtype))


@torch.inference_mode()
def predictions(predict: Callable, batches: Iterable, device: torch.device) -> Iterator[tuple]:
    """(predict(images), labels (N,)) for each batch, normalised and on the device."""
    for images, labels in batches:
        yield predict(to_input(images, device)), labels.to(device, non_blocking=True)


def evaluate(predict: Callable, batches: Iterable, device: torch.device) -> list[dict]:
    """Exact accuracy over all ranks, every image counted once, of several classifiers at once.

    predict(images) returns each classifier's logits (N, classes). Returns for each {"acc1", "acc5"} in percent and "n".
    """
    correct = 0
    for logits, labels in predictions(predict, batches, device):
        counts = [metrics.correct_counts(own, labels) for own in logits]
        correct = correct + torch.stack([torch.cat([count, count.new_tensor([len(labels)])]) for count in counts])
    return [
        {"acc1": 100 * top1 / n, "acc5": 100 * top5 / n, "n": n}
        for top1, top5, n in distributed.all_reduce(correct).tolist()
    ]


# k-nearest neighbours


class _ReadableImages(Dataset):
    """Labelled images; an unreadable one is replaced by another of its class, as in training."""

    def __init__(self, folder: datasets.ImageFolder, image_size: int):
        images = datasets.ImageList(folder.paths, folder.labels, datasets.eval_transform(image_size))
        self.dataset = datasets.RetryDataset(images, folder.labels)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        item, _ = self.dataset[index, index]
        return item


def knn_loaders(
    folders: Sequence[datasets.ImageFolder], image_size: int, batch_size: int, workers: int, ctx: DistContext
) -> list[DataLoader]:
    """Loaders of the training and validation images for `knn_accuracy`."""
    return [loader.eval_loader(_ReadableImages(folder, image_size), batch_size, workers, ctx) for folder in folders]


def knn_predict(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
) -> torch.Tensor:
    """The class of each query by a vote of its k nearest neighbours, each with weight exp(cosine / temperature).

    queries: (N, C); bank: (M, C), both of unit length; labels: (M,). k is at most M. Returns (N,) int64.
    """
    cosine, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    # The -1 is a common factor that avoids overflow.
    votes.scatter_add_(1, labels[nearest], ((cosine - 1) / temperature).exp())
    return votes.argmax(dim=1)


@torch.inference_mode()
def fc_inputs(encoder: nn.Module, batches: Iterable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length inputs (N, d) of the encoder's `fc`, the features that a linear probe sees, and the labels (N,)."""
    features, labels = [], []
    hook = encoder.fc.register_forward_pre_hook(
        lambda _, inputs: features.append(F.normalize(inputs[0].float(), dim=1))
    )
    for images, some_labels in batches:
        encoder(to_input(images, device))
        labels.append(some_labels.to(device))
    hook.remove()
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    encoder: nn.Module,
    train_batches: Iterable,
    val_batches: Iterable,
    classes: int,
    device: torch.device,
    chunk: int = 512,
) -> float:
    """Top-1 in percent of val_batches by their neighbours in train_batches, over all ranks, each with its share.

    The encoder is in eval mode meanwhile.
    """
    was_training = encoder.training
    encoder.eval()
    # One rank's BatchNorm statistics for all images: rank 0's, which are the saved ones.
    distributed.broadcast_buffers(encoder)
    bank, labels = (distributed.gather_uneven(share) for share in fc_inputs(encoder, train_batches, device))
    queries, targets = fc_inputs(encoder, val_batches, device)
    encoder.train(was_training)
    correct = torch.zeros(2, dtype=torch.long, device=device)
    for some, wanted in zip(queries.split(chunk), targets.split(chunk)):
        correct[0] += (knn_predict(some, bank, labels, classes) == wanted).sum()
        correct[1] += len(wanted)
    hits, n = distributed.all_reduce(correct).tolist()
    return 100 * hits / n
