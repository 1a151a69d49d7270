"""The test sets of the paper's robustness columns: folders, classes by wnid, corruptions, averages.

ImageNet-C and mCE: Hendrycks & Dietterich, ICLR 2019. ImageNet-Sketch: Wang et al., NeurIPS 2019. Stylized-ImageNet
and shape bias: Geirhos et al., ICLR 2019. ImageNet-R: Hendrycks et al., ICCV 2021.
"""

import os
import re
import statistics
from typing import NamedTuple

import torch

from moco import distributed, folders, loader
from moco.classifier import outputs
from moco.failures import BadInput

SUITES = ("val", "corruption", "sketch", "stylized", "rendition")
CORRUPTIONS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),  # never in the average
}
STANDARD = [name for group in ("noise", "blur", "weather", "digital") for name in CORRUPTIONS[group]]
SEVERITIES = range(1, 6)
ALEXNET_ERRORS = {  # mean top-1 error over the severities, percent; the authors' figures, by which mCE divides
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
# How many images a class has in the published sets: all have 50, but in -Sketch duplicates were taken out.
USUAL = {"val": range(50, 51), "corruption": range(50, 51), "sketch": range(40, 52), "stylized": range(50, 51)}


class Cell(NamedTuple):
    """What is scored at once: a test set, or one severity of one corruption."""

    key: str            # "val", "corruption/fog/3"
    folder: str
    paths: list
    labels: list

    @property
    def suite(self):
        return self.key.split("/")[0]

    def preprocessing(self, size):
        """Corrupted images are at their final size: resizing them first is a known mistake."""
        return f"CenterCrop({size})" if self.suite == "corruption" else f"Resize({round(size * 256 / 224)}), CenterCrop({size})"

    def warning(self, wnids):
        """What is odd about its numbers of images, if the classes are ImageNet's; "" if nothing is."""
        usual = USUAL.get(self.suite)
        if usual is None or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids):
            return ""
        counts = torch.tensor(self.labels).bincount(minlength=len(wnids)).tolist()
        odd = [f"{wnid} {n}" for wnid, n in zip(wnids, counts) if n not in usual]
        expected = f"{usual[0]} to {usual[-1]}" if len(usual) > 1 else usual[0]
        return f"{len(odd)} of {len(wnids)} classes have not {expected} images ({', '.join(odd[:3])})" if odd else ""


def class_root(directory):
    """The folder that holds the class folders: DIR/val where there is one, else DIR."""
    inner = os.path.join(directory, "val")
    return inner if os.path.isdir(inner) else directory


def list_by_wnid(directory, wnids, limit=None):
    """(paths, labels) of the images whose class folder is one of `wnids`; a label is the wnid's place in that list.

    limit: only the first so many of each class. Classes are matched by folder name, never by order. BadInput where none
    matches.
    """
    paths, folder_labels, classes = folders.list_photos(directory)
    place = {wnid: index for index, wnid in enumerate(wnids)}
    taken, kept = [0] * len(classes), []
    for path, label in zip(paths, folder_labels):
        if classes[label] in place and (limit is None or taken[label] < limit):
            taken[label] += 1
            kept.append((path, place[classes[label]]))
    if not kept:
        raise BadInput(f"{directory}: none of its {len(classes)} class folders ({classes[0]}, …) is a class of the head"
                       f" ({wnids[0]}, …)")
    return [path for path, _ in kept], [label for _, label in kept]


def corruption_folders(directory):
    """{(corruption, severity): folder} of what an ImageNet-C folder holds, in either layout its archives leave.

    BadInput where it holds no corruption at all.
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
        raise BadInput(f"{directory}: no <corruption>/<severity>/<wnid> folders, for example gaussian_noise/1/")
    return found


def list_cells(directories, wnids, limit=None):
    """All cells of {suite: directory}. BadInput where a directory does not hold what its suite needs."""
    cells = []
    for suite, directory in directories.items():
        parts = {suite: class_root(directory)}
        if suite == "corruption":
            parts = {f"corruption/{name}/{severity}": folder
                       for (name, severity), folder in corruption_folders(directory).items()}
        cells += [Cell(key, folder, *list_by_wnid(folder, wnids, limit)) for key, folder in parts.items()]
    return cells


def score(cells, models, wnids, image_size, batch_size, workers, place, on_batch=lambda images: None):
    """Score linear classifiers that share one class list: yields (cell, a result for each model) one cell after the other.
    Each image is read once, by one of the processes, which must all do this.

    models: in eval mode, on the place's device; wnids: the class of output 0, 1, …; outputs beyond them count as wrong.
    A result: top-1 in percent over all outputs and over the classes present here, n, and class counts. Where the file
    names tell a second, conflicting cue (<shape class>/<texture class>-*.png), also the shape bias: of the decisions for
    either cue, the percentage for shape. The same in all processes.
    """
    if not cells:
        return
    views = [loader.center_view(image_size) if cell.suite == "corruption" else loader.test_view(image_size) for cell in cells]
    datasets = [loader.Labelled(cell.paths, cell.labels, view) for cell, view in zip(cells, views)]
    batches = outputs(lambda images: [model(images) for model in models],
                      loader.evaluation_loader(datasets, batch_size, workers, place), place.device)
    for cell in cells:
        present = torch.tensor(sorted(set(cell.labels)), device=place.device)
        decisions = torch.zeros(len(models), 2, len(cell.labels), dtype=torch.long, device=place.device)
        mine = decisions[:, :, place.rank::place.world_size]         # as evaluation_loader deals them
        done = 0
        while done < mine.shape[2]:
            logits, labels = next(batches)
            for model, values in enumerate(logits):
                mine[model, :, done:done + len(labels)] = torch.stack(
                    [values.argmax(1), present[values[:, present].argmax(1)]])
            done += len(labels)
            on_batch(len(labels) * place.world_size)
        decisions = distributed.all_reduce(decisions).cpu()
        labels, textures = torch.tensor(cell.labels), texture_labels(cell.paths, cell.labels, wnids)
        yield cell, [_result(*decided, labels, textures, wnids) for decided in decisions]


def _result(decided, decided_shared, labels, textures, wnids):
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


def texture_labels(paths, labels, wnids):
    """The label of each cue-conflict image's texture, from its name <texture class>-*; None unless all names tell one."""
    place = {wnid: index for index, wnid in enumerate(wnids)}
    textures = [place.get(os.path.basename(path).rsplit("-", 1)[0]) for path in paths]
    if None in textures or any(texture == label for texture, label in zip(textures, labels)):
        return None
    return torch.tensor(textures)


def missing_corruptions(keys):
    """The standard cells that are not among the keys, as "fog/3"; all 75 make the mean."""
    return [f"{name}/{severity}" for name in STANDARD for severity in SEVERITIES if f"corruption/{name}/{severity}" not in keys]


def corruption_figures(top1, classes):
    """Means of {"corruption/fog/3": top-1, …} of one model, each cell weighing the same: Corruption over the standard
    corruptions, the four extra ones apart, and, where nothing is missing and there are 1000 classes, mCE."""
    def cells(names):
        return [value for key, value in top1.items() if key.split("/")[1] in names]
    figures = {}
    if cells(STANDARD):
        figures["Corruption"] = statistics.fmean(cells(STANDARD))
    if cells(CORRUPTIONS["extra"]):
        figures["Corruption, extra four"] = statistics.fmean(cells(CORRUPTIONS["extra"]))
    if classes == 1000 and not missing_corruptions(top1):
        figures["mCE"] = statistics.fmean(100 * (100 - statistics.fmean(cells([name]))) / error
                                          for name, error in ALEXNET_ERRORS.items())
    return figures
