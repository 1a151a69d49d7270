"""Made-up reports of an evaluation, and linear checkpoints to evaluate."""

import torch

from moco.encoders import build_encoder
from moco.evaluation import results, scores
from moco.evaluation.testsets import TestSet, presets
from moco.training import checkpoint

WNIDS = ["n01", "n02"]


def result(top1=None, classes=None, n=200, shared=None, cues=None, **more):
    """A result as of photos. classes: {class: (correct, images)}; shared: top-1 among the shared classes.

    cues: the numbers of conflicts, and of decisions for shape and for texture among these.
    """
    if classes is None:
        correct = round(top1 * n / 100)
        classes = {WNIDS[0]: (min(correct, n // 2), n // 2), WNIDS[1]: (max(0, correct - n // 2), n - n // 2)}
    counts = {name: {"n": n, "correct": correct} for name, (correct, n) in classes.items()}
    bits = [place < correct for correct, n in classes.values() for place in range(n)]
    masks = {"correct": bits, "correct among shared": first(len(bits), shared) if shared is not None else bits}
    if cues:
        conflicts, shape, texture = cues
        ends = [[place < end for place in range(len(bits))] for end in (conflicts, shape, shape + texture)]
        masks |= {"conflict": ends[0], "shape": ends[1], "texture": [b > a for a, b in zip(*ends[1:])]}
    return {
        "top1": 100 * sum(bits) / len(bits), "n": len(bits), "classes": counts, "not_finite": 0,
        "masks": {name: scores.pack(mask) for name, mask in masks.items()},
        "preprocessing": "Resize(32), CenterCrop(28)", **more,
    }  # fmt: skip


def counted(result, mask):
    """The number of images in a result's mask."""
    return int(scores.unpack(result["masks"][mask], result["n"]).sum())


def first(n, percent):
    return [place < round(percent * n / 100) for place in range(n)]


def a_test_set(key="val", n=200, folder=None, categories=None, files=""):
    labels = [index * len(WNIDS) // n for index in range(n)]
    folder = folder or f"/data/{key}"
    paths = [f"{folder}/{WNIDS[label]}/{index}.png" for index, label in enumerate(labels)]
    return TestSet(key, folder, paths, labels, None, categories, files_sha256=files)


def report_of(cells, runs=("mine",), wnids=WNIDS, image_size=28, limit=None, weights="weights", options=None):
    """A report on checkpoints, one per run, named by its row.

    cells: {key of a test set: the result of each run, or its top-1}; options: {row: pre-training options}.
    """
    rows: dict[str, list[str]] = {}
    for index, row in enumerate(runs):
        rows.setdefault(row, []).append(f"{index}.pth")
    known = [
        {"pretraining": (options or {}).get(row), "sha256": f"{weights} of run {run} of {row}"}
        for row, files in rows.items()
        for run, _ in enumerate(files)
    ]
    made = results.new(rows, known, wnids, image_size, limit)
    for key, values in cells.items():
        values = [value if isinstance(value, dict) else result(value) for value in values]
        categories = {"cat": [0], "dog": [1]} if key == "set/cues" else None
        test_set = a_test_set(key, values[0]["n"], categories=categories)
        used = presets(image_size)[test_set.kind == "photos"][0]
        results.add(made, test_set, [value | {"preprocessing": used} for value in values])
    return made


def save_linear(path, wnids, outputs=None, seed=0, **more):
    """Write a linear checkpoint with random weights for these classes and 32-px crops."""
    torch.manual_seed(seed)
    state = checkpoint.add_prefix(build_encoder("resnet10", outputs or len(wnids)).state_dict())
    saved = {"arch": "resnet10", "state_dict": state, "wnids": wnids, "image_size": 32} | more
    torch.save({name: value for name, value in saved.items() if value is not None}, path)
