"""The report of an evaluation: what its tables and notes say of results that are known."""

import statistics

import pytest
from reports import report_of, result

from moco.errors import UsageError
from moco.evaluation import report
from moco.evaluation.testsets import STANDARD, SUITES, Suite

CUES = [
    result(50.0, conflicts=4, shape_decisions=1, texture_decisions=2, shape_bias=100 / 3),
    result(75.0, conflicts=4, shape_decisions=3, texture_decisions=0, shape_bias=100.0),
]


def shared(top1, of_shared):
    return result(top1, top1_shared_classes=of_shared)


# The table


def test_rows_are_the_mean_and_sample_std_of_their_runs():
    made = report_of({"val": [70.0, 71.0, 75.0, 60.0], "sketch": [1.0, 2.0, 3.0, 4.0]}, ["a", "a", "a", "b"])
    assert report.table(made).splitlines() == [
        "| model | K | alpha | val | Sketch |",
        "|---|---|---|---|---|",
        f"| a | – | – | 72.00±{statistics.stdev([70, 71, 75]):.2f} | 2.00±1.00 |",
        "| b | – | – | 60.00 | 4.00 |",
    ]
    assert report.differences(made) == ["b against a: val -12.00, Sketch +2.00"]


def test_rows_show_the_queue_and_alpha_of_their_pretraining():
    options = {row: {"moco_k": 16384, "alpha": 2.0, "num_nonsem": n} for row, n in (("plain", 0), ("patch", 1))}
    made = report_of({"val": [1.0, 2.0, 2.0]}, ["plain", "patch", "patch"], options=options)
    assert report.table(made).splitlines()[2:] == ["| plain | 16384 | – | 1.00 |", "| patch | 16384 | 2 | 2.00±0.00 |"]


def test_columns_are_in_the_published_order_others_follow():
    cells = {
        "set/own": [shared(1.0, 2.0)],
        "stylized": [result(5.0, shape_bias=30.0)],
        "rendition": [shared(8.0, 9.0)],
        f"corruption/{STANDARD[0]}/1": [7.0],
        "corruption/spatter/1": [50.0],
        "val": [9.0],
    }
    found = report.figures(report_of(cells), 0)
    assert list(found) == [
        "val", "Corruption", "Stylized", "Rendition", "Rendition, shared classes", "Corruption, extra four",
        "Shape bias", "own", "own, shared classes",
    ]  # fmt: skip
    assert list(found.values()) == [9.0, 7.0, 5.0, 8.0, 9.0, 50.0, 30.0, 1.0, 2.0]


def test_a_suite_that_is_added_is_a_column_in_its_place(monkeypatch):
    monkeypatch.setitem(SUITES, "own", Suite("Own", shared_classes=True))
    made = report_of({"own": [CUES[0] | {"top1": 1.0, "top1_shared_classes": 2.0}], "set/a": [3.0], "val": [4.0]})
    assert report.by_row(made)["mine"] == {
        "val": [4.0], "Own": [1.0], "Own, shared classes": [2.0], "Own: Shape bias": [100 / 3],
        "Own: Shape accuracy": [25.0], "Own: Texture accuracy": [50.0], "a": [3.0],
    }  # fmt: skip


def test_shared_classes_are_a_column_only_where_they_differ():
    same, other = shared(8.0, 8.0), shared(9.0, 9.5)
    assert report.by_row(report_of({"rendition": [same]})) == {"mine": {"Rendition": [8.0]}}
    assert report.by_row(report_of({"rendition": [same, other]}, ["a", "b"])) == {
        "a": {"Rendition": [8.0], "Rendition, shared classes": [8.0]},
        "b": {"Rendition": [9.0], "Rendition, shared classes": [9.5]},
    }


def test_names_of_further_sets_are_checked():
    report.check_set_name("ImageNet-A", ["imagenet-v2"])
    for name in ("val", "SKETCH", "shape bias", "IMAGENET-V2"):
        with pytest.raises(UsageError, match="(?i)there is a column .* already"):
            report.check_set_name(name, ["imagenet-v2"])
    for name in ("", "a/b", "a|b", "a, shared classes", "x" * 41):
        with pytest.raises(UsageError, match="a name is up to 40 letters"):
            report.check_set_name(name, ["imagenet-v2"])


def test_a_table_wider_than_the_terminal_is_transposed_where_that_is_narrower():
    def lines(rows, width):
        cells = dict.fromkeys(["val", "sketch", "stylized", "rendition"], [70.0] * rows)
        return report.table(report_of(cells, [f"patch-k16384-a{row}" for row in range(rows)]), width).splitlines()

    assert lines(2, 50)[0] == "| model | patch-k16384-a0 | patch-k16384-a1 |"
    assert lines(2, 50)[-1] == "| Rendition | 70.00 | 70.00 |"
    assert lines(2, 80) == lines(2, None) and lines(9, 50) == lines(9, None)  # nine side by side would be wider


