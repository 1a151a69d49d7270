"""What an evaluation leaves: the JSON file of every figure, the Markdown table, the comparison with the paper, a plot."""

import csv
import hashlib
import json
import os
import statistics
from pathlib import Path

from moco import robustness
from moco.failures import BadInput, RunFailed

TITLES = {"val": "val", "corruption": "Corruption", "sketch": "Sketch", "stylized": "Stylized", "rendition": "Rendition"}
PUBLISHED = Path(__file__).parent / "data" / "published.csv"    # the paper's table 1, as in README.md


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def new(rows, pretraining, wnids, image_size, limit):
    """An empty report on {name: files}. All of it but `cells` says what was evaluated, and how.

    pretraining: for each file the options of its pre-training, {} where the file does not say them.
    """
    entries = [(name, file) for name, files in rows.items() for file in files]
    return {
        "image_size": image_size, "limit": limit, "wnids": wnids,
        "wnids_sha256": sha256("\n".join(wnids).encode()),
        "checkpoints": [{"row": name, "file": file, "sha256": sha256(Path(file).read_bytes()),
                         "moco_k": known.get("moco_k"), "alpha": known.get("alpha") if known.get("num_nonsem") else None}
                        for (name, file), known in zip(entries, pretraining)],
        "cells": {},
    }


def continue_from(path, report, cells):
    """Take over from an earlier report on the same checkpoints the results of those cells that are still the same."""
    try:
        with open(path) as file:
            earlier = json.load(file)
        same = all(earlier[name] == value for name, value in report.items() if name != "cells")
        found = earlier["cells"] if same else {}
    except (OSError, ValueError, KeyError, TypeError):                # there is none, or something else
        return
    for cell in cells:
        known = found.get(cell.key)
        if known and (known["folder"], known["n"]) == (cell.folder, len(cell.labels)):
            report["cells"][cell.key] = known


def add(report, cell, results, image_size, wnids):
    report["cells"][cell.key] = {"folder": cell.folder, "n": len(cell.labels), "preprocessing": cell.preprocessing(image_size),
                                 "warning": cell.warning(wnids), "results": results}


def save(path, report):
    partial = f"{path}.partial"
    try:
        with open(partial, "w") as file:
            json.dump(report, file, indent=1)
        os.replace(partial, path)
    except OSError as error:
        raise RunFailed(f"{path} could not be written ({error}); make room, then go on with the same command") from error


def figures(report, run):
    """{column: figure} of one checkpoint, by its place among all: the published table's columns, then those beside it."""
    results = {key: cell["results"][run] for key, cell in report["cells"].items()}
    corruption = robustness.corruption_figures(
        {key: result["top1"] for key, result in results.items() if key.startswith("corruption/")}, len(report["wnids"]))
    table = {}
    for suite, title in TITLES.items():
        if suite in results:
            table[title] = results[suite]["top1"]
        elif suite == "corruption" and title in corruption:
            table[title] = corruption.pop(title)
    if "rendition" in results:
        table["Rendition, shared classes"] = results["rendition"]["top1_shared_classes"]
    table |= corruption
    for result in results.values():
        if result.get("shape_bias") is not None:
            table["Shape bias"] = result["shape_bias"]
    return table


def by_row(report):
    """{row: {column: figures of its runs}}"""
    rows = {}
    for run, checkpoint in enumerate(report["checkpoints"]):
        for column, figure in figures(report, run).items():
            rows.setdefault(checkpoint["row"], {}).setdefault(column, []).append(figure)
    return rows


def mean_std(runs):
    """As text: the mean, and with several runs their sample standard deviation."""
    mean = f"{statistics.fmean(runs):.2f}"
    return f"{mean}±{statistics.stdev(runs):.2f}" if len(runs) > 1 else mean


def table(report):
    """The Markdown table: top-1 in percent, a row a NAME."""
    rows = by_row(report)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    titles = [f"{column} (partial)" if column == "Corruption" and missing(report) else column for column in columns]
    lines = [f"| model | K | alpha | {' | '.join(titles)} |", "|---|---|---|" + "---|" * len(titles)]
    lines += [f"| {name} | {setting(report, name, 'moco_k')} | {setting(report, name, 'alpha')} |"
              f" {' | '.join(mean_std(row[column]) if column in row else '–' for column in columns)} |"
              for name, row in rows.items()]
    return "\n".join(lines)


def setting(report, row, name):
    """A pre-training option of a row's runs, as text; "–" where there is none or the files do not say it."""
    values = {checkpoint[name] for checkpoint in report["checkpoints"] if checkpoint["row"] == row}
    return ", ".join(f"{value:g}" for value in sorted(values - {None})) or "–"


