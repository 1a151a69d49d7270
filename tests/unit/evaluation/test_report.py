"""The report of an evaluation: what its table, comparison and JSON say of results that are known."""

import json
import statistics

import pytest

from moco import plot
from moco.errors import UsageError
from moco.evaluation import paper, report, results
from moco.evaluation.testsets import STANDARD, TestSet

WNIDS = ["n01", "n02"]


def result(top1, **more):
    return {"top1": top1, "top1_shared_classes": top1 + 1, "n": 4, "classes": {}} | more


def make(tmp_path, rows, cells, limit=None):
    """A report on {name: number of runs}; cells: {key: top-1 of each run, or results}."""
    files = {name: [str(tmp_path / f"{name}{i}.pth") for i in range(runs)] for name, runs in rows.items()}
    for path in (path for paths in files.values() for path in paths):
        with open(path, "w") as file:
            file.write(path)
    plain, patch = {"moco_k": 16384, "alpha": 2.0, "num_nonsem": 0}, {"moco_k": 16384, "alpha": 2.0, "num_nonsem": 1}
    pretraining = [{"plain": plain, "patch": patch}.get(name, {}) for name, paths in files.items() for _ in paths]
    made = results.new(files, pretraining, WNIDS, 28, limit)
    for key, values in cells.items():
        results.add(
            made,
            TestSet(key, f"/data/{key}", ["x"] * 4, [0, 0, 1, 1]),
            [value if isinstance(value, dict) else result(value) for value in values],
            28,
            WNIDS,
        )
    return made


def test_rows_are_the_mean_and_sample_std_of_their_runs(tmp_path):
    made = make(tmp_path, {"a": 3, "b": 1}, {"val": [70.0, 71.0, 75.0, 60.0], "sketch": [1.0, 2.0, 3.0, 4.0]})
    assert report.table(made).splitlines() == [
        "| model | K | alpha | val | Sketch |",
        "|---|---|---|---|---|",
        f"| a | – | – | 72.00±{statistics.stdev([70, 71, 75]):.2f} | 2.00±1.00 |",
        "| b | – | – | 60.00 | 4.00 |",
    ]
    assert report.differences(made) == ["b against a: val -12.00, Sketch +2.00"]


def test_rows_tell_the_queue_and_alpha_of_their_pretraining(tmp_path):
    lines = report.table(make(tmp_path, {"plain": 1, "patch": 2}, {"val": [1.0, 2.0, 2.0]})).splitlines()
    assert lines[2:] == ["| plain | 16384 | – | 1.00 |", "| patch | 16384 | 2 | 2.00±0.00 |"]


def test_columns_are_in_the_published_order_others_follow(tmp_path):
    bias = result(5.0, shape_bias=30.0)
    cells = {
        "stylized": [bias],
        "rendition": [8.0],
        f"corruption/{STANDARD[0]}/1": [7.0],
        "corruption/spatter/1": [50.0],
        "val": [9.0],
    }
    made = make(tmp_path, {"a": 1}, cells)
    assert list(report.figures(made, 0).items()) == [
        ("val", 9.0),
        ("Corruption", 7.0),
        ("Stylized", 5.0),
        ("Rendition", 8.0),
        ("Rendition, shared classes", 9.0),
        ("Corruption, extra four", 50.0),
        ("Shape bias", 30.0),
    ]


def test_a_partial_corruption_mean_says_so(tmp_path):
    some = {f"corruption/{name}/{severity}": [50.0] for name in STANDARD for severity in range(1, 6)}
    assert "partial" not in report.table(make(tmp_path, {"a": 1}, some)) + str(
        report.notes(make(tmp_path, {"a": 1}, some))
    )
    del some["corruption/fog/3"]
    made = make(tmp_path, {"a": 1}, some)
    assert "Corruption (partial)" in report.table(made)
    (note,) = report.notes(made)
    assert "1 of 75 are missing (fog/3" in note and "296 images, CenterCrop(28), 74 corruptions × severities" in note


def test_notes_tell_preprocessing_and_a_limit(tmp_path):
    notes = report.notes(make(tmp_path, {"a": 1}, {"val": [5.0]}, limit=2))
    assert notes == [
        "val: 4 images, Resize(32), CenterCrop(28)",
        "partial evaluation: only the first 2 images of each class (--limit)",
    ]


@pytest.fixture
def complete(monkeypatch):
    """All test sets of a report count as complete."""
    monkeypatch.setattr(paper, "incomplete", lambda made, suite: "" if suite in made["cells"] else "not tested")


def test_comparison_is_in_the_papers_standard_deviations(tmp_path, complete):
    made = make(tmp_path, {"patch-k16384-a2": 1}, {"val": [79.47], "sketch": [30.88]})
    rows = paper.comparison(made).splitlines()
    assert rows[3] == "| patch-k16384-a2, paper | 79.35±0.12 | 31.76±0.88 |"
    assert rows[4] == "| difference in the paper's std | +1.0 | -1.0 |"
    with pytest.raises(UsageError, match="mine is not a row of the published table.*patch-k8192-a2"):
        paper.check_rows(["patch-k16384-a3", "mine"])


