"""The published table, and how far a row measured here is from it."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moco.errors import UsageError
from moco.evaluation import testsets
from moco.evaluation.report import TITLES, by_row, cells_of, markdown, mean_std, missing, resized

TABLE = Path(__file__).parent / "published.csv"  # the published table, as in README.md
CLASSES, SIZE = 100, 224
RENDITION_CLASSES, RENDITION_COUNTS = 19, range(40, 500)  # those in ImageNet-100; roughly how many images each has
IMAGENET_100_SHA256 = "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746"  # of the sorted wnids


def rows() -> dict[str, dict]:
    """The published rows {name: {"model", "moco_k", "alpha", "note", suite: (mean, std)}}, top-1 in percent."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        return {
            line["name"]: {
                **{name: line[name] for name in ("model", "moco_k", "alpha")},
                "note": line.get("note", ""),
                **{suite: (float(line[suite]), float(line[f"{suite}_std"])) for suite in TITLES},
            }
            for line in csv.DictReader(file)
        }


def check_rows(names: Iterable[str]) -> None:
    """Raise UsageError unless all rows have names of published.csv."""
    for name in names:
        if name not in rows():
            raise UsageError(
                f"--compare paper: {name} is not a row of the published table; valid names are"
                f" {', '.join(rows())}, as in --pretrained patch-k16384-a2=FILE"
            )


def incomplete(report: Mapping, suite: str) -> str:
    """Why the figure of a suite cannot be compared with the published one; "" if it can."""
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
    return next(filter(None, (_odd_counts(cell, suite) for cell in cells)), "")


def _odd_counts(cell: Mapping, suite: str) -> str:
    """How a cell's classes and images differ in number from the published set; "" if they do not."""
    classes = RENDITION_CLASSES if suite == "rendition" else CLASSES
    expected = testsets.EXPECTED_COUNTS.get(suite, RENDITION_COUNTS)
    counts = {wnid: count["n"] for wnid, count in cell["results"][0]["classes"].items()}
    if len(counts) != classes:
        return f"{cell['n']} images of {len(counts)} classes, published: {classes} classes"
    odd = [f"{wnid} has {n}" for wnid, n in counts.items() if n not in expected]
    usual = f"{expected[0]} to {expected[-1]}" if len(expected) > 1 else expected[0]
    return f"{len(odd)} classes do not have {usual} images, for example {odd[0]}" if odd else ""


def comparison(report: Mapping) -> str:
    """A Markdown table: for each row ours, the paper's, and the difference in the paper's standard deviations.

    It has the columns whose test sets are complete; lines below it say what the others lack.
    """
    reasons = {suite: incomplete(report, suite) for suite in TITLES}
    suites = [suite for suite, reason in reasons.items() if not reason]
    remarks = [f"{TITLES[suite]} is not compared: {reason}" for suite, reason in reasons.items() if reason]
    if not suites:
        return "\n".join(["--compare paper: no column is complete", *remarks])
    grid = [["", *(TITLES[suite] for suite in suites)]]
    for name, row in by_row(report).items():
        grid += _beside_paper(name, {suite: row[TITLES[suite]] for suite in suites})
        if note := rows()[name]["note"]:
            remarks.append(f"{name}: {note}")
    if "stylized" in suites:
        used = report["cells"]["stylized"]["preprocessing"]
        remarks.append(f"Stylized: measured here with {used}; the paper does not tell which preprocessing it used")
    if report["wnids_sha256"] != IMAGENET_100_SHA256:
        remarks.append("the classes are not those of preprocess/imagenet_100.txt, which the paper's are taken to be")
    return "\n".join([markdown(grid), *remarks])


def _beside_paper(name: str, ours: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Three lines of a table: our {suite: a figure per run}, the paper's, and their distance."""
    paper = rows()[name]
    distances = [(statistics.fmean(runs) - paper[suite][0]) / paper[suite][1] for suite, runs in ours.items()]
    return [
        [f"{name}, measured here", *map(mean_std, ours.values())],
        [f"{name}, paper", *("{:.2f}±{:.2f}".format(*paper[suite]) for suite in ours)],
        ["difference in the paper's std", *(f"{distance:+.1f}" for distance in distances)],
    ]
