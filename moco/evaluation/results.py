"""The JSON file of an evaluation: all results, kept by what was scored, on what and how.

`cells` are the results of the last command, for its `checkpoints`; `earlier` holds all others by the checkpoint's SHA
(256) and the test set. A row's name is no part of what a result is known by.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from moco.errors import RunError, UsageError
from moco.evaluation import testsets
from moco.evaluation.testsets import TestSet
from moco.training import files

VERSION = 2  # of the JSON file; the first, which has no number, resized Stylized-ImageNet and never corrupted images
SETTINGS = ("image_size", "limit", "wnids_sha256")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def new(
    rows: Mapping[str, Sequence[str]],
    pretraining: Iterable[Mapping],
    wnids: Sequence[str],
    image_size: int,
    limit: int | None,
    not_evaluated: Sequence[str] = (),
) -> dict:
    """An empty report on {row name: checkpoint files}.

    pretraining: the pre-training options of each file, {} if the file does not store them; not_evaluated: folders that
    are among the corruptions, and none.
    """
    entries = [(name, file) for name, files in rows.items() for file in files]
    return {
        "version": VERSION,
        "image_size": image_size,
        "limit": limit,
        "wnids": wnids,
        "wnids_sha256": sha256("\n".join(wnids).encode()),
        "not_evaluated": list(not_evaluated),
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

    Raises UsageError if the file is anything else than a report, which is not to be replaced.
    """
    report["earlier"] = _read(path)
    for test_set in test_sets:
        if not unfinished(report, test_set):
            add(report, test_set, [], report["image_size"], report["wnids"])


def unfinished(report: Mapping, test_set: TestSet) -> list[int]:
    """The indices of the checkpoints that have no result on this test set yet."""
    if test_set.key in report["cells"]:
        return []
    found = [_find(report, checkpoint, test_set) for checkpoint in report["checkpoints"]]
    return [index for index, entry in enumerate(found) if entry is None]


def add(report: dict, test_set: TestSet, results: list[dict], image_size: int, wnids: Sequence[str]) -> None:
    """Complete the test set's cell with the results of its `unfinished` checkpoints, in their order."""
    missing = unfinished(report, test_set)
    known = [_find(report, checkpoint, test_set) for checkpoint in report["checkpoints"]]
    fresh = dict(zip(missing, results))
    merged = [entry["result"] if entry else dict(fresh[index]) for index, entry in enumerate(known)]
    usual = next((entry["preprocessing"] for entry in known if entry), test_set.preprocessing(image_size))
    preprocessing = [result.pop("preprocessing", usual) for result in merged]
    report["cells"][test_set.key] = {
        "folder": os.path.abspath(test_set.folder),
        "n": len(test_set.labels),
        "images_sha256": _names(test_set),
        "preprocessing": preprocessing[-1],
        "warning": test_set.warning(wnids),
        "results": merged,
    }
    if test_set.categories:
        report["cells"][test_set.key]["categories"] = list(test_set.categories)
    for checkpoint, entry in zip(report["checkpoints"], known):
        if entry:
            same = report["earlier"][checkpoint["sha256"]]
            same[test_set.key] = [each for each in same[test_set.key] if each is not entry]
    report["earlier"] = _without_empty(report["earlier"])


def save(path: str, report: Mapping) -> None:
    """Write the report atomically. Raises RunError if it cannot be written."""
    try:
        with files.atomic_write(path) as file:
            json.dump(report, file, indent=1)
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error}); free some space, then run the same command again to resume"
        ) from error


def _names(test_set: TestSet) -> str:
    """A hash of the images' names and labels: a folder may hold other images another day."""
    names = ("/".join(path.split(os.sep)[-2:]) for path in test_set.paths)
    lines = (f"{label} {name}" for label, name in zip(test_set.labels, names))
    return sha256("\n".join(lines).encode(errors="surrogateescape"))


def _find(report: Mapping, checkpoint: Mapping, test_set: TestSet) -> dict | None:
    """The earlier result of a checkpoint on a test set, with the report's settings."""
    wanted = {name: report[name] for name in SETTINGS} | {"n": len(test_set.labels)}
    for entry in report["earlier"].get(checkpoint["sha256"], {}).get(test_set.key, []):
        if (
            all(entry[name] == value for name, value in wanted.items())
            and entry["folder"] in (test_set.folder, os.path.abspath(test_set.folder))
            and entry["images_sha256"] in (None, _names(test_set))
            and _has_this_protocol(entry, test_set)
        ):
            return entry
    return None


def _has_this_protocol(entry: Mapping, test_set: TestSet) -> bool:
    return (
        entry["version"] == VERSION
        or test_set.suite not in testsets.GENERATED
        or entry["preprocessing"] == test_set.preprocessing_of_images(entry["image_size"])
    )


def _without_empty(earlier: Mapping) -> dict:
    kept = {sha: {key: entries for key, entries in sets.items() if entries} for sha, sets in earlier.items()}
    return {sha: sets for sha, sets in kept.items() if sets}


# Reading a file that anybody may have changed

