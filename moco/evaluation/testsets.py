"""The test sets: folders, classes by wnid, and what is done to their images.

ImageNet-C: Hendrycks & Dietterich, ICLR 2019. ImageNet-Sketch: Wang et al., NeurIPS 2019. Stylized-ImageNet: Geirhos et
al., ICLR 2019. ImageNet-R: Hendrycks et al., ICCV 2021. Any other set of images in class folders has a name of its own.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms as transforms
from PIL import Image

from moco.data import datasets, folders
from moco.data.images import open_rgb
from moco.errors import UsageError
from moco.evaluation import cues

SUITES = ("val", "corruption", "sketch", "stylized", "rendition")
FURTHER = "set"  # the suite of a further set; its key is set/<name>
CORRUPTIONS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),  # never part of the average
}
STANDARD = [name for group in ("noise", "blur", "weather", "digital") for name in CORRUPTIONS[group]]
SEVERITIES = range(1, 6)
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

    key: str  # "val", "corruption/fog/3", "set/imagenet-a"
    folder: str
    paths: Sequence[str]
    labels: Sequence[int]  # places in the list of the head's classes, or in `categories`
    textures: list[int] | None = None  # as labels, -1: another class; None: file names do not tell
    categories: Mapping[str, list[int]] | None = None  # {category: outputs}, if the folders are categories of classes

    @property
    def suite(self) -> str:
        return self.key.split("/")[0]

    @property
    def protocol(self) -> str:
        """The suite whose preprocessing applies."""
        return "stylized" if self.categories else self.suite

    def preprocessing(self, size: int) -> str:
        """What is done to images of the published size, for crops of `size` px."""
        name, _ = presets(size)[preset_index(self.protocol, size if self.protocol in GENERATED else 2 * size, size)]
        return name

    def preprocessing_of_images(self, size: int) -> str:
        """What is done to the first image of each class, read from their headers."""
        first = dict(zip(reversed(self.labels), reversed(self.paths))).values()
        used = [preset_index(self.protocol, side, size) for side in map(_shorter_side, first) if side]
        return describe_preprocessing([used.count(index) for index in range(len(presets(size)))], size)

    def warning(self, wnids: Sequence[str]) -> str:
        """How the images per class differ from the published set, if the classes are ImageNet's; "" if they do not."""
        expected = EXPECTED_COUNTS.get(self.suite)
        if expected is None or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids):
            return ""
        counts = torch.tensor(self.labels).bincount(minlength=len(wnids)).tolist()
        odd = [f"{wnid} {n}" for wnid, n in zip(wnids, counts) if n not in expected]
        usual = f"{expected[0]} to {expected[-1]}" if len(expected) > 1 else expected[0]
        return f"{len(odd)} of {len(wnids)} classes do not have {usual} images ({', '.join(odd[:3])})" if odd else ""


# Preprocessing: what is done to an image follows from the test set and the image's own size


GENERATED = ("corruption", "stylized")  # made by a program, which wrote images of the crop's size


def presets(size: int) -> list[tuple[str, Callable[[Image.Image], torch.Tensor]]]:
    """(description, PIL image → uint8 (3, size, size)) for crops of `size` px."""
    usual = round(size * 256 / 224)
    finish = [transforms.CenterCrop(size), transforms.PILToTensor()]
    return [
        (f"CenterCrop({size})", transforms.Compose(finish)),
        (f"Resize({usual}), CenterCrop({size})", transforms.Compose([transforms.Resize(usual), *finish])),
        (f"Resize({size}), CenterCrop({size})", transforms.Compose([transforms.Resize(size), *finish])),
    ]


def preset_index(protocol: str, side: int, size: int) -> int:
    """Which of `presets` an image gets whose shorter side has `side` px.

    Generated images of the crop's size are not resized: it would cut off a part of what was made to be seen whole.
    Larger ones are treated like photos, as is done with one's own corruptions of photos. Smaller corrupted ones, as in
    Tiny-ImageNet-C, are enlarged to the crop; a crop alone would pad them with black.
    """
    if protocol in GENERATED and side == size:
        return 0
    return 2 if protocol == "corruption" and side < size else 1


