"""Made-up reports of an evaluation, and linear checkpoints to evaluate."""

from pathlib import Path

import torch

from moco.encoders import build_encoder
from moco.evaluation import results
from moco.evaluation.testsets import TestSet, presets
from moco.training import checkpoint

WNIDS = ["n01", "n02"]


def result(top1, classes=None, **more):
    """A result as of photos; classes: {class: (correct, images)}."""
    classes = {name: {"n": n, "correct": correct} for name, (correct, n) in (classes or {}).items()}
    n = sum(each["n"] for each in classes.values()) or 4
    more = {"preprocessing": "Resize(32), CenterCrop(28)"} | more
    return {"top1": top1, "top1_shared_classes": top1, "n": n, "classes": classes} | more


def a_test_set(key="val", n=4, folder=None, categories=None, suffix="png"):
    labels = [index * len(WNIDS) // n for index in range(n)]
    folder = folder or f"/data/{key}"
    paths = [f"{folder}/{WNIDS[label]}/{index}.{suffix}" for index, label in enumerate(labels)]
    return TestSet(key, folder, paths, labels, None, categories)


def report_of(cells, runs=("mine",), wnids=WNIDS, image_size=28, limit=None, weights="weights", options=None):
    """A report on checkpoints in the current folder, one per run, named by its row.

    cells: {key of a test set: the result of each run, or its top-1}; options: {row: pre-training options}.
    """
    rows = {}
    for index, row in enumerate(runs):
        path = Path(f"{index}.pth")
        path.write_text(f"{weights} of run {runs[:index].count(row)} of {row!a}")
        rows.setdefault(row, []).append(str(path))
    known = [(options or {}).get(row, {}) for row, paths in rows.items() for _ in paths]
    made = results.new(rows, known, wnids, image_size, limit)
    for key, values in cells.items():
        values = [value if isinstance(value, dict) else result(value) for value in values]
        test_set = a_test_set(key, values[0]["n"], categories={"cat": [0], "dog": [1]} if key == "set/cues" else None)
        used = presets(image_size)[test_set.kind == "photos"][0]
        results.add(made, test_set, [value | {"preprocessing": used} for value in values])
    return made


def save_linear(path, wnids, outputs=None, seed=0, **more):
    """Write a linear checkpoint with random weights for these classes and 32-px crops."""
    torch.manual_seed(seed)
    state = checkpoint.add_prefix(build_encoder("resnet10", outputs or len(wnids)).state_dict())
    saved = {"arch": "resnet10", "state_dict": state, "wnids": wnids, "image_size": 32} | more
    torch.save({name: value for name, value in saved.items() if value is not None}, path)
