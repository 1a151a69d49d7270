"""Pictures of training logs, and of the classes that a row of an evaluation helps and harms. Needs matplotlib.

Loss, similarities, spread and accuracies over the epochs, several runs side by side:
    python -m moco.plot ckpts/*/log.jsonl --out curves.png
Top-1 of each class, the second row of an evaluation against the first:
    python -m moco.plot robustness.json --out classes.png
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from moco import options
from moco.errors import UsageError, one_line
from moco.evaluation import report, testsets
from moco.processes.exits import cli_main
from moco.training import metrics
from moco.training.metrics import SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_NAME = "log.jsonl"
PANELS = {  # title: {key of the log: how it is drawn}
    "loss": {"loss": "-"},
    "cosine": {"q_k": "-", "q_t": "--", "q_queue": ":"},
    "spread": {"spread": "-"},
    "contrast accuracy, %": {"contrast_acc": "-"},
    "200-nearest-neighbour top-1, %": {"knn_top1": "-"},
}
PROBE_PANELS = {
    "probe: loss": {"loss": "-"},
    "probe: top-1 on train/, %": {"acc1": "-"},
    "probe: top-1 on val/, %": {"val_acc1": "-"},
}
LOG_SCALE_FROM = 100  # times the smallest loss: one head that exploded must not flatten all others
MARKED = 20  # values up to which each is marked: a single one would be invisible without, and many hide the dashes


class Series(NamedTuple):
    """A line for the legend, and its values: {key of the log: {epoch: value}}."""

    label: str
    is_probe: bool
    values: dict[str, dict[int, float]]


# Logs


def read_runs(paths: Sequence[str]) -> list[Series]:
    """The pre-training runs and the probes' heads in these logs, labelled by folder.

    Damaged lines and logs without a line are left out, which stderr says. Raises UsageError if nothing is left.
    """
    runs = []
    for path, name in zip(paths, run_names(paths)):
        if not os.path.isfile(path):
            what = f"a folder; name the log in it, {path}/{LOG_NAME}" if os.path.isdir(path) else "no such file"
            raise UsageError(f"{path}: {what}")
        try:
            records, damaged = metrics.read_jsonl(path)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error})") from error
        if damaged:
            sys.stderr.write(one_line(f"{path}: {damaged} damaged lines are left out"))
        if not records:
            sys.stderr.write(one_line(f"{path}: no epoch in it, left out"))
        runs += series_of(name, records)
    if not any(each.values for each in runs):
        raise UsageError(f"nothing to draw: no epoch in {', '.join(paths[:3])}; a run writes a line after each epoch")
    return runs


def run_names(paths: Sequence[str]) -> list[str]:
    """The folder of each log, as far as they differ. A log of another name than log.jsonl adds that name."""
    whole = [os.path.abspath(path) for path in paths]
    whole = [
        os.path.dirname(path) if os.path.basename(path) == LOG_NAME else os.path.splitext(path)[0] for path in whole
    ]
    shared = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, shared) for path in whole]


def series_of(name: str, records: Sequence[Mapping]) -> list[Series]:
    """The series of a log: one of the pre-training, and one for each head of each probe."""
    found: dict[str, Series] = {}
    first_rates: dict[str, list] = {}  # of a probe: a head is known by the learning rate it began with
    for record in records:
        probe = record.get("probe")
        if probe is None:
            _add(found.setdefault(name, Series(name, False, {})), record, 0)
            continue
        title = f"{name}, probe {probe}"
        rates = first_rates.setdefault(title, _as_list(record.get("lr")))
        for head in range(max(map(len, map(_as_list, record.values())))):
            rate = rates[head] if head < len(rates) else None
            label = f"{title}, lr {rate:g}" if _is_number(rate) else f"{title}, head {head}"
            _add(found.setdefault(f"{title} {head}", Series(label, True, {})), record, head)
    return list(found.values())


def _add(series: Series, record: Mapping, head: int) -> None:
    """Add the finite figures of one epoch, of a list the head's; of two lines of one epoch the later counts."""
    for key, value in record.items():
        values = _as_list(value)
        if head < len(values) and _is_number(values[head]):
            series.values.setdefault(key, {})[record["epoch"]] = values[head]


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Pictures


