"""The real-data counterpart in docs/effect.md: a part of FashionMNIST in the size and layout of the generated data."""

import shutil
from pathlib import Path

import numpy as np
import shapes
from PIL import Image

RAW = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist
TRAIN, VAL, CELL = 400, 250, 4  # images of each of the ten classes; CELL for each corruption and severity


def subset(source: Path, folder: Path) -> None:
    """Copy the first images of each class, and corrupt val images with the generator's functions.

    source: a folder of preprocess/torchvision_folders.py; folder: gets train/, val/ (28 px as they are) and corruption/
    (enlarged to 64 px, cropped to 56, then corrupted).
    """
    for split, count in ("train", TRAIN), ("val", VAL):
        for name in sorted(path.name for path in (source / split).iterdir()):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for path in sorted((source / split / name).iterdir())[:count]:
                shutil.copy(path, folder / split / name)
    for label, name in enumerate(sorted(path.name for path in (folder / "val").iterdir())):
        files = sorted((folder / "val" / name).iterdir())
        for place, corruption in enumerate(shapes.CORRUPTIONS):
            for number in range(place * CELL, (place + 1) * CELL):
                write_corrupted(files[number], folder / "corruption" / corruption, name, (label, place, number))


def write_corrupted(file: Path, folder: Path, name: str, key: tuple[int, ...]) -> None:
    """folder/<severity 1-5>/name/<file's name>; the severities share the random numbers of `key`."""
    edge = (shapes.SIZE - shapes.CROP) // 2
    photo = np.asarray(Image.open(file).convert("RGB").resize((shapes.SIZE, shapes.SIZE), Image.BICUBIC))[
        edge:-edge, edge:-edge
    ]
    for severity in range(1, 6):
        (folder / str(severity) / name).mkdir(parents=True, exist_ok=True)
        image = shapes.corrupt(np.random.default_rng(key), photo, folder.name, severity)
        Image.fromarray(image).save(folder / str(severity) / name / file.name)