def test_published_figures_are_those_of_the_readme():
    readme = (paper.TABLE.parents[2] / "README.md").read_text()
    assert len(paper.paper_rows()) == 9
    for row in paper.paper_rows().values():
        figures = ["{:.2f}±{:.2f}".format(*row[suite]) for suite in report.TITLES]
        if "rendition" in row["note"]:
            figures[-1] += " (?)"
        assert f"| {' | '.join([row['model'], row['moco_k'], row['alpha'] or '–', *figures])} |" in readme


def test_a_comparison_repeats_the_note_on_a_published_row(tmp_path, complete):
    noted, plain = "mocov2-later-k65536", "patch-k16384-a2"
    lines = paper.comparison(make(tmp_path, {noted: 1, plain: 1}, {"rendition": [30.0, 30.0]})).splitlines()
    (line,) = (line for line in lines if line.startswith(f"{noted}: "))
    assert line == f"{noted}: {paper.paper_rows()[noted]['note']}" and "copying error" in line


NAMES = ["patch-k16384-a2", "texture-k16384-a2", "mocov2-k16384"]


def wide_report(tmp_path, runs=3):
    values = [70.0 + run for run in range(len(NAMES) * runs)]
    sets = {"val": values, "sketch": values, "stylized": values, "rendition": values}
    return make(tmp_path, dict.fromkeys(NAMES, runs), sets)


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("width", [80, 60])
def test_a_table_wider_than_the_terminal_is_transposed(tmp_path, width):
    made = wide_report(tmp_path)
    plain = report.table(made).splitlines()
    assert max(map(len, plain)) > width
    narrow = report.table(made, width).splitlines()
    assert max(map(len, narrow)) <= width
    rule = [number for number, line in enumerate(narrow) if line.startswith("|---")]
    parts = [narrow[start - 1 : end] for start, end in zip(rule, [*(number - 1 for number in rule[1:]), None])]
    assert len(parts) == {80: 1, 60: 2}[width]
    models = []  # the columns of the narrow tables are the rows of the wide one
    for part in parts:
        grid = [cells_of(line) for number, line in enumerate(part) if number != 1]
        header, *columns = zip(*grid)
        assert list(header) == cells_of(plain[0])
        models += [list(column) for column in columns]
    assert models == [cells_of(line) for line in plain[2:]]


def test_a_table_that_fits_the_terminal_is_left_as_it_is(tmp_path):
    made = wide_report(tmp_path)
    widest = max(map(len, report.table(made).splitlines()))
    assert report.table(made, widest) == report.table(made) != report.table(made, widest - 1)


def test_shared_classes_are_a_column_only_where_they_differ(tmp_path):
    same, other = result(8.0, top1_shared_classes=8.0), result(9.0, top1_shared_classes=9.5)
    dropped = report.by_row(make(tmp_path, {"a": 1, "b": 1}, {"rendition": [same, same]}))
    assert dropped == {"a": {"Rendition": [8.0]}, "b": {"Rendition": [8.0]}}
    kept = report.by_row(make(tmp_path, {"a": 1, "b": 1}, {"rendition": [same, other]}))
    assert kept == {
        name: {"Rendition": [figures[0]], "Rendition, shared classes": [figures[1]]}
        for name, figures in {"a": (8.0, 8.0), "b": (9.0, 9.5)}.items()
    }


def test_an_interrupted_report_is_continued_and_no_other_is(tmp_path):
    path = tmp_path / "r.json"
    whole = make(tmp_path, {"a": 1}, {"val": [5.0], "sketch": [6.0]})
    results.save(path, whole)
    cells = [TestSet(key, f"/data/{key}", ["x"] * 4, [0, 0, 1, 1]) for key in ("val", "sketch", "rendition")]

    def continued(cells=cells, **settings):
        fresh = make(tmp_path, {"a": 1}, {}, **settings)
        results.reuse_results(path, fresh, cells)
        return fresh["cells"]

    assert continued() == json.loads(json.dumps(whole["cells"]))
    assert continued(limit=1) == {}  # another setting
    assert continued([cells[0]._replace(folder="/elsewhere")]) == {} == continued([cells[0]._replace(labels=[0])])
    (tmp_path / "a0.pth").write_text("trained on")
    changed = results.new({"a": [str(tmp_path / "a0.pth")]}, [{}], WNIDS, 28, None)
    results.reuse_results(path, changed, cells)
    assert changed["cells"] == {}  # another checkpoint of the same name
    path.write_text("half a fi")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        continued()
    results.reuse_results(tmp_path / "nowhere.json", changed, cells)


def test_plot_draws_every_corruption(tmp_path):
    pytest.importorskip("matplotlib")
    cells = {
        f"corruption/{name}/{severity}": [90 - 10.0 * severity, 80.0, 50.0]
        for name in STANDARD[:7]
        for severity in (1, 5)
    }
    plot.corruptions(make(tmp_path, {"a": 2, "b": 1}, cells), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
