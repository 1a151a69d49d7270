"""What an evaluation prints and draws: the Markdown table, the comparison with the paper, a plot."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moco.errors import UsageError
from moco.evaluation import scores, testsets
from moco.evaluation.testsets import TestSet

TITLES = {
    "val": "val",
    "corruption": "Corruption",
    "sketch": "Sketch",
    "stylized": "Stylized",
    "rendition": "Rendition",
}
SHARED = ", shared classes"  # a second column: decisions among the classes of the set only
CUES = ("Shape bias", "Shape accuracy", "Texture accuracy")
EXTRA, MCE = "Corruption, extra four", "mCE"
SETTINGS = ("model", "K", "alpha")  # the first columns
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)

# Figures


def figures(report: Mapping, run: int) -> dict[str, float]:
    """{column: figure} of the run-th checkpoint: the published table's columns, then the others, further sets last."""
    results = {key: cell["results"][run] for key, cell in report["cells"].items()}
    top1 = {key: result["top1"] for key, result in results.items() if key.startswith("corruption/")}
    corruption = scores.corruption_figures(top1, len(report["wnids"]))
    table = {}
    for suite, title in TITLES.items():
        if suite in results:
            table[title] = results[suite]["top1"]
        elif suite == "corruption" and title in corruption:
            table[title] = corruption.pop(title)
    if "rendition" in results:
        table[TITLES["rendition"] + SHARED] = results["rendition"]["top1_shared_classes"]
    table |= corruption
    for suite, title in TITLES.items():
        if suite in results:
            table |= _cue_figures(results[suite], "" if suite == "stylized" else f"{title}: ")
    for key, name in further_sets(report).items():
        table |= {name: results[key]["top1"], name + SHARED: results[key]["top1_shared_classes"]}
        table |= _cue_figures(results[key], f"{name}: ")
    return table


def _cue_figures(result: Mapping, prefix: str) -> dict[str, float]:
    """Shape bias, shape accuracy and texture accuracy in percent, if the set tells both cues."""
    if result.get("shape_bias") is None:
        return {}
    n = result.get("conflicts", result["n"])
    return {
        prefix + CUES[0]: result["shape_bias"],
        **{
            prefix + title: 100 * result[decisions] / n
            for title, decisions in zip(CUES[1:], ("shape_decisions", "texture_decisions"))
            if decisions in result
        },
    }


def further_sets(report: Mapping) -> dict[str, str]:
    """{key: name} of the sets that are no column of the published table."""
    prefix = f"{testsets.FURTHER}/"
    return {key: key.removeprefix(prefix) for key in report["cells"] if key.startswith(prefix)}


def check_set_name(name: str, others: Iterable[str]) -> None:
    """Raise UsageError unless `name` can be a column of the table beside the built-in ones and `others`."""
    built_in = [*TITLES, *TITLES.values(), *CUES, EXTRA, MCE, *SETTINGS]
    same = next((each for each in [*others, *built_in] if each.casefold() == name.casefold()), None)
    if same is not None:
        kind = "a further set" if same in others else "a column of the table"
        raise UsageError(f"--set {name}=…: {same} is {kind} already; use another name")
    if not re.fullmatch(r"\w[\w .+-]*", name) or len(name) > 40:
        raise UsageError(
            f"--set {name}=…: a name is up to 40 letters, digits, spaces and . + - _, as in --set imagenet-a=DIR"
        )


def by_row(report: Mapping) -> dict[str, dict[str, list[float]]]:
    """{row: {column: a figure per run}}, without a shared-classes column that repeats the set's own in every row."""
    rows = {}
    for run, checkpoint in enumerate(report["checkpoints"]):
        for column, figure in figures(report, run).items():
            rows.setdefault(checkpoint["row"], {}).setdefault(column, []).append(figure)
    for column in [column for column in next(iter(rows.values()), {}) if column.endswith(SHARED)]:
        if all(row.get(column) == row.get(column.removesuffix(SHARED)) for row in rows.values()):
            for row in rows.values():
                row.pop(column, None)
    return rows


