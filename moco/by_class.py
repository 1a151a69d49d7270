"""What a row does to each class, against another row."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moco import testsets
from moco.errors import UsageError
from moco.report import TITLES, further_sets, markdown


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


def table(report: Mapping) -> str:
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
            tables += [_caption(base, row, found), markdown(_grid(found))]
    return "\n".join(tables)


def _counted(report: Mapping, suite: str) -> bool:
    """Whether a suite has a mean: the extra corruptions alone have none."""
    if suite == "corruption":
        return any(key.split("/")[1] in testsets.STANDARD for key in report["cells"] if key.startswith("corruption/"))
    return suite in report["cells"]


def _caption(base: str, row: str, found: Mapping[str, Sequence[ClassDifference]]) -> str:
    errors = (f"{title} {max(each.error for each in classes):.1f}" for title, classes in found.items())
    return (
        f"{row} against {base}, by class; one standard error of a difference is up to, in points: {', '.join(errors)}"
    )


def _grid(found: Mapping[str, Sequence[ClassDifference]]) -> list[list[str]]:
    columns = {
        title: {each.wnid: f"{each.base:.1f} → {each.top1:.1f} ({each.change:+.1f})" for each in classes}
        for title, classes in found.items()
    }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [
        ["class", *columns],
        *([name, *(column.get(name, "–") for column in columns.values())] for name in names),
    ]