def test_a_latex_table_has_escaped_names_and_bold_bests():
    bias = {"conflicts": 4, "shape_decisions": 1, "texture_decisions": 1, "shape_bias": 50.0}
    cells = {"val": [50.0, 70.0, 60.0], "sketch": [20.0, 20.0, 10.0], "stylized": [result(9.0, **bias)] * 3}
    rows = ["plain_k1", "plain_k1", "patch & 2"]
    assert report.latex(report_of(cells, rows, options=dict.fromkeys(rows, {"moco_k": 64}))).splitlines() == [
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
    assert "textbf" not in report.latex(report_of({"val": [50.0]}))  # one row has no best


def test_the_best_mce_is_the_lowest():
    top1 = {f"corruption/{name}/{severity}": [50.0, 60.0] for name in STANDARD for severity in range(1, 6)}
    *_, worse, better, _, _ = report.latex(report_of(top1, ["a", "b"], wnids=list(map(str, range(1000))))).splitlines()
    assert worse.count("textbf") == 0 and better.count("textbf") == 2


# Notes


def test_a_partial_corruption_mean_and_resized_images_are_mentioned():
    made = report_of({f"corruption/{name}/{severity}": [50.0] for name in STANDARD for severity in range(1, 6)})
    assert "(" not in report.table(made) and "partial" not in str(report.notes(made))
    del made["cells"]["corruption/fog/3"]
    assert "| Corruption (partial) |" in report.table(made)
    (note,) = report.notes(made)
    assert "1 of 75 are missing (fog/3" in note and "296 images, CenterCrop(28), 74 corruptions × severities" in note
    made["cells"]["corruption/fog/2"]["preprocessing"] = "Resize(32), CenterCrop(28)"
    assert "| Corruption (partial, resized) |" in report.table(made)
    assert "RESIZED: 1 of these have images of another size" in str(report.notes(made))


def test_a_column_and_a_note_say_how_many_categories_count():
    made = report_of({"set/cues": CUES, "set/other": [1.0, 1.0]}, ["plain", "patch"])
    header = report.table(made).splitlines()[0]
    for column in ("cues", "cues: Shape bias", "cues: Texture accuracy"):
        assert f"| {column} (2 of 16 categories) |" in header
    assert header.endswith("| other |")
    note, _ = report.notes(made)
    assert "decided between 2 of 16 categories (cat, dog) by mean probability" in note and "Shape bias over" not in note
    made["cells"]["set/cues"]["results"][0]["conflicts"] = 3
    assert "; Shape bias over the 3 of these images whose cues are two different classes" in report.notes(made)[0]


# Classes

ROWS = ["plain", "patch", "patch"]
VAL = [
    result(65, {"cat": (5, 10), "dog": (8, 10)}),
    result(60, {"cat": (6, 10), "dog": (6, 10)}),
    result(60, {"cat": (8, 10), "dog": (4, 10)}),
]


def test_class_differences_are_means_over_the_runs_of_a_row():
    cat, dog = report.class_differences(report_of({"val": VAL}, ROWS), "val", "plain", "patch")
    assert (cat.wnid, cat.base, cat.top1) == ("cat", 50, 70) and cat.change == pytest.approx(20)
    assert (dog.wnid, dog.base, dog.top1) == ("dog", 80, 50) and dog.change == pytest.approx(-30)
    assert cat.error == pytest.approx(100 * ((0.5 * 0.5 + 0.7 * 0.3) / 10) ** 0.5)
    back = report.class_differences(report_of({"val": VAL}, ROWS), "val", "patch", "plain")
    assert [each.wnid for each in back] == ["dog", "cat"] and back[0].change == pytest.approx(30)


def test_class_differences_of_corruptions_weigh_each_set_equally():
    half, none, all_ = (result(0, {"cat": counts}) for counts in ((5, 10), (0, 2), (2, 2)))
    cells = {"fog/1": [half, half], "snow/5": [none, all_], "spatter/1": [none, all_]}  # the last is in no mean
    made = report_of({f"corruption/{key}": results for key, results in cells.items()}, ["a", "b"])
    (cat,) = report.class_differences(made, "corruption", "a", "b")
    assert (cat.base, cat.top1) == (25, 75)
    (of_one,) = report.class_differences(made, "corruption/snow/5", "a", "b")
    assert of_one.change == 100


def test_class_differences_name_the_rows_and_sets_there_are():
    made = report_of({"val": VAL, "corruption/fog/1": VAL, "corruption/fog/2": VAL, "set/mine": VAL}, ROWS)
    with pytest.raises(UsageError, match="no row texture; the rows are plain, patch"):
        report.class_differences(made, "val", "plain", "texture")
    with pytest.raises(UsageError, match="no test set sketch; there are val, corruption, set/mine"):
        report.class_differences(made, "sketch", "plain", "patch")
    for name in ("mine", "set/mine"):
        assert report.class_differences(made, name, "plain", "patch")[0].wnid == "cat"


def test_classes_are_sorted_from_helped_to_harmed():
    one, three = (result(25, {"dog": (hits, 4)}) for hits in (1, 3))
    cells = {
        "val": [result(50, {"cat": (a, 4), "dog": (b, 4)}) for a, b in ((1, 3), (3, 1))],
        "rendition": [one, three],
        "corruption/spatter/1": [one, three],  # an extra one alone has no mean
    }
    assert report.by_class_table(report_of(cells, ["plain", "patch"])).splitlines() == [
        "patch against plain, by class; largest standard error, in points: val 30.6, Rendition 30.6",
        "| class | val | Rendition |",
        "|---|---|---|",
        "| cat | 25.0 → 75.0 (+50.0) | – |",
        "| dog | 75.0 → 25.0 (-50.0) | 25.0 → 75.0 (+50.0) |",
    ]
