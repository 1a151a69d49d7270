"""The tables of an evaluation in Markdown and LaTeX, differences between rows, and notes on the columns.

Corruption: Hendrycks & Dietterich, ICLR 2019. Shape bias: Geirhos et al., ICLR 2019.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moco.errors import printable
from moco.evaluation import scores, testsets
from moco.evaluation.testsets import SUITES

SHARED = ", shared classes"  # a second column: decisions among the classes of the set only
CUES = {
    "Shape bias": ("shape", ("shape", "texture")),
    "Shape accuracy": ("shape", ("conflict",)),
    "Texture accuracy": ("texture", ("conflict",)),
}
EXTRA = "Corruption, extra four"  # a column beside those of the suites
RUNS = 3  # an error is over runs if there are so many
ERRORS = "± after a difference: standard error, over runs if both rows have three, else over images; seeds vary, too"
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


class Part(NamedTuple):
    """A share of a test set's images, in percent, and its weight in a figure, which is a sum of parts."""

    key: str  # of the test set
    mask: str = "correct"  # the images that count …
    among: tuple[str, ...] = ()  # … of those in any of these masks, which do not overlap; of all, if there are none
    weight: float = 1

    def hits(self, report: Mapping, run: int, where: Mapping[str, slice]) -> tuple[np.ndarray, np.ndarray]:
        """Whether each image counts, and whether it is one among which it can. where: {key: the images}, or all."""
        result = report["cells"][self.key]["results"][run]
        base = sum(_mask(result, name) for name in self.among) if self.among else np.ones(result["n"])
        images = where.get(self.key, slice(None))
        return _mask(result, self.mask)[images], base[images]


def _mask(result: Mapping, name: str) -> np.ndarray:
    return scores.unpack(result["masks"][name], result["n"]).astype(float)


def columns(report: Mapping) -> dict[str, list[Part]]:
    """{column: its parts}: the published table's columns, then the others, further sets last."""
    corruption = _corruption_columns(report)
    table, shared, cues, further = {}, {}, {}, {}
    for key, title in titles(report).items():
        if key == "corruption":
            table |= {title: corruption.pop(title)} if title in corruption else {}
            continue
        own, of_shared = {title: [Part(key)]}, {title + SHARED: [Part(key, "correct among shared")]}
        prefix = "" if key == "stylized" else f"{title}: "
        has_cues = "conflict" in report["cells"][key]["results"][0]["masks"]
        of_cues = {prefix + cue: [Part(key, *masks)] for cue, masks in CUES.items() if has_cues}
        if key in SUITES:
            table |= own
            shared |= of_shared if SUITES[key].shared_classes else {}
            cues |= of_cues
        else:
            further |= own | of_shared | of_cues
    return table | shared | corruption | cues | further


def _corruption_columns(report: Mapping) -> dict[str, list[Part]]:
    """The means over the standard corruptions and over the extra four: each severity of each has the same weight."""
    groups = {SUITES["corruption"].title: testsets.STANDARD, EXTRA: testsets.CORRUPTIONS["extra"]}
    found = {title: [p for p in _corruptions(report) if p.split("/")[0] in names] for title, names in groups.items()}
    return {title: [Part(f"corruption/{p}", weight=1 / len(own)) for p in own] for title, own in found.items() if own}


def figure(report: Mapping, parts: Iterable[Part], run: int, where: Mapping[str, slice] = {}) -> float | None:
    """The run-th checkpoint's figure; None if there is no image that it could be a share of."""
    total = 0.0
    for part in parts:
        hits, base = part.hits(report, run, where)
        if not base.sum():
            return None
        total += 100 * part.weight * hits.sum() / base.sum()
    return float(total)


def by_row(report: Mapping) -> dict[str, dict[str, list[float]]]:
    """{row: {column: a figure per run}}, without a shared-classes column that repeats the set's own in every row."""
    rows = {}
    for row, runs in rows_of(report).items():
        found = {column: [figure(report, parts, run) for run in runs] for column, parts in columns(report).items()}
        rows[row] = {column: values for column, values in found.items() if None not in values}

    def repeated(column: str) -> bool:
        own = column.removesuffix(SHARED)
        return own != column and all(row.get(column) == row.get(own) for row in rows.values())

    return {name: {column: row[column] for column in row if not repeated(column)} for name, row in rows.items()}