def describe_preprocessing(counts: Sequence[int], size: int) -> str:
    """What was done to the images of a set, of which so many got each preset."""
    used = [(name, count) for (name, _), count in zip(presets(size), counts) if count]
    return used[0][0] if len(used) == 1 else "; ".join(f"{name} of {count} images" for name, count in used)


def _shorter_side(path: str) -> int:
    """0 if the file is not an image: reading all of it will say so."""
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception:  # on damaged data PIL raises nearly anything
        return 0


class PreprocessedImages(datasets.ImageList):
    """The images of a test set: item i is (the i-th image, the index of its preset)."""

    def __init__(self, test_set: TestSet, size: int):
        super().__init__(test_set.paths, test_set.labels, open_rgb)
        self.protocol, self.size, self.presets = test_set.protocol, size, [preset for _, preset in presets(size)]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, _ = super().__getitem__(index)
        preset = preset_index(self.protocol, min(image.size), self.size)
        return self.presets[preset](image), preset


# Folders


def class_root(directory: str) -> str:
    """The folder that holds the class folders: DIR/val if it exists, else DIR."""
    inner = os.path.join(directory, "val")
    return inner if folders.is_folder(inner) else directory


def list_test_set(key: str, directory: str, wnids: Sequence[str], limit: int | None = None) -> TestSet:
    """The images whose class folder is one of `wnids`, labelled with its place in that list.

    The folders of a further set may also be the sixteen categories of cue-conflict images: a label is then a place
    among those of which the head has a class. limit: only the first so many of each class. Classes are matched by
    folder name, never by order. Raises UsageError if none matches.
    """
    folder = folders.list_images(directory)
    by_category = set(folder.classes) <= cues.sixteen_categories().keys() and not set(folder.classes) & set(wnids)
    categories = cues.outputs_by_category(wnids) if by_category and key.startswith(f"{FURTHER}/") else None
    names = list(wnids if categories is None else categories)
    place_of = {name: place for place, name in enumerate(names)}
    taken, kept, labels = [0] * len(folder.classes), [], []
    for index, label in enumerate(folder.labels):
        name = folder.classes[label]
        if name in place_of and (limit is None or taken[label] < limit):
            taken[label] += 1
            kept.append(index)
            labels.append(place_of[name])
    if not kept or categories is not None and len(categories) < 2:
        raise UsageError(_no_class(directory, folder.classes, wnids, by_category, categories))
    paths = folder.paths[kept]
    textures = cues.textures(paths, (names[label] for label in labels), {*names, *folder.classes})
    places = textures and [place_of.get(texture, -1) for texture in textures]
    return TestSet(key, directory, paths, np.asarray(labels, np.int32), places, categories)


def _no_class(
    directory: str, folders: Sequence[str], wnids: Sequence[str], by_category: bool, categories: Mapping | None
) -> str:
    if categories is not None:
        return (
            f"{directory}: its folders are categories of ImageNet's classes, and the head's ({wnids[0]}, …) are in"
            f" {', '.join(categories) or 'none'} of them; it takes two to decide between"
        )
    hint = "; images in these categories are a further set: --set cue-conflict=DIR" if by_category else ""
    return (
        f"{directory}: none of its {len(folders)} class folders ({folders[0]}, …) is a class of the head"
        f" ({wnids[0]}, …){hint}"
    )


def corruption_folders(directory: str) -> dict[tuple[str, int], str]:
    """{(corruption, severity): folder} of an ImageNet-C folder, in either layout of the official archives.

    Raises UsageError if it holds no corruption at all, or two folders of one.
    """
    found = {}
    for group, names in CORRUPTIONS.items():
        for name in names:
            for severity in SEVERITIES:
                for parent in (directory, os.path.join(directory, group)):
                    folder = os.path.join(parent, name, str(severity))
                    if folders.is_folder(folder):
                        other = found.setdefault((name, severity), folder)
                        if not os.path.samefile(folder, other):
                            raise UsageError(f"{directory}: {folder} and {other} are the same test set; remove one")
    if not found:
        raise UsageError(f"{directory}: no <corruption>/<severity>/<wnid> folders, for example gaussian_noise/1/")
    return found


