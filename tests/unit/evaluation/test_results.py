"""The JSON file of an evaluation: no result is lost, none is taken for another, and damaged files are refused."""

import json
from pathlib import Path

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
    """{identity: top-1} of all results in a file."""
    fresh = report_of({}, ["of nothing"])
    results.reuse_results(str(path), fresh, [])
    return {identity: each["top1"] for identity, each in fresh["earlier"].items()}


# Which results are taken


def test_an_interrupted_report_is_continued_whatever_its_row_is_called():
    made = report_of({"val": [5.0], "sketch": [6.0]})
    results.save("r.json", made)
    known = [{"sha256": made["checkpoints"][0]["sha256"]}]
    renamed = results.new({"patch-k16384-a2": ["moved.pth"]}, known, WNIDS, 28, None)
    assert continued("r.json", renamed, "val", "sketch", "rendition") == {"val": 5.0, "sketch": 6.0}
    assert list(report.by_row(renamed)) == ["patch-k16384-a2"]
    assert renamed["cells"] == json.loads(json.dumps(made["cells"]))
    results.save("r.json", renamed)
    assert json.loads(Path("r.json").read_text())["earlier"] == {}


def test_only_the_missing_models_of_a_set_are_scored():
    results.save("r.json", report_of({"val": [5.0]}, ["a"]))
    both = report_of({}, ["b", "a"])
    assert continued("r.json", both, "val") == {}
    assert results.unfinished(both, a_test_set()) == [0]
    results.add(both, a_test_set(), [result(7.0)])
    assert [each["top1"] for each in both["cells"]["val"]["results"]] == [7.0, 5.0]


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


@pytest.mark.parametrize("other", [{"n": 600}, {"files": "made again under the same names"}])
def test_a_result_on_other_images_is_not_taken(other):
    results.save("r.json", report_of({"val": [5.0]}))
    fresh = report_of({})
    results.reuse_results("r.json", fresh, [a_test_set(**other)])
    assert fresh["cells"] == {} and len(fresh["earlier"]) == 1
    results.reuse_results("r.json", fresh, [a_test_set(folder="/moved")])
    assert list(fresh["cells"]) == ["val"]


def test_a_result_in_another_precision_is_not_taken():
    results.save("r.json", report_of({"val": [5.0]}))
    fresh = report_of({}) | {"precision": "bf16"}
    results.reuse_results("r.json", fresh, [a_test_set()])
    assert fresh["cells"] == {} and len(fresh["earlier"]) == 1


def test_outputs_that_are_not_finite_are_no_result():
    with pytest.raises(UsageError, match="0.pth: its outputs are not finite for 3 of the 200 images of val"):
        report_of({"val": [result(5.0, not_finite=3)]})


# Rows

PLAIN = {"robust": "none", "moco_k": 8, "seed": 0, "epoch": 3, "step": 0, "images": 9, "arch": "resnet10"}
PATCH = PLAIN | {"robust": "patch", "alpha": 2.0}
OWN = {"lr": [1.0], "image_size": 28, "seed": 0}


@pytest.mark.parametrize("other, told", [
    ({"pretraining": PATCH | {"seed": 1}}, "different settings .pretraining robust none, patch"),
    ({"pretraining": PLAIN | {"seed": 1, "images": 8}}, "different settings .pretraining images 9, 8"),
    ({"pretraining": PLAIN | {"seed": 1, "epoch": 2}}, "different settings .pretraining epoch 3, 2"),
    ({"pretraining": PLAIN | {"seed": 1}, "probe": OWN | {"lr": [3.0]}}, r"settings .probe lr \[1.0\], \[3.0\]"),
    ({"pretraining": PLAIN}, "come from one pre-training run"),  # with --seed 0 on another machine
    ({"pretraining": PLAIN | {"epoch": 2}}, "come from one pre-training run"),  # another epoch of it
    ({"pretraining": PLAIN, "probe": OWN | {"seed": 1}}, "come from one pre-training run"),  # a second probe
    ({"pretraining": {"robust": "random weights"}}, "different settings .pretraining robust none, random weights"),
    ({"pretraining": PLAIN | {"seed": 1, "arch": "resnet18"}}, "settings .pretraining arch resnet10, resnet18"),
    ({"pretraining": PLAIN | {"seed": 1, "step": 5}}, "different settings .pretraining step 0, 5"),
    ({"backbone_sha256": "a"}, "come from one pre-training run"),
    ({"sha256": "1"}, "come from one pre-training run")])  # fmt: skip
def test_a_row_is_of_independent_runs_with_the_same_settings(other, told):
    one = {"pretraining": PLAIN, "probe": OWN, "backbone_sha256": "a", "sha256": "1"}
    fine = {"pretraining": PLAIN | {"seed": 1}, "sha256": "2"}

    def made(other, rows):
        return results.new(rows, [one, {"backbone_sha256": "b", "probe": OWN} | other], WNIDS, 28, None)

    row = {"x": ["a", "b"]}
    made(fine, row)
    made({}, row)  # an unknown pre-training is no other one
    made(other, {"x": ["a"], "y": ["b"]})
    with pytest.raises(UsageError, match=f"--pretrained x=…: a and b .*{told}"):
        made(other, row)


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


ODD_VALUES = {  # of a result, of a test set, and of a report
    "top1": ["5", None, -1, 6, float("nan"), 10**400],
    "n": [0, -1, 1.5, "4", 3, 2**40],
    "classes": [None, [], {"n01": None}, {"n01": {"n": 1, "correct": 2}}, {"n01": {"n": "1", "correct": 0}}],
    "masks": [None, {}, {"correct": "x"}, {"correct": "AAAA"}],
    "preprocessing": [[], {}],
    "results": [None, [], [{}, {}], "x"],
    "version": [0, 2, "3", None],
    "cells": [[], {"val": None}],
    "earlier": [3, {"a": {"val": [{}]}}],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ODD_VALUES.items() for value in values])
def test_impossible_values_are_refused(tmp_path, name, value):
    made = report_of({"stylized": [result(5.0, cues=(4, 1, 2))]})
    cell = made["cells"]["stylized"]
    level = made if name in made else cell if name == "results" else cell["results"][0]
    level[name] = value
    (tmp_path / "r.json").write_text(json.dumps(made))
    with pytest.raises(UsageError, match="^--json r.json: damaged[^\n]*$"):
        results.reuse_results("r.json", report_of({}), [a_test_set()])
