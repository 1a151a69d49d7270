"""The tables of an evaluation in Markdown and LaTeX, per-class accuracy changes, and notes on the columns."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moco.errors import UsageError
from moco.evaluation import scores, testsets
from moco.evaluation.testsets import SUITES

SHARED = ", shared classes"  # a second column: decisions among the classes of the set only
CUES = {"Shape bias": "shape_bias", "Shape accuracy": "shape_decisions", "Texture accuracy": "texture_decisions"}
SETTINGS = ("model", "K", "alpha")  # the first columns
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
)

# Figures


def titles(report: Mapping) -> dict[str, str]:
    """{suite or set/<name>: title} of the test sets in a report, in the order of the columns."""
    suites = {suite: SUITES[suite].title for suite in SUITES if cells_of(report, suite)}
    prefix = f"{testsets.FURTHER}/"
    return suites | {key: key.removeprefix(prefix) for key in report["cells"] if key.startswith(prefix)}


def cells_of(report: Mapping, suite: str) -> list[dict]:
    """The cells of a suite, or the one of this key."""
    return [cell for key, cell in report["cells"].items() if key == suite or key.startswith(f"{suite}/")]


def rows_of(report: Mapping) -> dict[str, list[int]]:
    """{row: indices of its runs}."""
    rows: dict[str, list[int]] = {}
    for run, checkpoint in enumerate(report["checkpoints"]):
        rows.setdefault(checkpoint["row"], []).append(run)
    return rows


def figures(report: Mapping, run: int) -> dict[str, float]:
    """{column: figure} of the run-th checkpoint: the published table's columns, then the others, further sets last."""
    results = {key: cell["results"][run] for key, cell in report["cells"].items()}
    top1 = {key: result["top1"] for key, result in results.items() if key.startswith("corruption/")}
    corruption = scores.corruption_figures(top1, len(report["wnids"]))
    table, shared, cues, further = {}, {}, {}, {}
    for key, title in titles(report).items():
        if key == "corruption":
            table |= {title: corruption.pop(title)} if title in corruption else {}
        elif key in SUITES:
            table[title] = results[key]["top1"]
            if SUITES[key].shared_classes:
                shared[title + SHARED] = results[key]["top1_shared_classes"]
            cues |= _cue_figures(results[key], "" if key == "stylized" else f"{title}: ")
        else:
            further |= {title: results[key]["top1"], title + SHARED: results[key]["top1_shared_classes"]}
            further |= _cue_figures(results[key], f"{title}: ")
    return table | shared | corruption | cues | further


def _cue_figures(result: Mapping, prefix: str) -> dict[str, float]:
    """Shape bias, shape accuracy and texture accuracy in percent, if file names give both classes."""
    if result.get("shape_bias") is None:
        return {}
    n = result.get("conflicts", result["n"])
    percents = result | {key: 100 * result[key] / n for key in list(CUES.values())[1:] if key in result}
    return {prefix + title: percents[key] for title, key in CUES.items() if key in percents}


def check_set_name(name: str, others: Iterable[str]) -> None:
    """Raise UsageError unless `name` can be a column of the table beside the built-in ones and `others`."""
    built_in = [*SUITES, *(suite.title for suite in SUITES.values()), *CUES, scores.EXTRA, scores.MCE, *SETTINGS]
    same = next((each for each in [*others, *built_in] if each.casefold() == name.casefold()), None)
    if same is not None:
        raise UsageError(f"--set {name}=…: there is a column {same} already; use another name")
    if not re.fullmatch(r"\w[\w .+-]{0,39}", name):
        raise UsageError(f"--set {name}=…: a name is up to 40 letters, digits, spaces and . + - _")


def by_row(report: Mapping) -> dict[str, dict[str, list[float]]]:
    """{row: {column: a figure per run}}, without a shared-classes column that repeats the set's own in every row."""
    rows: dict[str, dict[str, list[float]]] = {}
    for run, checkpoint in enumerate(report["checkpoints"]):
        for column, figure in figures(report, run).items():
            rows.setdefault(checkpoint["row"], {}).setdefault(column, []).append(figure)

    def repeated(column: str) -> bool:
        own = column.removesuffix(SHARED)
        return own != column and all(row.get(column) == row.get(own) for row in rows.values())

    return {name: {column: row[column] for column in row if not repeated(column)} for name, row in rows.items()}


def missing(report: Mapping) -> list[str]:
    """The standard corruptions and severities that a report on corruptions lacks."""
    return testsets.missing_corruptions(report["cells"]) if cells_of(report, "corruption") else []