def curves(runs: Sequence[Series]) -> "Figure":
    """A panel for each figure that any of the runs has, over the epochs. Raises UsageError if they have none."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    panels = [
        (title, keys, is_probe)
        for kinds, is_probe in ((PANELS, False), (PROBE_PANELS, True))
        for title, keys in kinds.items()
        if any(run.is_probe == is_probe and keys.keys() & run.values.keys() for run in runs)
    ]
    if not panels:
        raise UsageError("nothing to draw: the logs have none of the figures of a training run")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows + 0.25 * len(runs)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = _colours(len(runs))
    for axis, (title, keys, is_probe) in zip(axes, panels):
        for run, colour in zip(runs, colours):
            if run.is_probe == is_probe:
                _draw_run(axis, run, keys, colour)
        axis.set_title(title, fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if "loss" in keys:
            _log_scale_if_exploded(axis)
        if "spread" in keys:
            axis.set_ylim(0, 1.03)  # its own range would make noise look like a collapse
        if len(keys) > 1:
            styles = [axis.plot([], [], style, color="gray", linewidth=1.3)[0] for style in keys.values()]
            axis.legend(styles, [SYMBOLS[key] for key in keys], fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("epoch", fontsize=10)
    handles = [axes[0].plot([], [], color=colour)[0] for colour in colours]
    labels = [plain_text(run.label) for run in runs]
    fitting = max(1, 60 * columns // (max(map(len, labels)) + 8))  # a panel is as wide as 60 letters
    figure.legend(handles, labels, loc="outside upper center", fontsize=9, ncols=min(fitting, len(runs), 4))
    return figure


def _draw_run(axis: "Axes", run: Series, keys: Mapping[str, str], colour: object) -> None:
    for key, style in keys.items():
        if values := sorted(run.values.get(key, {}).items()):
            marker = "." if len(values) <= MARKED else None
            axis.plot(*zip(*values), style, color=colour, marker=marker, markersize=5, linewidth=1.3)


def _log_scale_if_exploded(axis: "Axes") -> None:
    values = [value for line in axis.lines for value in line.get_ydata() if value > 0]
    if values and max(values) > LOG_SCALE_FROM * min(values):
        axis.set_yscale("log")


def _colours(count: int) -> list:
    """As many colours, ten of a qualitative map or evenly spaced ones."""
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](index) for index in range(count)]
    return [colormaps["turbo"](0.05 + 0.9 * index / (count - 1)) for index in range(count)]


# Command


def parse_args() -> argparse.Namespace:
    parser = options.OptionParser("Draw training logs, or the classes that a row of an evaluation helps and harms.")
    parser.prog = "plot.py"  # as errors begin
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help=f"{LOG_NAME} of runs, or one JSON file of eval_robustness.py"
    )
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture: .png, .pdf or .svg")
    parser.add_argument("--set", default="val", metavar="SET", help="of an evaluation: val, corruption, sketch, …")
    parser.add_argument(
        "--rows",
        nargs=2,
        metavar=("BASE", "ROW"),
        help="of an evaluation: compare ROW with BASE; default: the first two",
    )
    return parser.parse_args()


def read_evaluation(path: str) -> dict:
    """What eval_robustness.py --json wrote. Raises UsageError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if {"checkpoints", "cells"} <= content.keys() and content["cells"]:
            return content
        reason = "it holds no results of an evaluation"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = f"it cannot be read as JSON of an evaluation ({error})"
    raise UsageError(f"{path}: {reason}; name the --json file of eval_robustness.py, or a run's {LOG_NAME}")


def draw(args: argparse.Namespace) -> "Figure":
    if not any(path.endswith(".json") for path in args.files):
        return curves(read_runs(args.files))
    if len(args.files) > 1:
        raise UsageError(f"{args.files[1]}: an evaluation is drawn by itself; one JSON file holds all of its rows")
    evaluation = read_evaluation(args.files[0])
    rows = args.rows or list(dict.fromkeys(checkpoint["row"] for checkpoint in evaluation["checkpoints"]))[:2]
    if len(rows) < 2:
        raise UsageError(f"{args.files[0]}: it has one row, {rows[0]}; evaluate two rows, --pretrained A=FILE B=FILE")
    return class_bars(evaluation, args.set, *rows)


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("matplotlib is not installed; pip install matplotlib")
    options.check_file("--out", args.out, endings=(".png", ".pdf", ".svg"))
    draw(args).savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli_main(main, again="run the same command again")