def missing(report):
    """The standard corruption cells a report on corruptions lacks."""
    keys = [key for key in report["cells"] if key.startswith("corruption/")]
    return robustness.missing_corruptions(keys) if keys else []


def differences(report):
    """Lines that say what each later row measured against the first, in points."""
    (base, reference), *others = by_row(report).items()
    return [f"{name} against {base}: " + ", ".join(
        f"{column} {statistics.fmean(runs) - statistics.fmean(reference[column]):+.2f}"
        for column, runs in row.items() if column in reference) for name, row in others]


def notes(report):
    """Lines on what lies behind the columns: images, preprocessing, what is odd or missing."""
    lines = []
    for suite, title in TITLES.items():
        cells = [cell for key, cell in report["cells"].items() if key.split("/")[0] == suite]
        if not cells:
            continue
        line = f"{title}: {sum(cell['n'] for cell in cells)} images, {cells[0]['preprocessing']}"
        if suite == "corruption":
            line += f", {len(cells)} cells"
            if missing(report):
                line += f"; partial, {len(missing(report))} of 75 cells are missing ({', '.join(missing(report)[:3])}, …)"
        odd = next((cell["warning"] for cell in cells if cell["warning"]), "")
        lines.append(line + (f"; unexpected: {odd}" if odd and not report["limit"] else ""))
    if report["limit"]:
        lines.append(f"a quick look: only the first {report['limit']} images of each class were tested")
    return lines


def published():
    """The paper's rows: {name: {"model", "moco_k", "alpha", suite: (mean, std)}}, top-1 in percent, three runs each."""
    with open(PUBLISHED, newline="") as file:
        return {line["name"]: {"model": line["model"], "moco_k": line["moco_k"], "alpha": line["alpha"],
                               **{suite: (float(line[suite]), float(line[f"{suite}_std"])) for suite in TITLES}}
                for line in csv.DictReader(file)}


def check_published(rows):
    """BadInput unless the rows are named as the paper's, by the names of published.csv."""
    for name in rows:
        if name not in published():
            raise BadInput(f"--compare paper: {name} is no row of the paper's table; name the row as one:"
                           f" {', '.join(published())}, as in --pretrained patch-k16384-a2=FILE")


def comparison(report):
    """A Markdown table: of each row ours, the paper's, and the difference in the paper's standard deviations."""
    lines = []
    for name, row in by_row(report).items():
        paper = published()[name]
        suites = [suite for suite, title in TITLES.items() if title in row]
        if not lines:
            lines += [f"| | {' | '.join(TITLES[suite] for suite in suites)} |", "|---|" + "---|" * len(suites)]
        lines.append(f"| {name}, measured here | {' | '.join(mean_std(row[TITLES[suite]]) for suite in suites)} |")
        lines.append(f"| {name}, paper | {' | '.join('{:.2f}±{:.2f}'.format(*paper[suite]) for suite in suites)} |")
        distances = [(statistics.fmean(row[TITLES[suite]]) - paper[suite][0]) / paper[suite][1] for suite in suites]
        lines.append(f"| difference in the paper's std | {' | '.join(f'{distance:+.1f}' for distance in distances)} |")
    return "\n".join(lines)


def plot(report, path):
    """Draw accuracy against severity for each corruption, a line a row. Needs matplotlib."""
    from matplotlib.figure import Figure                              # without pyplot: no window, no global state
    names = [name for group in robustness.CORRUPTIONS.values() for name in group
             if any(key.startswith(f"corruption/{name}/") for key in report["cells"])]
    columns = min(5, len(names))
    figure = Figure(figsize=(2.6 * columns, 2.4 * -(-len(names) // columns) + 0.6), layout="constrained")
    axes = figure.subplots(-(-len(names) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    runs = [checkpoint["row"] for checkpoint in report["checkpoints"]]
    for name, axis in zip(names, axes):
        for row in dict.fromkeys(runs):
            points = [(severity, statistics.fmean(result["top1"] for run, result in zip(runs, cell["results"]) if run == row))
                      for severity in robustness.SEVERITIES if (cell := report["cells"].get(f"corruption/{name}/{severity}"))]
            axis.plot(*zip(*points), marker=".", label=row)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xticks(list(robustness.SEVERITIES))
    for axis in axes[len(names):]:
        axis.set_visible(False)
    figure.supxlabel("severity")
    figure.supylabel("top-1, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(set(runs))))
    figure.savefig(path)
