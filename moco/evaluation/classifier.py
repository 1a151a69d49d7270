"""A frozen backbone, linear heads on its features, and their accuracy."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from moco import augment, distributed
from moco.encoders import DTYPES, autocast, build_encoder, configure_device, float32_linear
from moco.errors import UsageError
from moco.training import checkpoint, files

DIVERGED = 2  # times ln(classes), the loss at chance: over an epoch, heads that learn stay below 1.2


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


def load_classifier(path: str) -> tuple[nn.Module, dict]:
    """(model in eval mode, checkpoint) of a linear checkpoint, with a head as wide as the file's."""
    saved = checkpoint.load(path, "--pretrained")
    check_linear(saved, f"--pretrained {path}")
    model = build_encoder(saved["arch"], checkpoint.num_outputs(saved, path))
    model.load_state_dict(checkpoint.strip_prefix(saved["state_dict"]), strict=False)
    return model.eval(), saved


def prepare(
    models: Sequence[nn.Module], device: torch.device, precision: str, strict_fp32: bool
) -> tuple[list[nn.Module], torch.dtype]:
    """Linear classifiers on their device, to be tested in this precision, and its dtype. The heads stay in fp32."""
    configure_device(device, strict_fp32, deterministic=True)
    dtype = DTYPES[precision]
    for model in models if dtype.itemsize == 2 else ():
        model.fc = float32_linear(model.fc)
    return [model.to(device, memory_format=torch.channels_last) for model in models], dtype


def check_linear(saved: Mapping, source: str) -> None:
    """Raise UsageError unless this is a linear checkpoint whose weights are complete and finite."""
    outputs = checkpoint.num_outputs(saved, source)
    if "arch" not in saved:
        raise UsageError(f"{source}: not a linear checkpoint, it has no arch")
    checkpoint.check_values(saved, source)
    with torch.device("meta"):
        model = build_encoder(saved["arch"], outputs)
    checkpoint.check_exactly(model, checkpoint.strip_prefix(saved["state_dict"]), source)
    with checkpoint.reading(source):
        if "heads" in saved:  # they may hold NaN: of learning rates that were too large
            heads = LinearHeads(nn.Linear(model.fc.in_features, outputs) for _ in saved["lrs"])
            heads.load_state_dict(saved["heads"])
        if len(saved.get("wnids", [])) > outputs:
            raise ValueError(f"it names {len(saved['wnids'])} classes, but its head has {outputs} outputs")


def made_with(saved: Mapping, source: str) -> dict:
    """Hashes of a linear checkpoint's weights; options of its pre-training and its probe, as far as it tells."""
    state, digest, hashes = checkpoint.strip_prefix(saved["state_dict"]), hashlib.sha256(), []
    for names in sorted(state.keys() - {*checkpoint.FC_KEYS}), checkpoint.FC_KEYS:  # the backbone, then the head
        for name in names:
            digest.update(name.encode() + state[name].flatten().contiguous().view(torch.uint8).numpy().tobytes())
        hashes.append(digest.hexdigest())
    random = {"robust": "random weights"} if saved.get("pretrained") == "" else None
    lrs = {"lr": sorted(saved["lrs"])} if "lrs" in saved else {}
    return {
        "sha256": hashes[1], "backbone_sha256": hashes[0], "pretrained": str(saved.get("pretrained") or ""),
        "pretraining": checkpoint.settings(saved, "pretraining", source) or random,
        "probe": checkpoint.settings(saved, "probe", source) | lrs,
    }  # fmt: skip


def check_classes(saved: Mapping, classes: Sequence[str], source: str) -> None:
    """Raise UsageError unless the head of a linear checkpoint can be scored on data of these classes (sorted names).

    A published head does not say its classes; one at least as wide as the data is accepted.
    """
    own, width = saved.get("wnids", classes), checkpoint.num_outputs(saved, source)
    if own != classes:
        different = sorted(set(own) ^ set(classes)) or own  # or the same in another order
        found = f"{len(own)} classes that differ from the {len(classes)} of this data (for example {different[0]})"
    elif width < len(classes):
        found = f"{width} outputs, the data {len(classes)} classes"
    else:
        return
    raise UsageError(f"{source}: its head has {found}; use the data that it was trained on")