def missing(report: Mapping) -> list[str]:
    """The standard corruptions and severities that a report on corruptions lacks."""
    keys = [key for key in report["cells"] if key.startswith("corruption/")]
    return testsets.missing_corruptions(keys) if keys else []


def mean_std(runs: Sequence[float]) -> str:
    """The mean and, with several runs, their sample standard deviation."""
    mean = f"{statistics.fmean(runs):.2f}"
    return f"{mean}±{statistics.stdev(runs):.2f}" if len(runs) > 1 else mean


def setting(report: Mapping, row: str, name: str) -> str:
    """A pre-training option of a row's runs; "–" if there is none or the files do not store it."""
    values = {checkpoint[name] for checkpoint in report["checkpoints"] if checkpoint["row"] == row}
    return ", ".join(f"{value:g}" for value in sorted(values - {None})) or "–"


# Text


def table(report: Mapping, width: int | None = None) -> str:
    """A Markdown table of top-1 in percent, one row per row name.

    width: of the terminal. If the table is wider, models become columns, in as many tables as it takes.
    """
    return "\n".join(markdown(part) for part in _fit(_grid(report), width))


def _grid(report: Mapping) -> list[list[str]]:
    """The cells of the table, line by line, its header first."""
    rows = by_row(report)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    titles = [_title(report, column) for column in columns]
    return [[*SETTINGS, *titles]] + [
        [
            name,
            setting(report, name, "moco_k"),
            setting(report, name, "alpha"),
            *(mean_std(row[column]) if column in row else "–" for column in columns),
        ]
        for name, row in rows.items()
    ]