def unknown_corruptions(directory: str) -> list[str]:
    """What lies in an ImageNet-C folder where corruptions and severities are, and is neither: it is not evaluated."""
    known = {name for names in CORRUPTIONS.values() for name in names}
    severities = {str(severity) for severity in SEVERITIES}
    unknown = []
    for group in ("", *CORRUPTIONS):
        parent = os.path.join(directory, group)
        names = [name for name in _folders(parent) if group or name not in CORRUPTIONS]
        unknown += [os.path.join(group, name) for name in names if name not in known]
        for name in known.intersection(names):
            odd = [each for each in _folders(os.path.join(parent, name)) if each not in severities]
            unknown += [os.path.join(group, name, each) for each in odd]
    return sorted(unknown)


def _folders(directory: str) -> list[str]:
    """The names of the visible folders in a directory, if it can be read."""
    try:
        return [each.name for each in os.scandir(directory) if each.is_dir() and not each.name.startswith(".")]
    except OSError:
        return []


def list_test_sets(directories: Mapping[str, str], wnids: Sequence[str], limit: int | None = None) -> list[TestSet]:
    """All test sets of {suite or set/<name>: directory}.

    Raises UsageError if a directory does not hold what its suite needs.
    """
    test_sets = []
    for suite, directory in directories.items():
        parts = {suite: class_root(directory)}
        if suite == "corruption":
            parts = {
                f"corruption/{name}/{severity}": folder
                for (name, severity), folder in corruption_folders(directory).items()
            }
        test_sets += [list_test_set(key, folder, wnids, limit) for key, folder in parts.items()]
    return test_sets


def missing_corruptions(keys: Collection[str]) -> list[str]:
    """The standard corruptions and severities that are not among the keys, as "fog/3"; all 75 make the mean."""
    return [
        f"{name}/{severity}"
        for name in STANDARD
        for severity in SEVERITIES
        if f"corruption/{name}/{severity}" not in keys
    ]


# Classes of a head


def head_classes(
    path: str, saved: Mapping, outputs: int, classes: str | Path | None = None, val: str | Path | None = None
) -> list[str]:
    """The wnid of each output: the checkpoint's own, those of --classes, those of --val, or ImageNet-100's.

    path, saved: the checkpoint and what it holds. Raises UsageError if none fits the number of outputs.
    """
    if saved.get("wnids"):
        return saved["wnids"]
    if classes:
        wnids = folders.read_class_list(classes)
        if len(wnids) > outputs:
            raise UsageError(f"--classes {classes}: {len(wnids)} classes, but the head of {path} has {outputs} outputs")
        if val:
            _check_listed(classes, wnids, val)
        return wnids
    if val:
        of_val = folders.list_images(class_root(val)).classes
        if len(of_val) == outputs:
            return of_val
    imagenet_100 = folders.read_class_list(folders.IMAGENET_100)
    if outputs == len(imagenet_100) and (not val or set(imagenet_100) <= set(of_val)):
        return imagenet_100
    raise UsageError(
        f"--pretrained {path}: it stores no class list for its {outputs} outputs, and none fits; name a file of them"
        f" with --classes (ImageNet-100's: {os.path.relpath(folders.IMAGENET_100)}), or give as --val the data the head was"
        f" trained on, if it has {outputs} classes, or train the head with main_lincls.py, which stores them"
    )


def _check_listed(classes: str, wnids: Sequence[str], val: str) -> None:
    """Raise UsageError if --val lacks a class of --classes: a misspelt name can shift the labels of the others."""
    root = class_root(val)
    absent = sorted(set(wnids) - set(folders.list_images(root).classes))
    if absent:
        raise UsageError(
            f"--classes {classes}: {len(absent)} of its {len(wnids)} classes, for example {absent[0]}, are not in"
            f" --val {root}; correct the list, or leave out --val to test on other sets"
        )
