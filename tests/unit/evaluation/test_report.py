"""The report of an evaluation: what its tables and notes say of results that are known."""

import statistics

import numpy as np
import pytest
from reports import report_of, result

from moco.evaluation import report, scores
from moco.evaluation.testsets import CORRUPTIONS, STANDARD

CUES = [result(50.0, n=4, cues=(4, 1, 2)), result(75.0, n=4, cues=(4, 3, 0))]


def shared(top1, of_shared):
    return result(top1, shared=of_shared)


def only_row(made):
    """{column: figure} of a report on one checkpoint."""
    (row,) = report.by_row(made).values()
    return {column: figure for column, (figure,) in row.items()}


def in_order(*decisions):
    """A result of one class, image by image."""
    made = result(classes={"cat": (sum(decisions), len(decisions))})
    made["masks"] = dict.fromkeys(made["masks"], scores.pack(decisions))
    return made


# The table


def test_rows_are_the_mean_and_sample_std_of_their_runs():
    made = report_of({"val": [70.0, 71.0, 75.0, 60.0], "sketch": [1.0, 2.0, 3.0, 4.0]}, ["a", "a", "a", "b"])
    assert report.table(made).splitlines() == [
        "| model | K | alpha | val | Sketch |",
        "|---|---|---|---|---|",
        f"| a | – | – | 72.00±{statistics.stdev([70, 71, 75]):.2f} | 2.00±1.00 |",
        "| b | – | – | 60.00 | 4.00 |",
    ]


def test_rows_show_the_queue_and_alpha_of_their_pretraining():
    options = {row: {"moco_k": 16384, "alpha": 2.0, "num_nonsem": n} for row, n in (("plain", 0), ("patch", 1))}
    del options["plain"]["alpha"]  # as stored: it has no effect
    made = report_of({"val": [1.0, 2.0, 2.0]}, ["plain", "patch", "patch"], options=options)
    assert report.table(made).splitlines()[2:] == ["| plain | 16384 | – | 1.00 |", "| patch | 16384 | 2 | 2.00±0.00 |"]
    made["checkpoints"][1]["pretraining"] = None  # a file of the published code
    made["checkpoints"][2]["pretraining"]["changes"] = [{"epoch": 3, "alpha": [1.0, 2.0]}, {"epoch": 4, "lr": [1, 2]}]
    assert "| patch | unknown, 16384 | unknown, 1 → 2 |" in report.table(made)
    made["checkpoints"][0]["probe"] = {"changes": [{"epoch": 9, "weight_decay": [0, 0.1]}]}
    assert report.notes(made)[-3:] == [
        "plain: probe continued from epoch 9 with weight_decay 0 → 0.1",
        "patch: pretraining continued from epoch 3 with alpha 1.0 → 2.0",
        "patch: pretraining continued from epoch 4 with lr 1 → 2",
    ]


def test_columns_are_in_the_published_order_others_follow():
    cells = {
        "set/own": [shared(1.0, 2.0)],
        "stylized": [result(5.0, cues=(50, 3, 7))],
        "rendition": [shared(8.0, 9.0)],
        f"corruption/{STANDARD[0]}/1": [7.0],
        "corruption/spatter/1": [50.0],
        "val": [9.0],
    }
    found = only_row(report_of(cells))
    assert list(found) == [
        "val", "Corruption", "Stylized", "Rendition", "Rendition, shared classes", "Corruption, extra four",
        "Shape bias", "Shape accuracy", "Texture accuracy", "own", "own, shared classes",
    ]  # fmt: skip
    assert list(found.values()) == pytest.approx([9, 7, 5, 8, 9, 50, 30, 6, 14, 1, 2])


def test_corruption_is_the_plain_mean_of_15_by_5_and_the_extra_four_have_their_own():
    names = [name for group in CORRUPTIONS.values() for name in group]
    parts = [f"corruption/{name}/{severity}" for name in names for severity in range(1, 6)]
    assert len(parts) == 95
    found = only_row(report_of({part: [number] for number, part in enumerate(parts)}))
    assert found == pytest.approx({"Corruption": 74 / 2, "Corruption, extra four": 75 + 19 / 2})


def test_shared_classes_are_a_column_only_where_they_differ():
    same, other = shared(8.0, 8.0), shared(9.0, 9.5)
    assert report.by_row(report_of({"rendition": [same]})) == {"mine": {"Rendition": [8.0]}}
    assert report.by_row(report_of({"rendition": [same, other]}, ["a", "b"])) == {
        "a": {"Rendition": [8.0], "Rendition, shared classes": [8.0]},
        "b": {"Rendition": [9.0], "Rendition, shared classes": [9.5]},
    }


