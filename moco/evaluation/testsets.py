"""The test sets: one record per built-in set, their folders, their classes by wnid, and their preprocessing.

ImageNet-C: Hendrycks & Dietterich, ICLR 2019. ImageNet-Sketch: Wang et al., NeurIPS 2019. Stylized-ImageNet: Geirhos et
al., ICLR 2019. ImageNet-R: Hendrycks et al., ICCV 2021. Any other set of images in class folders has a name of its own.
"""

import functools
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms as transforms
from PIL import Image

from moco.data import datasets, folders
from moco.errors import UsageError
from moco.evaluation import cues


class Suite(NamedTuple):
    """A built-in test set. An entry of SUITES is an option, a column and, if published.csv has it, compared."""

    title: str  # of its column
    layout: str = "<wnid>/*"  # of its folder, for --help; only where it names val/ is that looked for
    kind: str = "photos"  # or made by a program at the size of the crop: "stylized", "corrupted"
    counts: range | None = None  # images per class in the published set
    shared_classes: bool = False  # it lacks classes of the head: a second column decides between its own
    paper_classes: int = 100  # behind the published figure
    paper_note: str = ""  # on the published figure

    def odd_counts(self, counts: Mapping[str, int]) -> str:
        """The classes of {class: images} with another number than the published set, as text; "" if there are none."""
        odd = [f"{name} {n}" for name, n in counts.items() if self.counts and n not in self.counts]
        usual = " to ".join(map(str, sorted({self.counts[0], self.counts[-1]}))) if odd else ""
        return f"{len(odd)} of {len(counts)} classes do not have {usual} images ({', '.join(odd[:3])})" if odd else ""


BELOW_VAL = "<wnid>/*, or val/<wnid>/*"
SUITES = {
    "val": Suite("val", BELOW_VAL, counts=range(50, 51)),
    "corruption": Suite(
        "Corruption", "[<group>/]<corruption>/<severity>/<wnid>/*", kind="corrupted", counts=range(50, 51)
    ),
    "sketch": Suite("Sketch", counts=range(40, 52)),  # duplicates were removed
    "stylized": Suite(
        "Stylized", BELOW_VAL, kind="stylized", counts=range(50, 51),
        paper_note="the paper does not say which preprocessing it used",
    ),
    "rendition": Suite("Rendition", counts=range(40, 500), shared_classes=True, paper_classes=19),
}  # fmt: skip
FURTHER = "set"  # the key of a further set is set/<name>
CORRUPTIONS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),  # never part of the average
}
STANDARD = [name for group in ("noise", "blur", "weather", "digital") for name in CORRUPTIONS[group]]
SEVERITIES = range(1, 6)
_normal = functools.partial(unicodedata.normalize, "NFC")  # a Mac's archive has NFD