def missing(report: Mapping) -> list[str]:
    """The standard corruptions and severities that a report on corruptions lacks, or has with too few images."""
    found = {part: cell["n"] for part, cell in _corruptions(report).items() if part.split("/")[0] in testsets.STANDARD}
    wanted = [f"{name}/{severity}" for name in testsets.STANDARD for severity in testsets.SEVERITIES]
    absent = [part for part in wanted if part not in found] if _corruptions(report) else []
    most = max(found.values(), default=0)
    return absent + [f"{part} with {n} of {most} images" for part, n in found.items() if n < most]


def _corruptions(report: Mapping) -> dict[str, dict]:
    return {key.partition("/")[2]: cell for key, cell in report["cells"].items() if key.startswith("corruption/")}


def resized(report: Mapping) -> list[str]:
    """The corruptions and severities whose images do not have the size of the crop, as published ones do."""
    return [part for part, cell in _corruptions(report).items() if "Resize" in cell["preprocessing"]]


def mean_std(runs: Sequence[float]) -> str:
    """The mean and, with several runs, their sample standard deviation."""
    return f"{statistics.fmean(runs):.2f}" + (f"±{statistics.stdev(runs):.2f}" if len(runs) > 1 else "")


def setting(report: Mapping, runs: Iterable[int], name: str) -> str:
    """A pre-training option of a row's runs, an earlier → a later value; "–" if there is none or no file stores it."""
    texts = {}
    for run in runs:
        made = report["checkpoints"][run].get("pretraining") or {name: "unknown"}
        earlier = (change.get(name, ["–"])[0] for change in made.get("changes", []) if {name, "robust"} & change.keys())
        values = [*earlier, made.get(name, "–")] if name == "alpha" else [made.get(name, "–")]
        texts[" → ".join(value if isinstance(value, str) else f"{value:g}" for value in values)] = None
    return "–" if [*texts] == ["unknown"] else ", ".join(texts)


# Differences between rows


class Difference(NamedTuple):
    """A column, or a class of a test set, under two rows. Figures in percent, means over the runs of a row."""

    name: str
    base: float
    other: float
    error: float  # one standard error of other - base

    @property
    def change(self) -> float:
        return self.other - self.base

    def __str__(self) -> str:
        return f"{self.change:+.2f}±{self.error:.2f}"


def difference(
    report: Mapping, name: str, parts: Sequence[Part], base: str, row: str, where: Mapping[str, slice] = {}
) -> Difference | None:
    """The figure of these parts under two rows, over the images in `where`; None if a run has no figure.

    Its standard error is over runs if both rows have RUNS or more, else over images: of the paired differences, since
    both rows saw the same ones, of which the corruptions of a photo count as one. It is never below the effect of one
    image, as in Agresti & Min, Statistics in Medicine 2005: a few images that agree are no proof.
    """
    runs = rows_of(report)
    before, after = ([figure(report, parts, run, where) for run in runs[each]] for each in (base, row))
    if None in before or None in after:
        return None
    over_images, of_one = _variances(report, parts, {row: 1 / len(after), base: -1 / len(before)}, where)
    variance = over_images + of_one
    if min(len(before), len(after)) >= RUNS:
        variance = max(of_one, sum(statistics.variance(values) / len(values) for values in (before, after)))
    return Difference(name, statistics.fmean(before), statistics.fmean(after), variance**0.5)


def _variances(
    report: Mapping, parts: Iterable[Part], signs: Mapping[str, float], where: Mapping
) -> tuple[float, float]:
    """The variance over images of a sum of figures, each row's by its sign, and that of one image more or less.

    In sets of equal counts per class, those in the same place are one photo; of different ones the effects cancel out.
    """
    effects, of_one = defaultdict(float), 0.0
    for part in parts:
        counts = tuple(each["n"] for each in report["cells"][part.key]["results"][0]["classes"].values())
        for row, sign in signs.items():
            for run in rows_of(report)[row]:
                hits, among = part.hits(report, run, where)
                scale = 100 * part.weight / among.sum()
                effects[counts] = effects[counts] + sign * scale * (hits - among * (hits.sum() / among.sum()))
        of_one += scale**2
    return float(sum((effect**2).sum() for effect in effects.values())), float(of_one)


