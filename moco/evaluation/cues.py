"""Cue-conflict images (Geirhos et al., ICLR 2019): their two classes from the file name, and the 16-category mapping.

The published images lie in folders of sixteen categories. A classifier of ImageNet's classes decides for the category
whose classes have the highest mean probability; sixteen_categories.csv lists those classes, 207 of the 1000.
"""

import csv
import functools
import math
import os
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
    output_of = {wnid: output for output, wnid in enumerate(wnids)}
    outputs = {
        category: [output_of[wnid] for wnid in members if wnid in output_of]
        for category, members in sixteen_categories().items()
    }
    return {category: own for category, own in outputs.items() if own}


def category_logits(logits: torch.Tensor, categories: Iterable[Sequence[int]]) -> torch.Tensor:
    """Logits (N, outputs) → (N, categories): the log of the mean probability of each category's outputs.

    Up to a constant of the image: what the softmax divides by does not change the decision.
    """
    return torch.stack([logits[:, list(own)].logsumexp(1) - math.log(len(own)) for own in categories], dim=1)


def textures(paths: Iterable[str], shapes: Iterable[str], known: Collection[str]) -> list[str] | None:
    """The texture class of each image, from its file name; None unless each name gives one of the `known` classes.

    Either all are named <texture class>-*, or all <shape class><number>-<texture class><number>. shapes: the class of
    each image, by its folder.
    """
    images = [(os.path.splitext(os.path.basename(path))[0], shape) for path, shape in zip(paths, shapes)]
    for pattern in TEXTURE_FIRST, SHAPE_FIRST:
        found = []
        for name, shape in images:
            match = pattern.fullmatch(name)
            if not match or match["texture"] not in known or match.groupdict().get("shape", shape) != shape:
                break  # most sets end at their first name
            found.append(match["texture"])
        else:
            return found
    return None
