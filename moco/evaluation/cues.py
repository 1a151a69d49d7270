"""Cue-conflict images (Geirhos et al., ICLR 2019): their two classes from the file name, and the 16-category mapping.

The published images lie in folders of sixteen categories. A classifier of ImageNet's classes decides for the category
whose classes have the highest mean probability; sixteen_categories.csv lists those classes, 207 of the 1000.
"""

import csv
import functools
import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

CATEGORIES = Path(__file__).parent / "sixteen_categories.csv"
TEXTURE_FIRST, SHAPE_FIRST = re.compile("(?P<texture>.*)-[^-]*"), re.compile(r"(?P<shape>.+?)\d+-(?P<texture>.+?)\d+")


@functools.cache
def sixteen_categories() -> dict[str, list[str]]:
    """{category: the wnids of its classes}, in alphabetical order of the categories."""
    categories: dict[str, list[str]] = {}
    with open(CATEGORIES, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            categories.setdefault(line["category"], []).append(line["wnid"])
    return categories


def outputs_by_category(wnids: Sequence[str]) -> dict[str, list[int]]:
    """{category: the outputs of its classes} of a head with these classes; categories without one are left out."""
    categories = sixteen_categories().items()
    outputs = {category: [wnids.index(wnid) for wnid in members if wnid in wnids] for category, members in categories}
    return {category: own for category, own in outputs.items() if own}


def category_logits(logits: torch.Tensor, categories: Iterable[Sequence[int]]) -> torch.Tensor:
    """Logits (N, outputs) → (N, categories): the log of the mean probability of each category's outputs.

    Up to a constant of the image: what the softmax divides by does not change the decision.
    """
    return torch.stack([logits[:, list(own)].logsumexp(1) - math.log(len(own)) for own in categories], dim=1)


def textures(paths: Iterable[str], shapes: Iterable[str], known: Collection[str]) -> list[str] | None:
    """The texture class of each image, from its file name; None unless most names give one of the `known` classes.

    They are named <texture class>-*, or <shape class><number>-<texture class><number>; "" stands for the others'.
    shapes: the class of each image, by its folder.
    """
    images = [(Path(path).stem, shape) for path, shape in zip(paths, shapes)]
    for pattern in TEXTURE_FIRST, SHAPE_FIRST:
        found = []
        for name, shape in images:
            match = pattern.fullmatch(name)
            fits = match and match["texture"] in known and match.groupdict().get("shape", shape) == shape
            found.append(match["texture"] if fits else "")
        if found.count("") < len(found) / 2:
            return found
    return None