def resized(report: Mapping) -> list[str]:
    """The corruptions and severities whose images do not have the size of the crop, as published ones do."""
    cells = {key.partition("/")[2]: cell for key, cell in report["cells"].items() if key.startswith("corruption/")}
    return [key for key, cell in cells.items() if "Resize" in cell["preprocessing"]]


def mean_std(runs: Sequence[float]) -> str:
    """The mean and, with several runs, their sample standard deviation."""
    return f"{statistics.fmean(runs):.2f}" + (f"±{statistics.stdev(runs):.2f}" if len(runs) > 1 else "")


def mean_top1(cell: Mapping, runs: Iterable[int]) -> float:
    return statistics.fmean(cell["results"][run]["top1"] for run in runs)


def setting(report: Mapping, runs: Iterable[int], name: str) -> str:
    """A pre-training option of a row's runs; "–" if there is none or the files do not store it."""
    values = {report["checkpoints"][run][name] for run in runs}
    return ", ".join(f"{value:g}" for value in sorted(values - {None})) or "–"


# Tables


def markdown(grid: Iterable[Sequence[str]]) -> str:
    """A Markdown table of these lines of cells, the header first."""
    header, *rows = grid
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def table(report: Mapping, width: int | None = None) -> str:
    """A Markdown table of top-1 in percent, one row per row name.

    width: of the terminal. If the table is wider, models become columns, where that is narrower.
    """
    grid = _grid(report)
    usual, transposed = markdown(grid), markdown(zip(*grid))
    widest = [max(map(len, text.splitlines())) for text in (usual, transposed)]
    return transposed if width is not None and widest[0] > max(width, widest[1]) else usual


def _grid(report: Mapping) -> list[list[str]]:
    """The cells of the table, line by line, its header first."""
    rows = by_row(report)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    grid = [[*SETTINGS, *(_header(report, column) for column in columns)]]
    for name, runs in rows_of(report).items():
        figures = (mean_std(rows[name][column]) if column in rows[name] else "–" for column in columns)
        grid.append([name, setting(report, runs, "moco_k"), setting(report, runs, "alpha"), *figures])
    return grid


def _header(report: Mapping, column: str) -> str:
    marks = []
    if column == SUITES["corruption"].title:
        marks = ["partial"] * bool(missing(report)) + ["resized"] * bool(resized(report))
    for key, title in titles(report).items():
        if column == title or column.startswith(f"{title}: "):
            categories = report["cells"].get(key, {}).get("categories")
            marks += [f"{len(categories)} of 16 categories"] if categories else []
    return f"{column} ({', '.join(marks)})" if marks else column


