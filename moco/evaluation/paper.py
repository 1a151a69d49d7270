"""The published table, and the distance of a row measured here from it."""

import csv
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from moco.errors import UsageError
from moco.evaluation.report import by_row, cells_of, markdown, mean_std, missing, resized
from moco.evaluation.testsets import SUITES

TABLE = Path(__file__).parent / "published.csv"  # the published table, as in README.md
CLASSES, SIZE = 100, 224
IMAGENET_100_SHA256 = "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746"  # of the sorted wnids


def rows() -> dict[str, dict]:
    """The published rows {name: {"model", "moco_k", "alpha", "note", suite: (mean, std)}}, top-1 in percent.

    A suite without a column in the file has no entry.
    """
    with open(TABLE, newline="", encoding="utf-8") as file:
        return {
            line["name"]: {name: line[name] for name in ("model", "moco_k", "alpha", "note")}
            | {suite: (float(line[suite]), float(line[f"{suite}_std"])) for suite in SUITES if suite in line}
            for line in csv.DictReader(file)
        }


def check_rows(names: Iterable[str]) -> None:
    """Raise UsageError unless all rows have names of published.csv."""
    if unknown := [name for name in names if name not in rows()]:
        raise UsageError(f"--compare paper: {unknown[0]} is not a row of the published table: {', '.join(rows())}")


def incomplete(report: Mapping, suite: str) -> str:
    """The reason why the figure of a suite cannot be compared with the published one; "" if it can."""
    cells = cells_of(report, suite)
    if not cells:
        return "not tested"
    if report["limit"]:
        return f"--limit {report['limit']}"
    if report["image_size"] != SIZE:
        return f"crops of {report['image_size']} px, published: {SIZE}"
    if len(report["wnids"]) != CLASSES:
        return f"the head has {len(report['wnids'])} classes, published: {CLASSES}"
    if suite == "corruption" and missing(report):
        return f"{len(missing(report))} of 75 corruptions × severities are missing"
    if suite == "corruption" and resized(report):
        return f"images of another size than {SIZE} px, for example in {resized(report)[0]}"
    for cell in cells:
        counts = {wnid: count["n"] for wnid, count in cell["results"][0]["classes"].items()}
        if len(counts) != SUITES[suite].paper_classes:
            return f"{cell['n']} images of {len(counts)} classes, published: {SUITES[suite].paper_classes} classes"
        if odd := SUITES[suite].odd_counts(counts):
            return odd
    return ""


def comparison(report: Mapping) -> str:
    """A Markdown table: for each row ours, the paper's, and the difference in the paper's standard deviations.

    It has the columns whose test sets are complete; lines below it say what the others lack.
    """
    published = rows()
    reasons = {suite: incomplete(report, suite) for suite in SUITES if suite in next(iter(published.values()))}
    remarks = [f"{SUITES[suite].title} is not compared: {reason}" for suite, reason in reasons.items() if reason]
    suites = [suite for suite, reason in reasons.items() if not reason]
    if not suites:
        return "\n".join(["--compare paper: no column is complete", *remarks])
    grid = [["", *(SUITES[suite].title for suite in suites)]]
    for name, row in by_row(report).items():
        ours, paper = [row[SUITES[suite].title] for suite in suites], [published[name][suite] for suite in suites]
        distances = [(statistics.fmean(runs) - mean) / std for runs, (mean, std) in zip(ours, paper)]
        grid.append([f"{name}, measured here", *map(mean_std, ours)])
        grid.append([f"{name}, paper", *("{:.2f}±{:.2f}".format(*pair) for pair in paper)])
        grid.append(["difference in the paper's std", *(f"{distance:+.1f}" for distance in distances)])
        if note := published[name]["note"]:
            remarks.append(f"{name}: {note}")
    for suite in suites:
        if note := SUITES[suite].paper_note:
            used = cells_of(report, suite)[0]["preprocessing"]
            remarks.append(f"{SUITES[suite].title}: measured here with {used}; {note}")
    if report["wnids_sha256"] != IMAGENET_100_SHA256:
        remarks.append("the classes are not those of preprocess/imagenet_100.txt, which the paper's are taken to be")
    return "\n".join([markdown(grid), *remarks])
