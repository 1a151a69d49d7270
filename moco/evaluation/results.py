"""The JSON file of an evaluation. A result is identified by checkpoint, test set and settings, not by its row's name.

`cells` are the results of the last command, for its `checkpoints`; `earlier` holds all others by the checkpoint's
SHA-256 and the test set.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from moco.evaluation.testsets import TestSet
from moco.training import checkpoint, files

VERSION = 2  # of the JSON file; the first, which has no number, resized Stylized-ImageNet and never corrupted images
SETTINGS = ("image_size", "limit", "wnids_sha256")  # of a report
CELL = ("folder", "n", "preprocessing")  # of a test set
ENTRY = ("version", *SETTINGS, "images_sha256", *CELL, "result")  # of a checkpoint on a test set


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def new(
    rows: Mapping[str, Sequence[str]], pretraining: Iterable[Mapping], wnids: Sequence[str], image_size: int,
    limit: int | None,
) -> dict:  # fmt: skip
    """An empty report on {row name: checkpoint files}.

    pretraining: the pre-training options of each file, {} if the file does not store them.
    """
    entries = [(name, file) for name, files in rows.items() for file in files]
    return {
        "version": VERSION,
        "image_size": image_size,
        "limit": limit,
        "wnids": wnids,
        "wnids_sha256": sha256("\n".join(wnids).encode()),
        "checkpoints": [
            {
                "row": name,
                "file": file,
                "sha256": sha256(Path(file).read_bytes()),
                "moco_k": known.get("moco_k"),
                "alpha": known.get("alpha") if known.get("num_nonsem") else None,
            }
            for (name, file), known in zip(entries, pretraining)
        ],
        "cells": {},
        "earlier": {},
    }


def reuse_results(path: str, report: dict, test_sets: Sequence[TestSet]) -> None:
    """Take from the file at `path`, if there is one, what this report would repeat; the rest stays in its `earlier`.

    Raises UsageError if the file is not a report, and so must not be replaced.
    """
    report["earlier"] = _read(path)
    for test_set in test_sets:
        if not unfinished(report, test_set):
            add(report, test_set, [])


def unfinished(report: Mapping, test_set: TestSet) -> list[int]:
    """The indices of the checkpoints that have no result on this test set yet."""
    if test_set.key in report["cells"]:
        return []
    return [index for index, entry in enumerate(_earlier(report, test_set)) if entry is None]


def add(report: dict, test_set: TestSet, results: Iterable[Mapping]) -> None:
    """Complete the test set's cell with the results of its `unfinished` checkpoints, in their order."""
    fresh, known = iter(results), _earlier(report, test_set)
    merged = [dict(entry["result"] if entry else next(fresh)) for entry in known]
    used = [entry["preprocessing"] if entry else new.pop("preprocessing") for entry, new in zip(known, merged)]
    report["cells"][test_set.key] = {
        "folder": os.path.abspath(test_set.folder),
        "n": len(test_set.labels),
        "images_sha256": _images_sha256(test_set),
        "preprocessing": used[-1],
        "warning": test_set.warning(report["wnids"]),
        "results": merged,
    }
    if test_set.categories:
        report["cells"][test_set.key]["categories"] = list(test_set.categories)
    taken = {id(entry) for entry in known}
    for sha, sets in list(report["earlier"].items()):
        left = {key: [each for each in entries if id(each) not in taken] for key, entries in sets.items()}
        report["earlier"][sha] = {key: entries for key, entries in left.items() if entries}
    report["earlier"] = {sha: sets for sha, sets in report["earlier"].items() if sets}


def lock(option: str, path: str) -> files.FolderLock:
    """The lock on a report's file, to be acquired before the file is read."""
    folder, name = os.path.split(path)
    return files.FolderLock(f"{option} {path}", os.path.join(folder, f".{name}.lock"))


def save(path: str, report: Mapping) -> None:
    """Write the report atomically. Raises OSError."""
    with files.atomic_write(path) as file:
        json.dump(report, file, indent=1)


