"""The JSON file of an evaluation. A result is known by what made it, not by its row's name.

`cells` are the results of the last command, for its `checkpoints`; `earlier` holds all others. Each has an identity: a
hash of the weights, the test set's files, the settings and the version of the protocol.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence

from moco.errors import UsageError
from moco.evaluation import scores
from moco.evaluation.scores import TestSet
from moco.training import checkpoint
from moco.training.files import FolderLock, atomic_write

VERSION = 3  # of the protocol and of the file; the first two did not tell which files they had tested


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def new(
    rows: Mapping[str, Sequence[str]], made: Iterable[Mapping], wnids: Sequence[str], image_size: int,
    limit: int | None, precision: str = "fp32",
) -> dict:  # fmt: skip
    """An empty report on {row name: checkpoint files}. made: `classifier.made_with` of each file.

    Raises UsageError if a row mixes settings, or takes one run for several.
    """
    files = [{"row": row, "file": file} for row in rows for file in rows[row]]
    checkpoints = [file | known for file, known in zip(files, made)]
    for one, other in itertools.combinations(checkpoints, 2):
        if one["row"] == other["row"]:
            _check_pair(one, other)
    return {
        "version": VERSION,
        "image_size": image_size,
        "limit": limit,
        "precision": precision,
        "wnids": wnids,
        "wnids_sha256": sha256("\n".join(wnids).encode()),
        "checkpoints": checkpoints,
        "cells": {},
        "earlier": {},
    }


def _check_pair(one: Mapping, other: Mapping) -> None:
    """Raise UsageError unless two checkpoints of a row are independent runs with the same settings, as far as known."""
    pair = f"--pretrained {one['row']}=…: {one['file']} and {other['file']}"
    first, second = (
        {f"{kind} {name}": value for kind in ("pretraining", "probe") for name, value in (each.get(kind) or {}).items()}
        for each in (one, other)
    )
    both = first.keys() & second.keys()
    differing = {name for name in both if first[name] != second[name]} - {"probe seed"}
    same_run = "pretraining seed" in both and differing <= {"pretraining epoch"}
    if same_run or any(one.get(name) == other.get(name) is not None for name in ("sha256", "backbone_sha256")):
        raise UsageError(
            f"{pair} come from one pre-training run, and a row's ± is over independent ones; leave one out, or give"
            " them rows of their own"
        )
    for name in sorted(differing - {"pretraining seed"}):
        raise UsageError(
            f"{pair} were made with different settings ({name} {first[name]!s:.60}, {second[name]!s:.60}); give them"
            " rows of their own"
        )


def reuse_results(path: str, report: dict, test_sets: Sequence[TestSet]) -> None:
    """Take from the file at `path`, if there is one, what this report would repeat; the rest stays in its `earlier`.

    Raises UsageError if the file is not a report of this version, and so must not be replaced.
    """
    report["earlier"] = _read(path)
    for test_set in test_sets:
        if not unfinished(report, test_set):
            add(report, test_set, [])


def unfinished(report: Mapping, test_set: TestSet) -> list[int]:
    """The indices of the checkpoints that have no result on this test set yet; of equal ones the first."""
    known = _identities(report, test_set)
    return [index for index, key in enumerate(known) if key not in report["earlier"] and key not in known[:index]]


def add(report: dict, test_set: TestSet, results: Iterable[Mapping]) -> None:
    """Complete the test set's cell with the results of its `unfinished` checkpoints, in their order.

    Raises UsageError for weights whose outputs are not finite: they have no accuracy.
    """
    identities = _identities(report, test_set)
    for index, result in zip(unfinished(report, test_set), results, strict=True):
        if result["not_finite"]:
            raise UsageError(
                f"--pretrained {report['checkpoints'][index]['file']}: its outputs are not finite for"
                f" {result['not_finite']} of the {result['n']} images of {test_set.key}; use another checkpoint"
            )
        report["earlier"][identities[index]] = dict(result)
    found = [report["earlier"][key] for key in identities]
    report["cells"][test_set.key] = {
        "folder": os.path.abspath(test_set.folder),
        "n": len(test_set.labels),
        "files_sha256": test_set.files_sha256,
        "left_out": test_set.left_out,
        "preprocessing": found[-1]["preprocessing"],
        "warning": test_set.warning(report["wnids"]),
        **({"categories": list(test_set.categories)} if test_set.categories else {}),
        "identities": identities,
        "results": found,
    }


def lock(option: str, path: str) -> FolderLock:
    """The lock on a report's file, to be acquired before the file is read."""
    folder, name = os.path.split(path)
    return FolderLock(f"{option} {path}", os.path.join(folder, f".{name}.lock"))


def save(path: str, report: Mapping) -> None:
    """Write the report atomically. Raises OSError."""
    shown = {key for cell in report["cells"].values() for key in cell["identities"]}
    earlier = {key: result for key, result in report["earlier"].items() if key not in shown}
    with atomic_write(path) as file:
        json.dump({**report, "earlier": earlier}, file, indent=1)


def _identities(report: Mapping, test_set: TestSet) -> list[str]:
    """The identity of each checkpoint's result on this test set."""
    shared = [VERSION, test_set.key, test_set.kind, len(test_set.labels), test_set.files_sha256]
    settings = [*shared, *map(report.get, ("image_size", "limit", "wnids_sha256")), *{report["precision"]} - {"fp32"}]
    return [sha256(json.dumps([model["sha256"], *settings]).encode()) for model in report["checkpoints"]]


def _read(path: str) -> dict[str, dict]:
    """All results in a report's file by identity. Raises UsageError for one that is damaged, or not of this version."""
    if not os.path.lexists(path) or os.path.isfile(path) and os.path.getsize(path) == 0:
        return {}
    with checkpoint.reading(f"--json {path}"):
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, whose figures do not tell the files behind them")
        found = dict(content["earlier"])
        for cell in content["cells"].values():
            found |= zip(cell["identities"], cell["results"], strict=True)
        for result in found.values():
            _check(result)
    return found


def _check(result: Mapping) -> None:
    """Raise an exception if a result's figures contradict each other."""
    masks = {name: scores.unpack(text, result["n"]) for name, text in result["masks"].items()}
    counts = [(each["correct"], each["n"]) for each in result["classes"].values()]
    correct, n = masks["correct"].sum(), result["n"]
    fits = [correct, n] == [sum(column) for column in zip(*counts)] and abs(result["top1"] - 100 * correct / n) < 1e-9
    if not (fits and isinstance(result["preprocessing"], str)):
        raise ValueError(f"its figures do not add up: top-1 {result['top1']} for {correct} of {n}")