def test_a_latex_table_has_escaped_names():
    cues = [result(9.0, cues=(4, 1, 1))] * 6
    cells = {"val": [50.0, 52.0, 51.0, 70.0, 72.0, 71.0], "sketch": [20.0] * 6, "stylized": cues}
    rows = ["plain_k1"] * 3 + ["patch & 2"] * 3
    made = report_of(cells, rows, options=dict.fromkeys(rows, {"moco_k": 64}))
    assert report.latex(made).splitlines() == [
        r"\begin{tabular}{lrrrrrrrr}  % \usepackage{booktabs}",
        r"\toprule",
        r"model & K & alpha & val & Sketch & Stylized & Shape bias & Shape accuracy & Texture accuracy \\",
        r"\midrule",
        r"plain\_k1 & 64 & -- & 51.00$\pm$1.00 & 20.00$\pm$0.00 & 9.00$\pm$0.00 &"
        r" 50.00$\pm$0.00 & 25.00$\pm$0.00 & 25.00$\pm$0.00 \\",
        r"patch \& 2 & 64 & -- & 71.00$\pm$1.00 & 20.00$\pm$0.00 & 9.00$\pm$0.00 &"
        r" 50.00$\pm$0.00 & 25.00$\pm$0.00 & 25.00$\pm$0.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize("row", ["[x]", "*", "a|b", "\x1b[31m", "a\nb"])
def test_names_of_rows_stay_in_their_cells(row):
    made = report_of({"val": [50.0, 40.0]}, ["plain", row], list("ab"))
    lines = report.table(made).splitlines()
    assert len(lines) == 4 and lines[3].replace(r"\|", "").count("|") == lines[0].count("|")
    last = report.latex(made).splitlines()[5]
    assert not last.startswith(("[", "*")) and last.endswith(r"\\") and "\x1b" not in last + lines[3]


# Differences


def test_an_error_is_over_runs_where_there_are_three_of_each():
    made = report_of({"val": [70.0, 71.0, 75.0, 60.0, 61.0, 62.0]}, ["a"] * 3 + ["b"] * 3)
    (found,) = report.differences(made)["b"]
    error = ((statistics.variance([70, 71, 75]) + 1) / 3) ** 0.5
    assert (found.name, found.change, found.error) == ("val", -11.0, pytest.approx(error))
    assert report.difference_lines(made) == [f"b against a: val -11.00±{error:.2f}", report.ERRORS]
    same = report_of({"val": [50.0] * 6}, ["a"] * 3 + ["b"] * 3)
    assert report.differences(same)["b"][0].error == 0.5  # one image of 200


def test_an_error_of_fewer_runs_is_over_the_images_both_rows_saw():
    """Of 8 images they decide 3 differently, twice for the second row: a paired error, and that of one image."""
    made = report_of({"val": [in_order(1, 1, 1, 1, 0, 0, 0, 0), in_order(1, 1, 1, 0, 1, 1, 0, 0)]}, ["a", "b"])
    (found,) = report.differences(made)["b"]
    effects = [0, 0, 0, -1, 1, 1, 0, 0]
    paired = sum((effect - 1 / 8) ** 2 for effect in effects)
    assert found.change == 12.5 and found.error == pytest.approx(100 / 8 * (paired + 1) ** 0.5)
    same = report_of({"val": [in_order(1, 0), in_order(1, 0)]}, ["a", "b"])
    assert report.differences(same)["b"][0].error == 50.0  # two images that agree are no proof


def test_paired_errors_are_those_of_simulated_test_sets():
    """Their standard deviation, over many draws of the images: of one set, and of a photo's five severities."""
    rng = np.random.default_rng(0)
    changes, errors = {"val": [], "Corruption": []}, {"val": [], "Corruption": []}
    for _ in range(100):
        hard = rng.random((120, 1))
        decided = [hard + 0.4 * rng.normal(size=(120, 6)) < level for level in (0.5, 0.55)]
        keys = ["val", *(f"corruption/fog/{severity}" for severity in range(1, 6))]
        cells = {key: [in_order(*row[:, place].tolist()) for row in decided] for place, key in enumerate(keys)}
        for each in report.differences(report_of(cells, ["a", "b"]))["b"]:
            changes[each.name].append(each.change)
            errors[each.name].append(each.error)
    for name in changes:
        assert statistics.fmean(errors[name]) == pytest.approx(statistics.stdev(changes[name]), rel=0.2)


def test_a_share_of_varying_size_has_an_error_too():
    cues = [result(50.0, n=100, cues=(80, 30, 30)), result(50.0, n=100, cues=(80, 45, 15))]
    found = {each.name: each for each in report.differences(report_of({"stylized": cues}, ["a", "b"]))["b"]}
    assert found["Shape bias"].change == 25.0 and 4 < found["Shape bias"].error < 9
    none = report_of({"stylized": [result(0.0, n=4, cues=(4, 0, 0)), CUES[0]]}, ["a", "b"])
    assert "Shape bias" not in [each.name for each in report.differences(none)["b"]]  # no decision for either
    assert "| – |" in report.table(none)


# Notes


def test_a_partial_corruption_mean_and_resized_images_are_mentioned():
    made = report_of({f"corruption/{name}/{severity}": [50.0] for name in STANDARD for severity in range(1, 6)})
    assert "(" not in report.table(made) and "partial" not in str(report.notes(made))
    del made["cells"]["corruption/fog/3"]
    assert "| Corruption (partial) |" in report.table(made)
    (note,) = report.notes(made)
    assert "1 of 75 are missing (fog/3" in note and "14800 images, CenterCrop(28), 74 corruptions × severities" in note
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
    made["cells"]["set/cues"]["results"][0] = result(50.0, n=4, cues=(3, 1, 2))
    assert "; Shape bias over the 3 of these images whose cues are two classes of the head" in report.notes(made)[0]


def test_a_severity_of_fewer_images_is_partial():
    whole = {f"corruption/{name}/{severity}": [50.0] for name in STANDARD for severity in range(1, 6)}
    made = report_of(whole | {"corruption/fog/3": [result(50.0, n=100)]})
    assert report.missing(made) == ["fog/3 with 100 of 200 images"] and "Corruption (partial)" in report.table(made)
    assert "1 of 75 are missing (fog/3 with 100 of 200 images" in str(report.notes(made))
    extra = report_of(whole | {"corruption/spatter/3": [result(50.0, n=100)]})
    assert report.missing(extra) == []  # it is in no mean


def test_every_line_tells_classes_images_folder_and_formats_left_out():
    made = report_of({"val": [result(50.0, {"n02": (2, 5), "n01": (1, 9)})], "sketch": [result(5.0, {"n01": (1, 9)})]})
    made["cells"]["val"]["left_out"], made["cells"]["sketch"]["warning"] = "3 .avif", "1 of the head's 2 classes …"
    val, sketch = report.notes(made)
    usual = "images, Resize(32), CenterCrop(28)"
    assert val == f"val: 14 {usual}, in /data/val, 2 of 2 classes with 5–9 images each; formats left out: 3 .avif"
    assert sketch.startswith(f"Sketch: 9 {usual}, in /data/sketch, 1 of 2 classes with 9 images each; unexpected: 1 of")
    assert "| val | Sketch (1 of 2 classes) |" in report.table(made)
    assert "taken to be those of X" in report.notes(made | {"classes_from": "those of X"})[-1]


# Classes

ROWS = ["plain", "patch", "patch"]
VAL = [
    result(65, {"cat": (5, 10), "dog": (8, 10)}),
    result(60, {"cat": (6, 10), "dog": (6, 10)}),
    result(60, {"cat": (8, 10), "dog": (4, 10)}),
]


def test_class_differences_are_means_over_the_runs_of_a_row():
    cat, dog = report.class_differences(report_of({"val": VAL}, ROWS), [report.Part("val")], "plain", "patch")
    assert (cat.name, cat.base, cat.other) == ("cat", 50, 70) and cat.change == pytest.approx(20)
    assert (dog.name, dog.base, dog.other) == ("dog", 80, 50) and dog.change == pytest.approx(-30)
    effects = [0] * 5 + [1, 0.5, 0.5, 0, 0]  # of the ten cats on the mean of the two runs
    assert cat.error == pytest.approx(10 * (sum((effect - 0.2) ** 2 for effect in effects) + 1) ** 0.5)
    back = report.class_differences(report_of({"val": VAL}, ROWS), [report.Part("val")], "patch", "plain")
    assert [each.name for each in back] == ["dog", "cat"] and back[0].change == pytest.approx(30)


def test_class_differences_of_corruptions_weigh_each_set_equally():
    half, none, all_ = (result(0, {"cat": counts}) for counts in ((5, 10), (0, 2), (2, 2)))
    cells = {"fog/1": [half, half], "snow/5": [none, all_], "spatter/1": [none, all_]}  # the last is in no mean
    made = report_of({f"corruption/{key}": results for key, results in cells.items()}, ["a", "b"])
    (cat,) = report.class_differences(made, report.columns(made)["Corruption"], "a", "b")
    assert (cat.base, cat.other) == (25, 75)


def test_classes_are_sorted_from_helped_to_harmed():
    one, three = (result(25, {"dog": (hits, 4)}) for hits in (1, 3))
    cells = {
        "val": [result(50, {"cat": (a, 4), "dog": (b, 4)}) for a, b in ((1, 3), (3, 1))],
        "rendition": [one, three],
        "corruption/spatter/1": [one, three],  # an extra one alone has no mean
    }
    assert report.by_class_table(report_of(cells, ["plain", "patch"])).splitlines() == [
        "patch against plain, by class (± one standard error)",
        "| class | val | Rendition |",
        "|---|---|---|",
        "| cat | 25.0 → 75.0 (+50.0±35.4) | – |",
        "| dog | 75.0 → 25.0 (-50.0±35.4) | 25.0 → 75.0 (+50.0±35.4) |",
    ]
