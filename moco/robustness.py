"""The test sets of the paper's robustness columns: folders, classes by wnid, corruptions, averages.

ImageNet-C and mCE: Hendrycks & Dietterich, ICLR 2019. ImageNet-Sketch: Wang et al., NeurIPS 2019. Stylized-ImageNet
and shape bias: Geirhos et al., ICLR 2019. ImageNet-R: Hendrycks et al., ICCV 2021.
"""

import os
import re
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn

from moco import datasets, distributed, loader
from moco.classifier import predictions
from moco.distributed import DistContext
from moco.errors import UsageError

SUITES = ("val", "corruption", "sketch", "stylized", "rendition")
CORRUPTIONS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),  # never part of the average
}
STANDARD = [name for group in ("noise", "blur", "weather", "digital") for name in CORRUPTIONS[group]]
SEVERITIES = range(1, 6)
ALEXNET_ERRORS = {  # mean top-1 error over the severities, percent: the authors' divisors of mCE
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
# Images per class in the published sets; ImageNet-Sketch had duplicates removed.
EXPECTED_COUNTS = {
    "val": range(50, 51),
    "corruption": range(50, 51),
    "sketch": range(40, 52),
    "stylized": range(50, 51),
}


class TestSet(NamedTuple):
    """The unit of evaluation: a whole test set, or one severity of one corruption."""

    __test__ = False  # not a test class for pytest

    key: str  # "val", "corruption/fog/3"
    folder: str
    paths: list[str]
    labels: list[int]

    @property
    def suite(self) -> str:
        return self.key.split("/")[0]

    def preprocessing(self, size: int) -> str:
        """Corrupted images already have their final size: resizing them first is a known mistake."""
        if self.suite == "corruption":
            return f"CenterCrop({size})"
        return f"Resize({round(size * 256 / 224)}), CenterCrop({size})"

    def transform(self, size: int) -> Callable[[str], torch.Tensor]:
        return (datasets.center_crop_transform if self.suite == "corruption" else datasets.eval_transform)(size)

    def warning(self, wnids: Sequence[str]) -> str:
        """How the images per class differ from the published set, if the classes are ImageNet's; "" if they do not."""
        expected = EXPECTED_COUNTS.get(self.suite)
        if expected is None or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids):
            return ""
        counts = torch.tensor(self.labels).bincount(minlength=len(wnids)).tolist()
        odd = [f"{wnid} {n}" for wnid, n in zip(wnids, counts) if n not in expected]
        usual = f"{expected[0]} to {expected[-1]}" if len(expected) > 1 else expected[0]
        return f"{len(odd)} of {len(wnids)} classes do not have {usual} images ({', '.join(odd[:3])})" if odd else ""


def class_root(directory: str) -> str:
    """The folder that holds the class folders: DIR/val if it exists, else DIR."""
    inner = os.path.join(directory, "val")
    return inner if os.path.isdir(inner) else directory


def list_by_wnid(directory: str, wnids: Sequence[str], limit: int | None = None) -> tuple[list[str], list[int]]:
    """(paths, labels) of the images whose class folder is one of `wnids`; a label is the wnid's index in that list.

    limit: only the first so many of each class. Classes are matched by folder name, never by order. Raises UsageError
    if none matches.
    """
    folder = datasets.list_images(directory)
    label_of = {wnid: index for index, wnid in enumerate(wnids)}
    taken, kept = [0] * len(folder.classes), []
    for path, label in zip(folder.paths, folder.labels):
        wnid = folder.classes[label]
        if wnid in label_of and (limit is None or taken[label] < limit):
            taken[label] += 1
            kept.append((path, label_of[wnid]))
    if not kept:
        raise UsageError(
            f"{directory}: none of its {len(folder.classes)} class folders ({folder.classes[0]}, …) is a class of the"
            f" head ({wnids[0]}, …)"
        )
    return [path for path, _ in kept], [label for _, label in kept]


def corruption_folders(directory: str) -> dict[tuple[str, int], str]:
    """{(corruption, severity): folder} of an ImageNet-C folder, in either layout of the official archives.

    Raises UsageError if it holds no corruption at all.
    """
    found = {}
    for group, names in CORRUPTIONS.items():
        for name in names:
            for severity in SEVERITIES:
                for parent in (directory, os.path.join(directory, group)):
                    folder = os.path.join(parent, name, str(severity))
                    if os.path.isdir(folder):
                        found[name, severity] = folder
    if not found:
        raise UsageError(f"{directory}: no <corruption>/<severity>/<wnid> folders, for example gaussian_noise/1/")
    return found


def list_test_sets(directories: Mapping[str, str], wnids: Sequence[str], limit: int | None = None) -> list[TestSet]:
    """All test sets of {suite: directory}. Raises UsageError if a directory does not hold what its suite needs."""
    test_sets = []
    for suite, directory in directories.items():
        parts = {suite: class_root(directory)}
        if suite == "corruption":
            parts = {
                f"corruption/{name}/{severity}": folder
                for (name, severity), folder in corruption_folders(directory).items()
            }
        test_sets += [TestSet(key, folder, *list_by_wnid(folder, wnids, limit)) for key, folder in parts.items()]
    return test_sets


