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
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from moco import evaluation_plots, metrics, options
from moco.errors import UsageError, cli_main, one_line
from moco.progress import SYMBOLS

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
    labels = [evaluation_plots.plain_text(run.label) for run in runs]
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
    return evaluation_plots.classes(evaluation, args.set, *rows)


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("matplotlib is not installed; pip install matplotlib")
    options.check_file("--out", args.out, endings=(".png", ".pdf", ".svg"))
    draw(args).savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli_main(main)