def latex(report: Mapping) -> str:
    """The table for LaTeX, with booktabs; the best accuracy of each column is bold if there are several rows."""
    header, *rows = _grid(report)
    best = [_best(title, column) for title, column in zip(header, zip(*rows))]
    lines = [" & ".join(title.translate(LATEX) for title in header) + r" \\", r"\midrule"]
    for row in rows:
        bold = (r"\textbf{%s}" if cell in own else "%s" for cell, own in zip(row, best))
        lines.append(" & ".join(form % cell.translate(LATEX) for form, cell in zip(bold, row)) + r" \\")
    begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}  % \usepackage{{booktabs}}"
    return "\n".join([begin, r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"])


def _best(title: str, cells: Sequence[str]) -> list[str]:
    """The cells of a column that are bold, by the mean as printed; [] where none is better than another."""
    means = {cell: float(cell.split("±")[0]) for cell in cells if cell != "–" and title not in SETTINGS}
    if len(means) < 2 or any(cue in title for cue in CUES):
        return []
    best = min(means.values()) if title == scores.MCE else max(means.values())
    return [cell for cell, mean in means.items() if mean == best]


# Lines below the table


def differences(report: Mapping) -> list[str]:
    """A line per later row: its difference to the first row, in percentage points."""
    (base, reference), *others = by_row(report).items()
    return [
        f"{name} against {base}: "
        + ", ".join(
            f"{column} {statistics.fmean(runs) - statistics.fmean(reference[column]):+.2f}"
            for column, runs in row.items()
            if column in reference
        )
        for name, row in others
    ]


def notes(report: Mapping) -> list[str]:
    """A line per column: its images and preprocessing, and what is unexpected or missing."""
    limit = f"partial evaluation: only the first {report['limit']} images of each class (--limit)"
    return [_note(report, suite, title) for suite, title in titles(report).items()] + [limit] * bool(report["limit"])


def _note(report: Mapping, suite: str, title: str) -> str:
    cells = cells_of(report, suite)
    preprocessing = "; ".join(dict.fromkeys(cell["preprocessing"] for cell in cells))
    line = f"{title}: {sum(cell['n'] for cell in cells)} images, {preprocessing}"
    if suite == "corruption":
        line += f", {len(cells)} corruptions × severities"
        if missing(report):
            line += f"; partial, {len(missing(report))} of 75 are missing ({', '.join(missing(report)[:3])}, …)"
        if resized(report):
            line += f"; RESIZED: {len(resized(report))} of these have images of another size than ImageNet-C's"
    if categories := cells[0].get("categories"):
        line += f", decided between {len(categories)} of 16 categories ({', '.join(categories)}) by mean probability"
    if suite != "corruption" and (conflicts := cells[0]["results"][0].get("conflicts", cells[0]["n"])) < cells[0]["n"]:
        line += f"; Shape bias over the {conflicts} of these images whose cues are two different classes of the head"
    odd = next((cell["warning"] for cell in cells if cell["warning"]), "")
    return line + (f"; unexpected: {odd}" if odd and not report["limit"] else "")


# Classes


class ClassDifference(NamedTuple):
    """One class under two rows of a report. Accuracies are top-1 in percent, means over the runs of a row."""

    wnid: str
    base: float
    top1: float
    change: float  # top1 - base
    error: float  # one standard error of `change`, from the number of images, taken as independent


def class_differences(report: Mapping, suite: str, base: str, row: str) -> list[ClassDifference]:
    """Each class under the rows `base` and `row`, from the most helped to the most harmed.

    suite: "val", "corruption", …, a further set's name, or the key of one test set; of the corruptions, the standard
    ones count, each with the same weight. Raises UsageError if the report has no such row or suite.
    """
    rows = rows_of(report)
    for name in (base, row):
        if name not in rows:
            raise UsageError(f"no row {name}; the rows are {', '.join(rows)}")
    cells = _class_cells(report, suite)
    if not cells:
        raise UsageError(f"no test set {suite}; there are {', '.join(titles(report))}")
    changes = []
    for wnid in dict.fromkeys(wnid for cell in cells for wnid in cell["results"][0]["classes"]):
        classes = [[result["classes"].get(wnid) for result in cell["results"]] for cell in cells]
        counts = [runs for runs in classes if runs[0]]  # the test sets that have this class
        before, after = (
            statistics.fmean(100 * runs[run]["correct"] / runs[run]["n"] for runs in counts for run in rows[name])
            for name in (base, row)
        )
        n = max(runs[0]["n"] for runs in counts)  # of the largest of them
        error = (sum(mean * (100 - mean) for mean in (before, after)) / n) ** 0.5
        changes.append(ClassDifference(wnid, before, after, after - before, error))
    return sorted(changes, key=lambda each: (-each.change, each.wnid))


def _class_cells(report: Mapping, suite: str) -> list[dict]:
    """The cells whose classes count for a suite, a further set's name, or a key; [] if there are none."""
    if suite == "corruption":
        return [cell for name in testsets.STANDARD for cell in cells_of(report, f"corruption/{name}")]
    return cells_of(report, suite) or cells_of(report, f"{testsets.FURTHER}/{suite}")


def by_class_table(report: Mapping) -> str:
    """A Markdown table for each later row: its per-class accuracy change against the first row.

    A column per test set: top-1 in percent of the first row → that of the other, and the difference in points. Classes
    are sorted by the difference in the first column.
    """
    base, *others = rows_of(report)
    suites = {title: suite for suite, title in titles(report).items() if _class_cells(report, suite)}
    lines = []
    for row in others:
        found = {title: class_differences(report, suite, base, row) for title, suite in suites.items()}
        errors = (f"{title} {max(each.error for each in classes):.1f}" for title, classes in found.items())
        lines.append(f"{row} against {base}, by class; largest standard error, in points: {', '.join(errors)}")
        columns = [
            {each.wnid: f"{each.base:.1f} → {each.top1:.1f} ({each.change:+.1f})" for each in classes}
            for classes in found.values()
        ]
        names = dict.fromkeys(name for column in columns for name in column)
        grid = [[name, *(column.get(name, "–") for column in columns)] for name in names]
        lines.append(markdown([["class", *suites], *grid]))
    return "\n".join(lines)