class TestSet(NamedTuple):
    """The unit of evaluation: a whole test set, or one severity of one corruption."""

    __test__ = False  # not a test class for pytest

    key: str  # "val", "corruption/fog/3", "set/imagenet-a"
    folder: str
    paths: Sequence[str]
    labels: Sequence[int]  # indices in the list of the head's classes, or in `categories`
    textures: list[int] | None = None  # like labels, -1 for another class; None: file names do not give them
    categories: Mapping[str, list[int]] | None = None  # {category: outputs}, if the folders are categories of classes
    others: Sequence[str] = ()  # the class folders that are none of the head's classes
    left_out: str = ""  # how many files of formats that are not read, as of ImageFolder
    files_sha256: str = ""  # of the images' labels and names, and their files' sizes and times

    @property
    def kind(self) -> str:
        return "stylized" if self.categories else suite_of(self.key).kind

    def decisive(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (N, outputs) of a head as those that decide on this set: of categories, if there are some."""
        return cues.category_logits(logits, self.categories.values()) if self.categories else logits

    def warning(self, wnids: Sequence[str]) -> str:
        """The missing classes of the head, where the suite has all, and those of ImageNet with odd counts, as text."""
        names = list(self.categories or wnids)
        counts = dict(zip(names, np.bincount(self.labels, minlength=len(names)).tolist()))
        missing = [name for name, n in counts.items() if not n]
        suite, told = suite_of(self.key), []
        some = lambda names: ", ".join(names[:3]) + ", …" * (len(names) > 3)
        if missing and (len(missing) == len(names) - 1 or not suite.shared_classes):
            others = f", and {len(self.others)} folders are none of them ({some(self.others)})" if self.others else ""
            told.append(f"{len(missing)} of the head's {len(names)} classes are missing ({some(missing)}){others}")
        if all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids):
            told.append(suite.odd_counts({name: n for name, n in counts.items() if n}))
        return "; ".join(filter(None, told))


def suite_of(key: str) -> Suite:
    """The suite of a test set's key; of a further set, one without published counts."""
    return SUITES.get(key.split("/")[0], Suite(key.removeprefix(f"{FURTHER}/"), BELOW_VAL, shared_classes=True))


# Preprocessing: it follows from the kind of test set and from each image's own size


def presets(size: int) -> list[tuple[str, Callable[[Image.Image], torch.Tensor]]]:
    """(description, PIL image → uint8 (3, size, size)) for crops of `size` px."""
    usual = round(size * 256 / 224)
    finish = [transforms.CenterCrop(size), transforms.PILToTensor()]
    return [
        (f"CenterCrop({size})", transforms.Compose(finish)),
        (f"Resize({usual}), CenterCrop({size})", transforms.Compose([transforms.Resize(usual), *finish])),
        (f"Resize({size}), CenterCrop({size})", transforms.Compose([transforms.Resize(size), *finish])),
    ]


def preset_index(kind: str, side: int, size: int) -> int:
    """Which of `presets` applies to an image whose shorter side is `side` px.

    Generated images of the crop's size are not resized: that would cut off a part of what was made to be seen whole.
    Larger ones are treated like photos, as is done with one's own corruptions of photos. Smaller corrupted ones, as in
    Tiny-ImageNet-C, are enlarged to the crop; a crop alone would pad them with black.
    """
    if kind != "photos" and side == size:
        return 0
    return 2 if kind == "corrupted" and side < size else 1


class PreprocessedImages(datasets.ImageList):
    """The images of a test set: item i is (the i-th image, the index of its preset)."""

    def __init__(self, test_set: TestSet, size: int):
        read = functools.partial(datasets.open_rgb, resizable_to=round(size * 256 / 224))
        super().__init__(test_set.paths, test_set.labels, read)
        self.kind, self.size, self.presets = test_set.kind, size, [preset for _, preset in presets(size)]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, _ = super().__getitem__(index)
        preset = preset_index(self.kind, min(image.size), self.size)
        return self.presets[preset](image), preset


# Folders


def list_test_sets(directories: Mapping[str, str], wnids: Sequence[str], limit: int | None = None) -> list[TestSet]:
    """All test sets of {suite or set/<name>: directory}. Raises UsageError if one is faulty or is another again."""
    parts = {}
    for key, directory in directories.items():
        parts |= corruption_folders(directory) if key == "corruption" else {key: class_root(directory, key)}
    found, known = [list_test_set(key, folder, wnids, limit) for key, folder in parts.items()], {}
    for each in found:
        if (other := known.setdefault(os.stat(each.paths[0])[1:3], each)) is not each:  # inode and device
            raise UsageError(f"{each.folder}: {each.key} would be the same images as {other.key}; name another folder")
    return found


def class_root(directory: str, key: str = "val") -> str:
    """The folder that holds the class folders: DIR/val if the suite has that layout and it exists, else DIR.

    Raises UsageError if val's are those of train/ beside it.
    """
    inner = os.path.join(directory, "val")
    root = inner if "val/" in suite_of(key).layout and folders.is_folder(inner) else directory
    if key == "val" and folders.is_folder(root):
        folders.check_not_training(root)
    return root


def list_test_set(key: str, directory: str, wnids: Sequence[str], limit: int | None = None) -> TestSet:
    """The images whose class folder is one of `wnids`, labelled with its index in that list.

    The folders of a further set may also be the sixteen categories of cue-conflict images: a label is then an index
    among those that the head has classes of. limit: only the first so many of each class. Classes are matched by
    folder name, in any Unicode normalisation, never by order. Raises UsageError if none matches, or one but for case.
    """
    folder = folders.list_images(directory, known={*wnids, *cues.sixteen_categories()}).first(limit)
    by_category = set(folder.classes) <= cues.sixteen_categories().keys() and not set(folder.classes) & set(wnids)
    categories = cues.outputs_by_category(wnids) if by_category and key.startswith(f"{FURTHER}/") else None
    names = list(wnids if categories is None else categories)
    index_of = {_normal(name): index for index, name in enumerate(names)}
    others = [name for name in folder.classes if _normal(name) not in index_of]
    absent = {name.casefold(): name for name in set(names) - set(folder.classes)}
    if other := next((name for name in others if name.casefold() in absent), None):
        raise UsageError(f"{directory}: its class folder {other} is {absent[other.casefold()]} in the head; rename it")
    labels = np.array([index_of.get(_normal(name), -1) for name in folder.classes])[folder.labels]
    kept = np.flatnonzero(labels >= 0)
    if not len(kept) or categories is not None and len(categories) < 2:
        hint = "; as cue conflicts, --set NAME=DIR, it needs a head with classes in two of them" if by_category else ""
        shown = f"{len(folder.classes)} class folders ({folder.classes[0]}, …)"
        raise UsageError(f"{directory}: none of its {shown} is a class of the head ({wnids[0]}, …){hint}")
    kept = kept[np.argsort(labels[kept], kind="stable")]
    paths, labels = folder.paths[kept], labels[kept].astype(np.int32)
    textures = cues.textures(paths, (names[label] for label in labels), {*names, *folder.classes})
    indices = textures and [index_of.get(_normal(texture), -1) for texture in textures]
    digest = hashlib.sha256()
    for label, path in zip(labels, paths):
        file, name = os.stat(path), "/".join(path.split(os.sep)[-2:])
        digest.update(f"{label} {name} {file.st_size} {file.st_mtime_ns}\n".encode(errors="surrogateescape"))
    made = others, folder.left_out, digest.hexdigest()
    return TestSet(key, directory, paths, labels, indices, categories, *made)


def corruption_folders(directory: str) -> dict[str, str]:
    """{"corruption/fog/3": folder} of an ImageNet-C folder, in either layout of the official archives.

    Raises UsageError if it holds no corruption at all, or two folders of one.
    """
    found = {}
    for group, names in CORRUPTIONS.items():
        for name, severity, parent in itertools.product(names, SEVERITIES, (directory, os.path.join(directory, group))):
            folder = os.path.join(parent, name, str(severity))
            if folders.is_folder(folder):
                other = found.setdefault(f"corruption/{name}/{severity}", folder)
                if not os.path.samefile(folder, other):
                    raise UsageError(f"{directory}: {folder} and {other} are the same test set; remove one")
    if not found:
        raise folders.refusal(directory, "no <corruption>/<severity>/<wnid> folders, for example gaussian_noise/1/")
    return found


# Classes of a head


def head_classes(
    path: str, saved: Mapping, outputs: int, classes: str | Path | None = None, val: str | Path | None = None
) -> tuple[list[str], str]:
    """The wnid of each output, and where they are from if the checkpoint does not name them.

    path, saved: the checkpoint and what it holds. Raises UsageError if none fits the number of outputs.
    """
    if saved.get("wnids"):
        if classes and folders.read_class_list(classes) != saved["wnids"]:
            raise UsageError(f"--classes {classes}: {path} stores other classes; leave out --classes")
        return saved["wnids"], ""
    of_val = folders.list_images(class_root(val)).classes if val else []
    if classes:
        wnids = folders.read_class_list(classes)
        if len(wnids) > outputs:
            raise UsageError(f"--classes {classes}: {len(wnids)} classes, but the head of {path} has {outputs} outputs")
        return wnids, f"those of --classes {classes}"
    if len(of_val) == outputs:
        return of_val, f"the {outputs} folders of {class_root(val)}, sorted"
    imagenet_100 = folders.read_class_list(folders.IMAGENET_100)
    if outputs == len(imagenet_100) and (not val or set(imagenet_100) <= set(of_val)):
        return imagenet_100, "ImageNet-100's"
    raise UsageError(
        f"--pretrained {path}: it stores no class list for its {outputs} outputs, and none fits; name a file of them"
        f" with --classes (ImageNet-100's: {os.path.relpath(folders.IMAGENET_100)}), or the head's data with --val"
    )