# ---- evaluation_plots: Pictures of an evaluation: corruptions by severity, and the classes that a row helps and harms. Needs matplotlib.

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 20  # of the most helped and of the most harmed classes that are named
HELPED, HARMED = "#0b66b3", "#d9730d"


def plain_text(name: str, longest: int = 60) -> str:
    """A name as matplotlib shows it in a label: no formula in it, printable, and of a length that leaves room."""
    name = name if len(name) <= longest else f"…{name[1 - longest :]}"
    name = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves labels out that begin with _


def corruptions(report: Mapping, path: str) -> None:
    """Draw accuracy against severity for each corruption, one line per row. Needs matplotlib.

    Dashed: the row's accuracy on val, if that was evaluated. Dotted: chance.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    present = {key.split("/")[1] for key in report["cells"] if key.startswith("corruption/")}
    names = [name for group in testsets.CORRUPTIONS.values() for name in group if name in present]
    columns = min(5, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.4 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    runs = [checkpoint["row"] for checkpoint in report["checkpoints"]]
    for name, axis in zip(names, axes):
        for index, row in enumerate(dict.fromkeys(runs)):
            colour = f"C{index}"
            axis.plot(*zip(*_severity_curve(report, name, runs, row)), marker=".", color=colour, label=plain_text(row))
            if clean := report["cells"].get("val"):
                axis.axhline(_mean_top1(clean, runs, row), color=colour, linestyle="--", linewidth=0.9)
        chance = axis.axhline(100 / len(report["wnids"]), color="gray", linestyle=":", linewidth=1.2)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xticks(list(testsets.SEVERITIES))
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis in axes[len(names) - columns : len(names)]:  # the last of each column, also above an empty place
        axis.tick_params(labelbottom=True)
    figure.supxlabel("severity")
    figure.supylabel("top-1, %")
    handles, labels = axes[0].get_legend_handles_labels()
    if "val" in report["cells"]:
        handles, labels = [*handles, axes[0].plot([], [], "--", color="gray")[0]], [*labels, "on val"]
    figure.legend([*handles, chance], [*labels, "chance"], loc="outside upper center", ncols=min(4, len(handles) + 1))
    figure.savefig(path)


def _severity_curve(report: Mapping, corruption: str, runs: Sequence[str], row: str) -> list[tuple[int, float]]:
    """(severity, mean top-1 of the row's runs) for the severities that were evaluated."""
    cells = {severity: report["cells"].get(f"corruption/{corruption}/{severity}") for severity in testsets.SEVERITIES}
    return [(severity, _mean_top1(cell, runs, row)) for severity, cell in cells.items() if cell]


def _mean_top1(cell: Mapping, runs: Sequence[str], row: str) -> float:
    return statistics.fmean(result["top1"] for run, result in zip(runs, cell["results"]) if run == row)


def class_bars(evaluation: Mapping, suite: str, base: str, row: str) -> "Figure":
    """A bar for each class: its top-1 in `row` minus that in `base`, with its standard error.

    Of many classes, those that `row` helps and harms most. evaluation: what eval_robustness.py --json wrote.
    """
    from matplotlib.figure import Figure

    found = report.class_differences(evaluation, suite, base, row)
    shown = found if len(found) <= 2 * CLASSES else found[:CLASSES] + found[-CLASSES:]
    figure = Figure(figsize=(7.5, 1.6 + 0.19 * len(shown)), layout="constrained")
    axis = figure.subplots()
    places = [-index - (index >= CLASSES and len(found) > len(shown)) for index in range(len(shown))]
    changes = [each.change for each in shown]
    axis.barh(
        places, changes, xerr=[each.error for each in shown], error_kw={"elinewidth": 0.8, "ecolor": "black"},
        color=[HELPED if each >= 0 else HARMED for each in changes],
    )  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(places, [plain_text(each.wnid) for each in shown], fontsize=8)
    axis.set_ylim(places[-1] - 0.8, 0.8)
    axis.grid(axis="x", linewidth=0.4)
    axis.set_xlabel("difference in top-1, points; black: one standard error")
    helped, harmed = sum(each.change > 0 for each in found), sum(each.change < 0 for each in found)
    names = f"{suite}: {plain_text(row)} against {plain_text(base)}"
    title = f"{names}\nclasses helped: {helped}, harmed: {harmed}, of {len(found)}"
    if len(shown) < len(found):
        title += f"; drawn: the {CLASSES} at either end"
    axis.set_title(title, fontsize=10)
    return figure