def differences(report: Mapping) -> dict[str, list[Difference]]:
    """{later row: its differences to the first row}, in the columns of both."""
    (base, shown), *others = by_row(report).items()
    own = [(name, parts) for name, parts in columns(report).items() if name in shown]
    found = {row: [difference(report, *each, base, row) for each in own] for row, _ in others}
    return {row: [each for each in found[row] if each] for row in found}


def difference_lines(report: Mapping) -> list[str]:
    """A line per later row: its differences to the first row, in percentage points, with their standard errors."""
    base, found = next(iter(rows_of(report))), differences(report)
    lines = [f"{row} against {base}: {', '.join(f'{each.name} {each}' for each in found[row])}" for row in found]
    return [*lines, ERRORS] if lines else []


# Tables


def markdown(grid: Iterable[Sequence[str]]) -> str:
    """A Markdown table of these lines of cells, the header first."""
    cells = [[printable(cell).replace("|", r"\|") for cell in row] for row in grid]
    header, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([header, "|" + "---|" * len(cells[0]), *rows])


def table(report: Mapping) -> str:
    """A Markdown table of top-1 in percent, one row per row name."""
    return markdown(_grid(report))


def _grid(report: Mapping) -> list[list[str]]:
    """The cells of the table, line by line, its header first."""
    rows = by_row(report)
    shown = list(dict.fromkeys(column for row in rows.values() for column in row))
    grid = [[*SETTINGS, *(_header(report, column) for column in shown)]]
    for name, runs in rows_of(report).items():
        figures = (mean_std(rows[name][column]) if column in rows[name] else "–" for column in shown)
        grid.append([name, setting(report, runs, "moco_k"), setting(report, runs, "alpha"), *figures])
    return grid


def _header(report: Mapping, column: str) -> str:
    marks = []
    if column == SUITES["corruption"].title:
        marks = ["partial"] * bool(missing(report)) + ["resized"] * bool(resized(report))
    for key, title in titles(report).items():
        if column == title or column.startswith(f"{title}: "):
            cell = cells_of(report, key)[0]
            found, names = len(cell["results"][0]["classes"]), cell.get("categories") or report["wnids"]
            marks += [f"{len(cell['categories'])} of 16 categories"] if "categories" in cell else []
            if found < len(names) and (found == 1 or not testsets.suite_of(key).shared_classes):
                marks.append(f"{found} of {len(names)} classes")
    return f"{column} ({', '.join(marks)})" if marks else column


def latex(report: Mapping) -> str:
    """The table for LaTeX, with booktabs; {} keeps a row's end from taking a [ or * for its own option."""
    grid = [[printable(cell).translate(LATEX) for cell in line] for line in _grid(report)]
    table = ["{}" * line[0].startswith(("[", "*")) + " & ".join(line) + r" \\" for line in grid]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(grid[0]) - 1)}}}  % \usepackage{{booktabs}}"
    return "\n".join([begin, r"\toprule", table[0], r"\midrule", *table[1:], r"\bottomrule", r"\end{tabular}"])


# Lines below the table


def notes(report: Mapping) -> list[str]:
    """A line per column: its images, classes and preprocessing, and what is unexpected or missing."""
    limit = f"partial evaluation: only the first {report['limit']} images of each class (--limit)"
    classes = f"classes: the head stores none; taken to be {report.get('classes_from')}"
    lines = [_note(report, suite, title) for suite, title in titles(report).items()]
    for made in report["checkpoints"]:
        known = made.get("pretraining") or {}
        if known.get("epoch", 0) < known.get("epochs", 0) or known.get("step"):
            lines.append(f"{made['row']}: pre-training stopped after {known['epoch']} of {known['epochs']} epochs")
    for made, kind in itertools.product(report["checkpoints"], ("pretraining", "probe")):
        for change in (made.get(kind) or {}).get("changes", []):
            texts = (f"{name} {change[name][0]} → {change[name][1]}" for name in change if name != "epoch")
            lines.append(f"{made['row']}: {kind} continued from epoch {change['epoch']} with {', '.join(texts)}")
    precision = f"computed in {report['precision']} (--precision)"
    lines += [limit] * bool(report["limit"]) + [precision] * (report["precision"] != "fp32")
    return lines + [classes] * bool(report.get("classes_from"))