class BestHead:
    """The best validation top-1 of each head so far, in percent (-1 before the first), and the last epoch's winner."""

    def __init__(self, acc1s: Sequence[float], winner: int):
        self.acc1s, self.winner = list(acc1s), winner

    def update(self, results: Sequence[Mapping]) -> bool:
        """Take an epoch's results of `evaluate`; True if its winner beats all before. NaN outputs never win."""
        acc1s = [-1.0 if result["not_finite"] else result["acc1"] for result in results]
        self.winner = acc1s.index(max(acc1s))
        is_best = acc1s[self.winner] > max(self.acc1s)
        self.acc1s = [max(pair) for pair in zip(acc1s, self.acc1s)]
        return is_best


def divergence_hint(lrs: Sequence[float], losses: Sequence[float], classes: int) -> str:
    """A line on heads whose mean loss over an epoch is far above chance, or NaN; if all are, with rates to try."""
    diverged = [pair for pair in zip(lrs, losses) if not pair[1] <= DIVERGED * math.log(classes)]
    if not diverged:
        return ""
    rates, figures = (" ".join(f"{value:.6g}" for value in values) for values in zip(*diverged))
    tries = " ".join(f"{min(lrs) / 10**n:g}" for n in (3, 2, 1))
    way = "the best head is kept" if len(diverged) < len(lrs) else f"try --lr {tries}: a head for each of them"
    return f"loss diverged for --lr {rates} ({figures}; chance is {math.log(classes):.2f}); {way}"


# Evaluation


def to_input(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images (N, 3, H, W) from a loader → normalised float32 images on the device."""
    return augment.normalize(images.to(device, non_blocking=True).float() / 255)


@torch.no_grad()
def extract_features(backbone: nn.Module, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Features (N, d), float32, of a backbone whose `fc` is Identity, computed in `dtype`."""
    with autocast(images.device, dtype):
        return backbone(images).float()


@torch.inference_mode()
def predictions(
    predict: Callable, batches: Iterable, device: torch.device, dtype: torch.dtype = torch.float32
) -> Iterator[tuple]:
    """(predict(images), labels (N,)) for each batch, normalised and on the device; networks compute in `dtype`."""
    for images, labels in batches:
        inputs = to_input(images, device)
        with autocast(device, dtype):
            predicted = predict(inputs)
        yield predicted, labels.to(device, non_blocking=True)


def correct_counts(logits: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = (1, 5)) -> torch.Tensor:
    """Number of labels (N,) among the k largest of logits (N, classes), for each k: (len(ks),) int64."""
    ranked = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices == labels.view(-1, 1)
    return torch.stack([ranked[:, :k].sum() for k in ks])


def evaluate(predict: Callable, batches: Iterable, device: torch.device) -> list[dict]:
    """Exact accuracy over all ranks, every image counted once, of several classifiers at once.

    predict(images) returns each classifier's logits (N, classes). Returns for each {"acc1", "acc5"} in percent, "n",
    and "not_finite", the number of images with infinite outputs or NaN.
    """
    counts, seen = torch.zeros(1, 3, dtype=torch.long, device=device), 0
    for logits, labels in predictions(predict, batches, device):
        broken = [(~own.isfinite().all(1)).sum().view(1) for own in logits]
        correct = [correct_counts(own, labels) for own in logits]
        counts = counts + torch.stack([torch.cat(pair) for pair in zip(correct, broken)])  # classifiers×3
        seen += len(labels)
    (classifiers,) = distributed.all_reduce_max(len(counts))  # 1×3 on a rank without images
    counts = torch.cat([counts.expand(classifiers, 3), counts.new_full((classifiers, 1), seen)], dim=1)
    return [
        {"acc1": 100 * top1 / n, "acc5": 100 * top5 / n, "n": n, "not_finite": broken}
        for top1, top5, broken, n in distributed.all_reduce(counts).tolist()
    ]


# Features of a split in a file


def save_features(path: str, features: torch.Tensor, folder: NamedTuple) -> None:
    """Write the features (N, d) of val/ with labels, paths and classes, for numpy.load. Raises OSError."""
    with files.atomic_write(path, "wb") as file:
        np.savez(
            file,
            features=features.numpy(),
            labels=np.array(folder.labels, dtype=np.int64),
            paths=np.array(list(folder.paths)),
            classes=np.array(folder.classes),
            split=np.array("val"),
        )