def _images_sha256(test_set: TestSet) -> str:
    """A hash of the images' names and labels: a folder may hold other images another day."""
    names = ("/".join(path.split(os.sep)[-2:]) for path in test_set.paths)
    lines = (f"{label} {name}" for label, name in zip(test_set.labels, names))
    return sha256("\n".join(lines).encode(errors="surrogateescape"))


def _earlier(report: Mapping, test_set: TestSet) -> list[dict | None]:
    """Each checkpoint's earlier result on these images with the report's settings, None if it has none."""
    wanted = {name: report[name] for name in SETTINGS} | {"n": len(test_set.labels)}
    images = functools.cache(lambda: _images_sha256(test_set))  # only where it is needed

    def fits(entry: Mapping) -> bool:
        return (
            wanted.items() <= entry.items()
            and entry["folder"] in (test_set.folder, os.path.abspath(test_set.folder))
            and (entry["images_sha256"] is None or entry["images_sha256"] == images())
            and (entry["version"] == VERSION or test_set.kind == "photos")
        )

    entries = [report["earlier"].get(model["sha256"], {}) for model in report["checkpoints"]]
    return [next(filter(fits, sets.get(test_set.key, [])), None) for sets in entries]


# Reading a file that anybody may have changed


def _read(path: str) -> dict[str, dict[str, list[dict]]]:
    """All results in a report's file, {checkpoint's SHA-256: {key of the test set: [ENTRY]}}.

    Raises UsageError for a file that is damaged, or that this script did not write.
    """
    if not os.path.lexists(path) or os.path.isfile(path) and os.path.getsize(path) == 0:
        return {}
    found: dict[str, dict[str, list[dict]]] = {}
    with checkpoint.reading(f"--json {path}"):
        if not os.path.isfile(path):
            raise ValueError("not a regular file")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not {"checkpoints", "cells"} <= content.keys():
            raise ValueError("JSON of another program")
        for sha, key, entry in _entries(content):
            _check(sha, entry)
            entries = found.setdefault(sha, {}).setdefault(key, [])
            if entry not in entries:  # two rows may have had the same checkpoint
                entries.append(entry)
    return found


def _entries(content: Mapping) -> Iterator[tuple[str, str, dict]]:
    """(SHA-256 of the checkpoint, key of the test set, ENTRY) of all results in a report."""
    settings = {"version": content.get("version", 1), **{name: content[name] for name in SETTINGS}}
    for key, cell in content["cells"].items():
        shared = settings | {"images_sha256": cell.get("images_sha256")} | {name: cell[name] for name in CELL}
        for model, result in zip(content["checkpoints"], cell["results"], strict=True):
            yield model["sha256"], key, shared | {"result": result}
    for sha, sets in content.get("earlier", {}).items():
        for key, entries in sets.items():
            for entry in entries:
                yield sha, key, {name: entry[name] for name in ENTRY}


def _check(sha: str, entry: Mapping) -> None:
    """Raise an exception for figures that cannot be right."""
    result, n = entry["result"], entry["n"]
    conflicts, classes = result.get("conflicts", n), result["classes"].values()
    decisions = [result.get(name, 0) for name in ("shape_decisions", "texture_decisions")]
    percents = [result["top1"], result["top1_shared_classes"], result.get("shape_bias") or 0]
    counts = [n, conflicts, *decisions, *(each[name] for each in classes for name in ("n", "correct"))]
    if not (
        entry["version"] in (1, VERSION)
        and all(isinstance(text, str) for text in (sha, entry["folder"], entry["preprocessing"]))
        and all(type(value) in (int, float) and 0 <= value <= 100 for value in percents)
        and all(type(value) is int and 0 <= value < 2**31 for value in counts)
        and sum(decisions) <= conflicts > 0 < n == result["n"]
        and all(each["correct"] <= each["n"] > 0 for each in classes)
    ):
        raise ValueError(f"impossible values, {json.dumps(result)}")