def _note(report: Mapping, suite: str, title: str) -> str:
    cells = cells_of(report, suite)
    preprocessing = "; ".join(dict.fromkeys(cell["preprocessing"] for cell in cells))
    counts = sorted({each["n"] for cell in cells for each in cell["results"][0]["classes"].values()})
    names = cells[0].get("categories") or report["wnids"]
    found = f"{len({name for cell in cells for name in cell['results'][0]['classes']})} of {len(names)} classes"
    where = f"{len(cells)} corruptions × severities" if suite == "corruption" else f"in {cells[0]['folder']}"
    line = f"{title}: {sum(cell['n'] for cell in cells)} images, {preprocessing}, {where}"
    line += f", {found} with {'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} images each"
    if suite == "corruption" and missing(report):
        line += f"; partial, {len(missing(report))} of 75 are missing ({', '.join(missing(report)[:3])}, …)"
    if suite == "corruption" and resized(report):
        line += f"; RESIZED: {len(resized(report))} of these have images of another size than ImageNet-C's"
    if categories := cells[0].get("categories"):
        line += f", decided between {len(categories)} of 16 categories ({', '.join(categories)}) by mean probability"
    if conflict := cells[0]["results"][0]["masks"].get("conflict"):
        conflicts = scores.unpack(conflict, cells[0]["n"]).sum()
        if conflicts < cells[0]["n"]:
            line += f"; Shape bias over the {conflicts} of these images whose cues are two classes of the head"
    if left_out := next((cell["left_out"] for cell in cells if cell["left_out"]), ""):
        line += f"; formats left out: {left_out}"
    odd = next((cell["warning"] for cell in cells if cell["warning"]), "")
    return line + (f"; unexpected: {odd}" if odd and not report["limit"] else "")


# Classes


def class_differences(report: Mapping, parts: Iterable[Part], base: str, row: str) -> list[Difference]:
    """Each class under the rows `base` and `row`, from the most helped to the most harmed.

    parts: a column's, whose test sets count the same for a class.
    """
    where = defaultdict(dict)  # {class: {test set that has it: its images}}
    for part in parts:
        end = 0  # of a class: images are sorted by class
        for wnid, each in report["cells"][part.key]["results"][0]["classes"].items():
            start, end = end, end + each["n"]
            where[wnid][part.key] = slice(start, end)
    equal = {wnid: [Part(key, weight=1 / len(own)) for key in own] for wnid, own in where.items()}
    changes = (difference(report, wnid, equal[wnid], base, row, where[wnid]) for wnid in where)
    return sorted(changes, key=lambda each: (-each.change, each.name))


def by_class_table(report: Mapping) -> str:
    """A Markdown table for each later row: its per-class accuracy change against the first row.

    A column per test set, in percent: first row → other row (difference±standard error). Sorted by the first column.
    """
    base, *others = rows_of(report)
    known = columns(report)
    parts = {title: known[title] for title in titles(report).values() if title in known}
    lines = []
    for row in others:
        lines.append(printable(f"{row} against {base}, by class (± one standard error)"))
        changes = [
            {each.name: f"{each.base:.1f} → {each.other:.1f} ({each.change:+.1f}±{each.error:.1f})" for each in classes}
            for classes in (class_differences(report, own, base, row) for own in parts.values())
        ]
        names = dict.fromkeys(name for column in changes for name in column)
        grid = [[name, *(column.get(name, "–") for column in changes)] for name in names]
        lines.append(markdown([["class", *parts], *grid]))
    return "\n".join(lines)