def latex(report: Mapping) -> str:
    """The table for LaTeX, with booktabs; the best accuracy of each column is bold if there are several rows."""
    header, *rows = _grid(report)
    best = [_best(title, [row[index] for row in rows]) for index, title in enumerate(header)]
    lines = [
        [rf"\textbf{{{_escape(cell)}}}" if cell in cells else _escape(cell) for cell, cells in zip(row, best)]
        for row in rows
    ]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}  % \usepackage{{booktabs}}",
            r"\toprule",
            " & ".join(map(_escape, header)) + r" \\",
            r"\midrule",
            *(" & ".join(line) + r" \\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _best(title: str, cells: Sequence[str]) -> list[str]:
    """Those of a column's cells that are bold, by the mean as printed; [] where none is better than another."""
    means = {cell: float(cell.split("±")[0]) for cell in cells if cell != "–" and title not in SETTINGS}
    if len(means) < 2 or any(cue in title for cue in CUES):
        return []
    best = min(means.values()) if title == MCE else max(means.values())
    return [cell for cell, mean in means.items() if mean == best]


def _escape(text: str) -> str:
    return text.translate(LATEX)


def _title(report: Mapping, column: str) -> str:
    marks = []
    if column == TITLES["corruption"]:
        marks = ["partial"] * bool(missing(report)) + ["resized"] * bool(resized(report))
    for key, name in further_sets(report).items():
        categories = report["cells"][key].get("categories")
        if categories and (column == name or column.startswith(f"{name}: ")):
            marks = [f"{len(categories)} of 16 categories"]
    return f"{column} ({', '.join(marks)})" if marks else column


def resized(report: Mapping) -> list[str]:
    """The corruptions and severities whose images do not have the size of the crop, as published ones do."""
    return [
        key.removeprefix("corruption/")
        for key, cell in report["cells"].items()
        if key.startswith("corruption/") and "Resize" in cell["preprocessing"]
    ]


def _fit(grid: list[list[str]], width: int | None) -> list[list[list[str]]]:
    """The grid as it is if its lines fit the width; else its transpose, cut into pieces that fit."""
    if width is None or max(map(len, markdown(grid).splitlines())) <= width:
        return [grid]
    header, *models = grid
    parts = [[model] for model in models[:1]]
    for model in models[1:]:
        candidate = [list(column) for column in zip(header, *parts[-1], model)]
        if max(map(len, markdown(candidate).splitlines())) <= width:
            parts[-1].append(model)
        else:
            parts.append([model])
    return [[list(column) for column in zip(header, *part)] for part in parts]


def markdown(grid: list[list[str]]) -> str:
    """A Markdown table of these lines of cells, the header first."""
    lines = [f"| {' | '.join(row)} |" for row in grid]
    return "\n".join([lines[0], "|" + "---|" * len(grid[0]), *lines[1:]])


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
    titles = TITLES | further_sets(report)
    lines = [_note(report, suite, title) for suite, title in titles.items() if cells_of(report, suite)]
    if report.get("not_evaluated"):
        lines.append(not_evaluated(report["not_evaluated"]))
    if report["limit"]:
        lines.append(f"partial evaluation: only the first {report['limit']} images of each class (--limit)")
    return lines


def cells_of(report: Mapping, suite: str) -> list[dict]:
    """The test sets of a suite, or the one of this key, as they stand in the report."""
    return [cell for key, cell in report["cells"].items() if key == suite or key.startswith(f"{suite}/")]


def _note(report: Mapping, suite: str, title: str) -> str:
    cells = cells_of(report, suite)
    preprocessing = "; ".join(dict.fromkeys(cell["preprocessing"] for cell in cells))
    line = f"{title}: {sum(cell['n'] for cell in cells)} images, {preprocessing}"
    if suite == "corruption":
        line += f", {len(cells)} corruptions × severities"
        if missing(report):
            line += f"; partial, {len(missing(report))} of 75 are missing ({', '.join(missing(report)[:3])}, …)"
        if resized(report):
            line += (
                f"; RESIZED: images of {len(resized(report))} of these do not have the crop's"
                f" {report['image_size']} px, so the figure is not comparable with ImageNet-C's"
            )
    if suite == "stylized" and "Resize" not in preprocessing:
        line += " (not resized: the images have the crop's size already)"
    if categories := cells[0].get("categories"):
        line += f", decided between {len(categories)} of 16 categories ({', '.join(categories)}) by mean probability"
    if suite != "corruption" and (conflicts := cells[0]["results"][0].get("conflicts", cells[0]["n"])) < cells[0]["n"]:
        line += f"; {CUES[0]} over the {conflicts} of these images whose cues are two different classes of the head"
    odd = next((cell["warning"] for cell in cells if cell["warning"]), "")
    return line + (f"; unexpected: {odd}" if odd and not report["limit"] else "")


def unusual_preprocessing(report: Mapping, test_set: TestSet, image_size: int) -> str:
    """A line on a finished set whose images do not have the published size; "" if they do."""
    used, usual = report["cells"][test_set.key]["preprocessing"], test_set.preprocessing(image_size)
    return "" if used == usual else f"{test_set.key}: images of another size than the published {usual} takes: {used}"


def not_evaluated(folders: Sequence[str], count: int = 20) -> str:
    more = f" and {len(folders) - count} more" if len(folders) > count else ""
    return f"not evaluated, since ImageNet-C has no such corruption or severity: {', '.join(folders[:count])}{more}"


# ---- by_class: What a row does to each class, against another row.


class ClassDifference(NamedTuple):
    """One class under two rows of a report. Accuracies are top-1 in percent, means over the runs of a row."""

    wnid: str
    n: int  # images; of a suite with several test sets, those of the largest
    base: float
    top1: float
    error: float  # one standard error of `change`, from the number of images, taken as independent

    @property
    def change(self) -> float:
        return self.top1 - self.base


def class_differences(report: Mapping, suite: str, base: str, row: str) -> list[ClassDifference]:
    """Each class under the rows `base` and `row`, from the most helped to the most harmed.

    suite: "val", "corruption", …, a further set's name, or the key of one test set; of the corruptions, the standard
    ones count, each with the same weight. Raises UsageError if the report has no such row or suite.
    """
    runs = [checkpoint["row"] for checkpoint in report["checkpoints"]]
    for name in (base, row):
        if name not in runs:
            raise UsageError(f"no row {name}; the rows are {', '.join(dict.fromkeys(runs))}")
    cells = _class_cells(report, suite)
    changes = []
    for wnid in dict.fromkeys(wnid for cell in cells for wnid in cell["results"][0]["classes"]):
        counts = [[result["classes"][wnid] for result in cell["results"]] for cell in cells if _has(cell, wnid)]
        means = [
            statistics.fmean(
                count["correct"] / count["n"] for cell in counts for run, count in zip(runs, cell) if run == name
            )
            for name in (base, row)
        ]
        n = max(cell[0]["n"] for cell in counts)
        error = 100 * (sum(mean * (1 - mean) for mean in means) / n) ** 0.5
        changes.append(ClassDifference(wnid, n, *(100 * mean for mean in means), error))
    return sorted(changes, key=lambda each: (-each.change, each.wnid))


def _class_cells(report: Mapping, suite: str) -> list[dict]:
    """The cells whose classes count for a suite. Raises UsageError if there are none."""
    further = further_sets(report)
    keys = [key for key in report["cells"] if suite in (key, further.get(key)) or key.startswith(suite + "/")]
    if suite == "corruption":
        keys = [key for key in keys if key.split("/")[1] in testsets.STANDARD]
    if not keys:
        suites = dict.fromkeys(
            further.get(key, "corruption" if key.startswith("corruption/") else key) for key in report["cells"]
        )
        raise UsageError(f"no test set {suite}; there are {', '.join(suites)}")
    return [report["cells"][key] for key in keys]


def _has(cell: Mapping, wnid: str) -> bool:
    return wnid in cell["results"][0]["classes"]


def by_class_table(report: Mapping) -> str:
    """Markdown tables of what each later row does to each class, against the first row.

    A column per test set: top-1 in percent of the first row → that of the other, and the difference in points. Classes
    are sorted by the difference in the first column. A set of categories has a table of its own.
    """
    base, *others = dict.fromkeys(checkpoint["row"] for checkpoint in report["checkpoints"])
    titles = {suite: title for suite, title in (TITLES | further_sets(report)).items() if _counted(report, suite)}
    alone = [suite for suite in titles if report["cells"].get(suite, {}).get("categories")]
    together = [suite for suite in titles if suite not in alone]
    tables = []
    for row in others:
        for suites in filter(None, [together, *([suite] for suite in alone)]):
            found = {titles[suite]: class_differences(report, suite, base, row) for suite in suites}
            tables += [_by_class_caption(base, row, found), markdown(_by_class_grid(found))]
    return "\n".join(tables)


def _counted(report: Mapping, suite: str) -> bool:
    """Whether a suite has a mean: the extra corruptions alone have none."""
    if suite == "corruption":
        return any(key.split("/")[1] in testsets.STANDARD for key in report["cells"] if key.startswith("corruption/"))
    return suite in report["cells"]


def _by_class_caption(base: str, row: str, found: Mapping[str, Sequence[ClassDifference]]) -> str:
    errors = (f"{title} {max(each.error for each in classes):.1f}" for title, classes in found.items())
    return (
        f"{row} against {base}, by class; one standard error of a difference is up to, in points: {', '.join(errors)}"
    )


def _by_class_grid(found: Mapping[str, Sequence[ClassDifference]]) -> list[list[str]]:
    columns = {
        title: {each.wnid: f"{each.base:.1f} → {each.top1:.1f} ({each.change:+.1f})" for each in classes}
        for title, classes in found.items()
    }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [
        ["class", *columns],
        *([name, *(column.get(name, "–") for column in columns.values())] for name in names),
    ]