def score(
    test_sets: Sequence[TestSet],
    models: Sequence[nn.Module],
    wnids: Sequence[str],
    image_size: int,
    batch_size: int,
    workers: int,
    ctx: DistContext,
    on_batch: Callable[[int], object] = lambda images: None,
) -> Iterator[tuple[TestSet, list[dict]]]:
    """Score linear classifiers that share one class list: yields (test set, a result per model), set by set.

    models: in eval mode, on the context's device; wnids: the class of output 0, 1, …; outputs beyond them count as
    wrong. A result has the top-1 in percent over all outputs and over the classes present in the set, n, and counts
    per class. If file names give a second, conflicting cue (<shape class>/<texture class>-*.png), it also has the
    shape bias: the percentage of shape among the decisions for either cue. Each image is read once, by one rank; all
    ranks must call this and get the same results.
    """
    if not test_sets:
        return
    images = [
        datasets.StrictDataset(datasets.ImageList(each.paths, each.labels, each.transform(image_size)))
        for each in test_sets
    ]
    batches = predictions(
        lambda images: [model(images) for model in models],
        loader.eval_loader(images, batch_size, workers, ctx),
        ctx.device,
    )
    for test_set in test_sets:
        present = torch.tensor(sorted(set(test_set.labels)), device=ctx.device)
        decisions = torch.zeros(len(models), 2, len(test_set.labels), dtype=torch.long, device=ctx.device)
        mine = decisions[:, :, ctx.rank :: ctx.world_size]  # as eval_loader distributes them
        done = 0
        while done < mine.shape[2]:
            logits, labels = next(batches)
            for model, values in enumerate(logits):
                decided = torch.stack([values.argmax(1), present[values[:, present].argmax(1)]])
                mine[model, :, done : done + len(labels)] = decided
            done += len(labels)
            on_batch(len(labels) * ctx.world_size)
        decisions = distributed.all_reduce(decisions).cpu()
        labels, textures = torch.tensor(test_set.labels), texture_labels(test_set.paths, test_set.labels, wnids)
        yield test_set, [_result(*decided, labels, textures, wnids) for decided in decisions]


def _result(
    decided: torch.Tensor,
    decided_shared: torch.Tensor,
    labels: torch.Tensor,
    textures: torch.Tensor | None,
    wnids: Sequence[str],
) -> dict:
    n = len(labels)
    hits = decided == labels
    counts = labels.bincount(minlength=len(wnids)).tolist()
    correct = labels[hits].bincount(minlength=len(wnids)).tolist()
    result = {
        "top1": 100 * hits.sum().item() / n,
        "top1_shared_classes": 100 * (decided_shared == labels).sum().item() / n,
        "n": n,
        "classes": {wnid: {"n": m, "correct": c} for wnid, m, c in zip(wnids, counts, correct) if m},
    }
    if textures is not None:
        shape, texture = hits.sum().item(), (decided == textures).sum().item()
        result["shape_decisions"], result["texture_decisions"] = shape, texture
        result["shape_bias"] = 100 * shape / (shape + texture) if shape + texture else None
    return result


def texture_labels(paths: Sequence[str], labels: Sequence[int], wnids: Sequence[str]) -> torch.Tensor | None:
    """The texture label of each cue-conflict image, from its name <texture class>-*; None unless all names have one."""
    label_of = {wnid: index for index, wnid in enumerate(wnids)}
    textures = [label_of.get(os.path.basename(path).rsplit("-", 1)[0]) for path in paths]
    if None in textures or any(texture == label for texture, label in zip(textures, labels)):
        return None
    return torch.tensor(textures)


def missing_corruptions(keys: Collection[str]) -> list[str]:
    """The standard corruptions and severities that are not among the keys, as "fog/3"; all 75 make the mean."""
    return [
        f"{name}/{severity}"
        for name in STANDARD
        for severity in SEVERITIES
        if f"corruption/{name}/{severity}" not in keys
    ]


def corruption_figures(top1: Mapping[str, float], classes: int) -> dict[str, float]:
    """Means of one model's {"corruption/fog/3": top-1, …}, each severity of each corruption with the same weight.

    Corruption is over the standard corruptions; the four extra ones have a figure of their own, and so has mCE if
    nothing is missing and there are 1000 classes.
    """

    def of(names):
        return [value for key, value in top1.items() if key.split("/")[1] in names]

    figures = {}
    if of(STANDARD):
        figures["Corruption"] = statistics.fmean(of(STANDARD))
    if of(CORRUPTIONS["extra"]):
        figures["Corruption, extra four"] = statistics.fmean(of(CORRUPTIONS["extra"]))
    if classes == 1000 and not missing_corruptions(top1):
        figures["mCE"] = statistics.fmean(
            100 * (100 - statistics.fmean(of([name]))) / error for name, error in ALEXNET_ERRORS.items()
        )
    return figures