KINDS: dict[str, tuple[Callable, str]] = {
    "text": (lambda v: isinstance(v, str), "a text"),
    "text or null": (lambda v: v is None or isinstance(v, str), "a text or null"),
    "list": (lambda v: isinstance(v, list), "a list"),
    "object": (lambda v: isinstance(v, dict), "an object"),
    "count": (lambda v: _is_int(v) and 0 < v < 2**31, "a whole number above 0"),
    "count or null": (lambda v: v is None or KINDS["count"][0](v), "a whole number above 0 or null"),
    "number of hits": (lambda v: _is_int(v) and 0 <= v < 2**31, "a whole number of 0 or more"),
    "percent": (lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 100, "a percentage"),
    "percent or null": (lambda v: v is None or KINDS["percent"][0](v), "a percentage or null"),
    "version": (lambda v: v in (1, VERSION) and _is_int(v), f"1 or {VERSION}, those that this program can read"),
}
REPORT = {
    "image_size": "count", "limit": "count or null", "wnids_sha256": "text", "checkpoints": "list", "cells": "object",
}  # fmt: skip
CELL = {"folder": "text", "n": "count", "preprocessing": "text"}
RESULT = {"top1": "percent", "top1_shared_classes": "percent", "n": "count", "classes": "object"}
SHAPE_BIAS = {
    "conflicts": "count", "shape_decisions": "number of hits", "texture_decisions": "number of hits",
    "shape_bias": "percent or null",
}  # fmt: skip
ENTRY = {
    "version": "version", "image_size": "count", "limit": "count or null", "wnids_sha256": "text",
    "images_sha256": "text or null", **CELL, "result": "object",
}  # fmt: skip


class _Odd(Exception):
    """What is wrong with the content of a file."""


def _read(path: str) -> dict[str, dict[str, list[dict]]]:
    """All results in a report's file, {checkpoint's SHA-256: {key of the test set: [result and how it was made]}}."""
    if not os.path.lexists(path) or os.path.isfile(path) and os.path.getsize(path) == 0:
        return {}
    try:
        if not os.path.isfile(path):
            raise _Odd("it is not a regular file")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return _results(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = f"it cannot be read as JSON ({type(error).__name__}: {error})"
    except _Odd as error:
        reason = str(error)
    raise UsageError(
        f"--json {path}: {reason[:300]}; results are only added to what this script wrote: name another file, or repair"
        " or remove this one"
    )


def _results(content: object) -> dict[str, dict[str, list[dict]]]:
    if not isinstance(content, dict) or not {"checkpoints", "cells"} <= content.keys():
        raise _Odd("it is JSON of another program, without the keys checkpoints and cells")
    _check("the file", content, REPORT)
    version = content.get("version", 1)
    _check("the file", {"version": version}, {"version": "version"})
    for index, checkpoint in enumerate(content["checkpoints"]):
        _check(f"checkpoints[{index}]", checkpoint, {"sha256": "text"})
    settings = {"version": version, **{name: content[name] for name in SETTINGS}}
    found: dict[str, dict[str, list[dict]]] = {}
    for key, cell in content["cells"].items():
        where = f"cells.{key}"
        _check(where, cell, CELL | {"results": "list"})
        if len(cell["results"]) != len(content["checkpoints"]):
            raise _Odd(f"{where} has {len(cell['results'])} results for {len(content['checkpoints'])} checkpoints")
        shared = {**settings, "images_sha256": cell.get("images_sha256"), **{name: cell[name] for name in CELL}}
        for index, (checkpoint, result) in enumerate(zip(content["checkpoints"], cell["results"])):
            entry = shared | {"result": result}
            _check_entry(f"{where}.results[{index}]", entry)
            _keep(found, checkpoint["sha256"], key, entry)
    _check("the file", {"earlier": content.get("earlier", {})}, {"earlier": "object"})
    for sha, sets in content.get("earlier", {}).items():
        _check("earlier", {sha: sets}, {sha: "object"})
        for key, entries in sets.items():
            _check(f"earlier.{sha}", {key: entries}, {key: "list"})
            for index, entry in enumerate(entries):
                _check_entry(f"earlier.{sha}.{key}[{index}]", entry)
                _keep(found, sha, key, {name: entry[name] for name in ENTRY})
    return found


def _keep(found: dict, sha: str, key: str, entry: dict) -> None:
    """Add a result, once: two rows may have had the same checkpoint."""
    entries = found.setdefault(sha, {}).setdefault(key, [])
    if entry not in entries:
        entries.append(entry)


def _check_entry(where: str, entry: object) -> None:
    _check(where, entry, ENTRY)
    result = entry["result"]
    _check(where, result, RESULT)
    if SHAPE_BIAS.keys() & result.keys():
        told = {"conflicts": result["n"], **result}
        _check(where, told, SHAPE_BIAS)
        if told["shape_decisions"] + told["texture_decisions"] > told["conflicts"]:
            raise _Odd(f"{where}: more decisions for shape or texture than the {told['conflicts']} images with both")
    for wnid, counts in result["classes"].items():
        _check(f"{where}.classes.{wnid}", counts, {"n": "count", "correct": "number of hits"})
        if counts["correct"] > counts["n"]:
            raise _Odd(f"{where}.classes.{wnid}: {counts['correct']} of {counts['n']} images are correct")
    if result["n"] != entry["n"]:
        raise _Odd(f"{where}: n is {result['n']} here and {entry['n']} for the test set")


def _check(where: str, value: object, kinds: Mapping[str, str]) -> None:
    """Raise _Odd unless `value` is an object that has these keys with values of these KINDS."""
    if not isinstance(value, dict):
        raise _Odd(f"{where} is not an object")
    for name, kind in kinds.items():
        holds, wanted = KINDS[kind]
        if name not in value:
            raise _Odd(f"{where} has no {name}")
        if not holds(value[name]):
            raise _Odd(f"{where}: {name} is {str(value[name])[:40]!r}, not {wanted}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
