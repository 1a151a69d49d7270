"""The test sets of the paper's robustness columns: folders, classes by wnid, corruptions, averages.

ImageNet-C: Hendrycks & Dietterich, ICLR 2019. ImageNet-Sketch: Wang et al., NeurIPS 2019. Stylized-ImageNet and
shape bias: Geirhos et al., ICLR 2019. ImageNet-R: Hendrycks et al., ICCV 2021.
"""

import os
import statistics

import torch

from moco import loader
from moco.classifier import outputs
from moco.distributed import Place
from moco.options import BadInput

CORRUPTIONS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),  # never in the average
}
STANDARD = [name for group in ("noise", "blur", "weather", "digital") for name in CORRUPTIONS[group]]
SEVERITIES = range(1, 6)


def class_root(directory):
    """The folder that holds the class folders: DIR/val where there is one, else DIR."""
    inner = os.path.join(directory, "val")
    return inner if os.path.isdir(inner) else directory


def list_by_wnid(directory, wnids):
    """(paths, labels) of the images whose class folder is one of `wnids`; a label is the wnid's place in that list.

    Classes are matched by folder name, never by order. BadInput where none matches.
    """
    paths, folder_labels, folders = loader.list_photos(directory)
    place = {wnid: index for index, wnid in enumerate(wnids)}
    kept = [(path, place[folders[label]]) for path, label in zip(paths, folder_labels) if folders[label] in place]
    if not kept:
        raise BadInput(f"{directory}: none of its {len(folders)} class folders ({folders[0]}, …) is a class of the head"
                       f" ({wnids[0]}, …)")
    return [path for path, _ in kept], [label for _, label in kept]


def corruption_cells(directory):
    """{(corruption, severity): folder} of what an ImageNet-C folder holds, in either layout its archives leave.

    BadInput where it holds no corruption at all.
    """
    cells = {}
    for group, names in CORRUPTIONS.items():
        for name in names:
            for severity in SEVERITIES:
                for parent in (directory, os.path.join(directory, group)):
                    folder = os.path.join(parent, name, str(severity))
                    if os.path.isdir(folder):
                        cells[name, severity] = folder
    if not cells:
        raise BadInput(f"{directory}: no <corruption>/<severity>/<wnid> folders, for example gaussian_noise/1/")
    return cells


class Scorer:
    """Scores linear classifiers that share one class list on folders of images, each image read once.

    models: in eval mode, on `device`; wnids: the class of output 0, 1, …; outputs beyond them count as wrong.
    """

    def __init__(self, models, wnids, image_size, batch_size, workers, device, on_batch=lambda images: None):
        self.models, self.wnids, self.image_size, self.device = models, wnids, image_size, device
        self.batch_size, self.workers, self.on_batch = batch_size, workers, on_batch

    def images(self, directory):
        return len(list_by_wnid(directory, self.wnids)[0])

    def score(self, directory, crop_only=False):
        """For each model: top-1 in percent over all outputs and over the classes present here, n, and class counts.

        crop_only: images are at their final size already (ImageNet-C). Where the file names tell a second, conflicting
        cue (<shape class>/<texture class>-*.png), also the shape bias: of the decisions for either cue, the percentage
        for shape.
        """
        paths, labels = list_by_wnid(directory, self.wnids)
        transform = (loader.transforms.CenterCrop(self.image_size) if crop_only
                     else loader.test_transform(self.image_size))
        dataset = loader.Labelled(paths, labels, transform)
        batches = loader.evaluation_loader(dataset, self.batch_size, self.workers, Place(device=self.device))
        present = torch.tensor(sorted(set(labels)), device=self.device)
        decisions = [[] for _ in self.models]
        for logits, batch_labels in outputs(self.models, batches, self.device):
            for kept, values in zip(decisions, logits):
                kept.append(torch.stack([values.argmax(1), present[values[:, present].argmax(1)]]).cpu())
            self.on_batch(len(batch_labels))
        textures = texture_labels(paths, labels, self.wnids)
        return [self._summary(*torch.cat(kept, dim=1), torch.tensor(labels), textures) for kept in decisions]

    def _summary(self, decided, decided_shared, labels, textures):
        n = len(labels)
        hits = decided == labels
        counts = labels.bincount(minlength=len(self.wnids)).tolist()
        correct = labels[hits].bincount(minlength=len(self.wnids)).tolist()
        summary = {
            "top1": 100 * hits.sum().item() / n,
            "top1_shared_classes": 100 * (decided_shared == labels).sum().item() / n,
            "n": n,
            "classes": {wnid: {"n": m, "correct": c} for wnid, m, c in zip(self.wnids, counts, correct) if m},
        }
        if textures is not None:
            shape, texture = hits.sum().item(), (decided == textures).sum().item()
            summary["shape_decisions"], summary["texture_decisions"] = shape, texture
            summary["shape_bias"] = 100 * shape / (shape + texture) if shape + texture else float("nan")
        return summary


def texture_labels(paths, labels, wnids):
    """The label of each cue-conflict image's texture, from its name <texture class>-*; None unless all names tell one."""
    place = {wnid: index for index, wnid in enumerate(wnids)}
    textures = [place.get(os.path.basename(path).rsplit("-", 1)[0]) for path in paths]
    if None in textures or any(texture == label for texture, label in zip(textures, labels)):
        return None
    return torch.tensor(textures)


def score_corruptions(scorer, directory):
    """For each model: the plain mean top-1 over the standard corruptions and severities, and every cell.

    `missing` names the standard cells that are not there; the mean is then over the others.
    """
    scored = {cell: scorer.score(folder, crop_only=True) for cell, folder in corruption_cells(directory).items()}
    missing = [f"{name}/{severity}" for name in STANDARD for severity in SEVERITIES if (name, severity) not in scored]
    summaries = []
    for model in range(len(scorer.models)):
        cells = {cell: results[model] for cell, results in scored.items()}
        standard = [result for (name, _), result in cells.items() if name in STANDARD]
        summaries.append({
            "top1": statistics.fmean(result["top1"] for result in standard) if standard else float("nan"),
            "n": sum(result["n"] for result in standard),
            "missing": missing,
            "corruptions": {name: {str(severity): cells[name, severity] for severity in SEVERITIES
                                   if (name, severity) in cells} for name in dict.fromkeys(name for name, _ in cells)},
        })
    return summaries
