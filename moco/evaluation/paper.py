"""The published table, and the distance of a row measured here from it."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moco import options
from moco.errors import UsageError, printable
from moco.evaluation.report import by_row, cells_of, markdown, mean_std, missing, resized
from moco.evaluation.testsets import SUITES

TABLE = Path(__file__).parent / "published.csv"  # the published table, as in README.md
CLASSES, SIZE = 100, 224
OTHERS = {  # of all rows, beside options.PAPER: published defaults, and the probe's options
    "arch": "resnet50", "moco_dim": 128, "moco_m": 0.999, "images_per_step": 128, "momentum": 0.9, "weight_decay": 1e-4,
    "epoch": 200, "start_epoch": 0, "changes": [], "probe epochs": 60, "probe images_per_step": 128,
    "probe schedule": [30, 40, 50], "probe weight_decay": 0.0, "probe changes": [],
}  # fmt: skip
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


def check_recipes(checkpoints: Iterable[Mapping]) -> None:
    """Raise UsageError for a row that is not published, or whose runs, as far as they tell, were made otherwise."""
    for each in checkpoints:
        row, file = each["row"], each["file"]
        if row not in rows():
            raise UsageError(f"--compare paper: {row} is not a row of the published table: {', '.join(rows())}")
        made = (each.get("pretraining") or {}) | {f"probe {n}": v for n, v in (each.get("probe") or {}).items()}
        made["released"] = next((name for name in rows() if f"{name}-run" in each.get("pretrained", "")), row)
        for name, published in recipe(row).items():
            if made.get(name, published) != published:
                told = f"{row} has {name} {published}, {file} was made with {made[name]}"
                raise UsageError(f"--compare paper: {told}; give that row another name, and leave out --compare")


def recipe(row: str) -> dict:
    """The published options of a row, as checkpoints store them: without those that have no effect."""
    published, later = rows()[row], {"lr": 0.8, "images_per_step": 512, "moco_m": 0.99} if "later" in row else {}
    made = OTHERS | {"released": row, "image_size": SIZE, "moco_k": int(published["moco_k"])}
    made |= {name: value for name, value in options.PAPER.items() if name != "batch_size"} | later
    if not published["alpha"]:
        return {name: made[name] for name in made if name not in ("num_nonsem", "alpha")} | {"robust": "none"}
    patches = {"patch_ratio": list(options.PAPER_PATCHES)} if row.startswith("patch") else {"robust": "texture"}
    return made | {"alpha": float(published["alpha"])} | patches


def spread(suite: str, runs: Sequence[float] = ()) -> float:
    """The sample standard deviation of runs in a column, pooled over the published rows and these runs, in points."""
    squares = [2 * row[suite][1] ** 2 for row in rows().values() if suite not in row["note"]]  # of three runs each
    freedom = 2 * len(squares) + max(0, len(runs) - 1)
    own = (len(runs) - 1) * statistics.variance(runs) if len(runs) > 1 else 0
    return ((sum(squares) + own) / freedom) ** 0.5


def comparison(report: Mapping) -> str:
    """A Markdown table: for each row ours, the paper's, and the difference with its standard error.

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
        errors = [spread(suite, runs) * (1 / 3 + 1 / len(runs)) ** 0.5 for suite, runs in zip(suites, ours)]
        changes = [statistics.fmean(runs) - mean for runs, (mean, _) in zip(ours, paper)]
        grid.append([f"{name}, measured here", *map(mean_std, ours)])
        grid.append([f"{name}, paper", *("{:.2f}±{:.2f}".format(*pair) for pair in paper)])
        grid.append(["difference", *(f"{change:+.2f}±{error:.2f}" for change, error in zip(changes, errors))])
        if note := published[name]["note"]:
            remarks.append(f"{name}: {note}")
    for suite in suites:
        if note := SUITES[suite].paper_note:
            used = cells_of(report, suite)[0]["preprocessing"]
            remarks.append(f"{SUITES[suite].title}: measured here with {used}; {note}")
    if report["wnids_sha256"] != IMAGENET_100_SHA256:
        remarks.append("the classes are not those of preprocess/imagenet_100.txt, which the paper's are taken to be")
    remarks.append(
        "± after a mean: sample standard deviation of the runs; after a difference: standard error of three runs of the"
        " paper and those here, by a column's deviation pooled over the published rows; within two nothing differs"
    )
    return "\n".join([markdown(grid), *map(printable, remarks)])
