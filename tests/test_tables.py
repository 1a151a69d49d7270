"""The tables of an evaluation that are made for papers: by class, and for LaTeX."""

import json

import pytest
from helpers import EVALUATE, PROBE, SMALL_PROBE, refused, run_script, write_folder

from moco.errors import UsageError
from moco.evaluation import report, results
from moco.evaluation.testsets import TestSet

ROWS = ["plain_k1", "patch & 2"]


def result(top1, **correct):
    classes = {name: {"n": 4, "correct": hits} for name, hits in correct.items()}
    return {"top1": top1, "top1_shared_classes": top1, "n": 4 * max(1, len(classes)), "classes": classes}


def make(tmp_path, cells, rows=(1, 1)):
    files = {name: [str(tmp_path / f"{name}{i}.pth") for i in range(count)] for name, count in zip(ROWS, rows)}
    for path in (path for paths in files.values() for path in paths):
        with open(path, "w") as file:
            file.write(path)
    made = results.new(files, [{"moco_k": 64}] * sum(rows), ["cat", "dog"], 28, None)
    for key, values in cells.items():
        categories = {"bird": [0], "truck": [1]} if key == "set/cues" else None
        labels = [0] * values[0]["n"]
        results.add(made, TestSet(key, key, ["x"] * len(labels), labels, None, categories), values, 28, ["cat", "dog"])
    return made


def test_classes_are_sorted_from_helped_to_harmed(tmp_path):
    cells = {
        "val": [result(50, cat=1, dog=3), result(50, cat=3, dog=1)],
        "rendition": [result(25, dog=1), result(75, dog=3)],
        "corruption/spatter/1": [result(25, dog=1), result(75, dog=3)],  # an extra one alone has no mean
    }
    caption, *table = report.by_class_table(make(tmp_path, cells)).splitlines()
    assert caption == (
        "patch & 2 against plain_k1, by class; one standard error of a difference is up to, in points: val 30.6,"
        " Rendition 30.6"
    )
    assert table == [
        "| class | val | Rendition |",
        "|---|---|---|",
        "| cat | 25.0 → 75.0 (+50.0) | – |",
        "| dog | 75.0 → 25.0 (-50.0) | 25.0 → 75.0 (+50.0) |",
    ]


def test_categories_are_a_table_of_their_own(tmp_path):
    cells = {"set/cues": [result(50, bird=1), result(50, bird=3)], "val": [result(0, cat=0), result(0, cat=0)]}
    lines = report.by_class_table(make(tmp_path, cells)).splitlines()
    assert [line for line in lines if line.startswith("| class")] == ["| class | val |", "| class | cues |"]
    assert lines[-1] == "| bird | 25.0 → 75.0 (+50.0) |"


def test_a_further_set_is_found_by_its_name(tmp_path):
    made = make(tmp_path, {"set/own": [result(50, cat=1), result(50, cat=3)], "val": [result(0, cat=0)] * 2})
    (cat,) = report.class_differences(made, "own", *ROWS)
    assert cat.change == 50 and report.class_differences(made, "set/own", *ROWS) == [cat]
    with pytest.raises(UsageError, match="no test set other; there are own, val"):
        report.class_differences(made, "other", *ROWS)


def test_a_latex_table_has_escaped_names_and_bold_bests(tmp_path):
    bias = {"conflicts": 4, "shape_decisions": 1, "texture_decisions": 1, "shape_bias": 50.0}
    cells = {
        "val": [result(50.0), result(70.0), result(60.0)],
        "sketch": [result(20.0), result(20.0), result(10.0)],
        "stylized": [result(9.0) | bias, result(9.0) | bias, result(9.0) | bias],
    }
    assert report.latex(make(tmp_path, cells, rows=(2, 1))).splitlines() == [
        r"\begin{tabular}{lrrrrrrrr}  % \usepackage{booktabs}",
        r"\toprule",
        r"model & K & alpha & val & Sketch & Stylized & Shape bias & Shape accuracy & Texture accuracy \\",
        r"\midrule",
        r"plain\_k1 & 64 & -- & \textbf{60.00$\pm$14.14} & \textbf{20.00$\pm$0.00} & \textbf{9.00$\pm$0.00} &"
        r" 50.00$\pm$0.00 & 25.00$\pm$0.00 & 25.00$\pm$0.00 \\",
        r"patch \& 2 & 64 & -- & \textbf{60.00} & 10.00 & \textbf{9.00} & 50.00 & 25.00 & 25.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_best_mce_is_the_lowest_and_one_row_has_no_best(tmp_path):
    assert report._best("mCE", ["70.00", "65.00±1.00"]) == ["65.00±1.00"]
    assert report._best("val", ["70.00", "–", "65.00±1.00"]) == ["70.00"]
    made = make(tmp_path, {"val": [result(50.0)]}, rows=(1,))
    assert "textbf" not in report.latex(made)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    root = tmp_path_factory.mktemp("linear")
    run_script(PROBE, *SMALL_PROBE, "-b", 4, "--epochs", 1, "--ckpt_path", root, write_folder(root / "data"))
    return root


def test_both_tables_are_printed_from_stored_results(linear, tmp_path):
    best, path = linear / "model_best_random.pth.tar", tmp_path / "r.json"
    command = [EVALUATE, "--pretrained", f"a={best}", f"b={best}", "--val", linear / "data", "--json", path, "-j", 0]
    run_script(*command)
    stored = json.loads(path.read_text())
    out = run_script(*command, "--by-class", "--latex").stdout.splitlines()
    assert "| class | val |" in out and r"\bottomrule" in out and out[-1] == f"wrote {path}"
    assert json.loads(path.read_text()) == stored
    one = ["--pretrained", best, "--val", linear / "data", "--by-class"]
    assert "name two or more" in refused(EVALUATE, *one)
