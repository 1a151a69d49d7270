"""Which classes a row of an evaluation helps and harms."""

import json

import pytest

from moco.errors import UsageError
from moco.evaluation import report


def counts(**correct):
    """The classes of a result: {class: (correct, images)}."""
    return {"classes": {wnid: {"n": n, "correct": c} for wnid, (c, n) in correct.items()}}


def made(cells, rows=("plain", "patch", "patch")):
    return {
        "checkpoints": [{"row": row} for row in rows],
        "cells": {key: {"results": results} for key, results in cells.items()},
    }


VAL = [counts(cat=(5, 10), dog=(8, 10)), counts(cat=(6, 10), dog=(6, 10)), counts(cat=(8, 10), dog=(4, 10))]


def test_class_differences_are_means_over_the_runs_of_a_row():
    cat, dog = report.class_differences(made({"val": VAL}), "val", "plain", "patch")
    assert (cat.wnid, cat.n, cat.base, cat.top1) == ("cat", 10, 50, 70) and cat.change == pytest.approx(20)
    assert (dog.wnid, dog.base, dog.top1) == ("dog", 80, 50) and dog.change == pytest.approx(-30)
    assert cat.error == pytest.approx(100 * ((0.5 * 0.5 + 0.7 * 0.3) / 10) ** 0.5)
    back = report.class_differences(made({"val": VAL}), "val", "patch", "plain")
    assert [each.wnid for each in back] == ["dog", "cat"] and back[0].change == pytest.approx(30)


def test_class_differences_of_corruptions_weigh_each_set_equally():
    half, none, all_ = counts(cat=(5, 10)), counts(cat=(0, 2)), counts(cat=(2, 2))
    cells = {
        "corruption/fog/1": [half, half],
        "corruption/snow/5": [none, all_],
        "corruption/spatter/1": [none, all_],  # an extra one: in no mean
        "val": [counts(cat=(1, 1), dog=(1, 1))] * 2,
    }
    report_ = made(cells, ["a", "b"])
    (cat,) = report.class_differences(report_, "corruption", "a", "b")
    assert (cat.n, cat.base, cat.top1) == (10, 25, 75)
    (of_one,) = report.class_differences(report_, "corruption/snow/5", "a", "b")
    assert (of_one.n, of_one.change) == (2, 100)
    assert [each.wnid for each in report.class_differences(report_, "val", "a", "b")] == [
        "cat",
        "dog",
    ]  # equal: by name


def test_class_differences_name_the_rows_and_sets_there_are():
    with pytest.raises(UsageError, match="no row texture; the rows are plain, patch"):
        report.class_differences(made({"val": VAL}), "val", "plain", "texture")
    some = made({"val": VAL, "corruption/fog/1": VAL, "corruption/fog/2": VAL, "set/mine": VAL})
    with pytest.raises(UsageError, match="no test set sketch; there are val, corruption, mine"):
        report.class_differences(some, "sketch", "plain", "patch")
    assert report.class_differences(some, "set/mine", "plain", "patch")[0].wnid == "cat"


def test_class_differences_are_those_of_the_json_file():
    stored = json.loads(json.dumps(made({"val": VAL})))
    assert report.class_differences(stored, "val", "plain", "patch")[0].change == pytest.approx(20)
