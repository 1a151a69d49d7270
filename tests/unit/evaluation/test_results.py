"""The JSON file of an evaluation: no result is lost, none is taken for another, and damaged files are refused."""

import json

import pytest
from reports import WNIDS, a_test_set, report_of, result

from moco.errors import UsageError
from moco.evaluation import report, results, testsets

ALL_CORRUPTIONS = [f"corruption/{name}/{severity}" for name in testsets.STANDARD for severity in range(1, 6)]


def continued(path, fresh, *keys):
    """The top-1 of the first row that `fresh` takes from the file, by test set."""
    results.reuse_results(str(path), fresh, [a_test_set(key) for key in keys])
    return {key: cell["results"][0]["top1"] for key, cell in fresh["cells"].items()}


def all_results(path):
    """{(checkpoint, test set, settings): top-1} of all results in a file."""
    fresh = report_of({}, ["of nothing"])
    results.reuse_results(str(path), fresh, [])
    return {
        (sha, key, str({name: value for name, value in entry.items() if name != "result"})): entry["result"]["top1"]
        for sha, sets in fresh["earlier"].items()
        for key, entries in sets.items()
        for entry in entries
    }


# Which results are taken


def test_an_interrupted_report_is_continued_whatever_its_row_is_called():
    made = report_of({"val": [5.0], "sketch": [6.0]})
    results.save("r.json", made)
    renamed = results.new({"patch-k16384-a2": ["0.pth"]}, [{}], WNIDS, 28, None)
    assert continued("r.json", renamed, "val", "sketch", "rendition") == {"val": 5.0, "sketch": 6.0}
    assert list(report.by_row(renamed)) == ["patch-k16384-a2"] and renamed["earlier"] == {}
    assert renamed["cells"] == json.loads(json.dumps(made["cells"]))


def test_only_the_missing_models_of_a_set_are_scored():
    results.save("r.json", report_of({"val": [5.0]}, ["a"]))
    both = report_of({}, ["b", "a"])
    assert continued("r.json", both, "val") == {}
    assert results.unfinished(both, a_test_set()) == [0]
    results.add(both, a_test_set(), [result(7.0)])
    assert [each["top1"] for each in both["cells"]["val"]["results"]] == [7.0, 5.0] and both["earlier"] == {}


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "other"}, {"cells": {"sketch": [7.0]}}, {"limit": 1}, {"wnids": ["n02", "n01"]}, {"image_size": 56},
    ],
)  # fmt: skip
def test_a_finished_result_outlives_other_evaluations(other):
    keys = [*ALL_CORRUPTIONS, "val"]
    results.save("r.json", report_of(dict.fromkeys(keys, [5.0])))
    before = all_results("r.json")
    made = report_of(**{"cells": {"val": [7.0]}} | other)
    cells, made["cells"] = made["cells"], {}
    assert continued("r.json", made, *cells) == {}
    made["cells"] = cells
    results.save("r.json", made)
    assert all_results("r.json").items() >= before.items() and len(all_results("r.json")) == len(before) + 1
    assert continued("r.json", report_of({}), *keys) == dict.fromkeys(keys, 5.0)  # and is taken up again


@pytest.mark.parametrize("other", [{"folder": "/elsewhere"}, {"n": 6}, {"suffix": "jpg"}])
def test_a_result_on_other_images_is_not_taken(other):
    results.save("r.json", report_of({"val": [5.0]}))
    fresh = report_of({})
    results.reuse_results("r.json", fresh, [a_test_set(**other)])
    assert fresh["cells"] == {} and len(fresh["earlier"]) == 1


def first_version(made):
    """A report as it was written before results had an identity of their own."""
    old = {name: made[name] for name in ("image_size", "limit", "wnids", "wnids_sha256", "checkpoints")}
    cells = json.loads(json.dumps(made["cells"]))
    for cell in cells.values():
        del cell["images_sha256"]
    return old | {"cells": cells, "table": {}}


def test_of_a_file_of_the_first_version_results_on_photos_are_taken(tmp_path):
    """It cropped corrupted images of any size, and resized all stylized ones."""
    (tmp_path / "r.json").write_text(json.dumps(first_version(report_of(dict.fromkeys(["val", "stylized"], [5.0])))))
    fresh = report_of({})
    assert continued("r.json", fresh, "val", "stylized") == {"val": 5.0}
    results.save("r.json", fresh)
    assert len(all_results("r.json")) == 2


# Files that are damaged, or another program's


@pytest.mark.parametrize(
    "content",
    [b'{"checkpoints": [', b"[]", b"3", b"null", b"{}", b"[" * 100_000, b"1" * 10_000, b"\xff\xfe{}", b"\0" * 64],
    ids=lambda content: repr(content[:20]),
)
def test_a_file_that_is_not_its_own_is_refused_and_kept(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(UsageError, match="--json r.json: .*use another file"):
        results.reuse_results("r.json", report_of({}), [a_test_set()])
    assert (tmp_path / "r.json").read_bytes() == content


def test_an_empty_or_absent_file_is_a_new_one(tmp_path):
    (tmp_path / "empty.json").touch()
    for name in ("empty.json", "absent.json"):
        assert continued(name, report_of({}), "val") == {}
    with pytest.raises(UsageError, match="not a regular file"):
        results.reuse_results("/dev/null", report_of({}), [])


ODD_VALUES = {  # of a result, of a test set, and of a report
    "top1": ["5", None, True, -1, 101, float("nan"), 10**400],
    "n": [0, -1, 1.5, "4", 3, 2**40],
    "classes": [None, [], {"n01": None}, {"n01": {"n": 1, "correct": 2}}, {"n01": {"n": "1", "correct": 0}}],
    "conflicts": [2, 0],  # fewer than the decisions for shape or texture
    "folder": [None, 3],
    "preprocessing": [[], {}],
    "results": [None, [], [{}, {}], "x"],
    "version": [0, 3, "2"],
    "checkpoints": [None, [{}], [{"sha256": 1}]],
    "cells": [[], {"val": None}],
    "earlier": [[], {"a": {"val": [{}]}}],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ODD_VALUES.items() for value in values])
def test_impossible_values_are_refused(tmp_path, name, value):
    cues = result(5.0, conflicts=4, shape_decisions=1, texture_decisions=2, shape_bias=100 / 3)
    made = report_of({"stylized": [cues]})
    cell = made["cells"]["stylized"]
    level = made if name in made else cell if name in ("folder", "preprocessing", "results") else cell["results"][0]
    level[name] = value
    (tmp_path / "r.json").write_text(json.dumps(made))
    with pytest.raises(UsageError, match="^--json r.json: damaged[^\n]*$"):
        results.reuse_results("r.json", report_of({}), [])
