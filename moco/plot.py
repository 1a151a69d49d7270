"""Pictures: curves of training logs, accuracy by corruption and by class, and the views of a training step.

Loss, similarities, spread and accuracies over the epochs, several runs side by side:
    python -m moco.plot ckpts/*/log.jsonl --out curves.png
Top-1 of each class, the second row of an evaluation against the first:
    python -m moco.plot robustness.json --out classes.png
All but the views need matplotlib.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from moco import augment, options
from moco.errors import UsageError, first_line, one_line
from moco.evaluation import report, testsets
from moco.processes.exits import cli_main
from moco.training import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_NAME = "log.jsonl"
PANELS = {  # title: {key of the log: line style}; titles of a probe's panels begin with "probe"
    "loss": {"loss": "-"},
    "cosine": {"q_k": "-", "q_t": "--", "q_queue": ":"},
    "spread": {"spread": "-"},
    "contrast accuracy, %": {"contrast_acc": "-"},
    "200-nearest-neighbour top-1, %": {"knn_top1": "-"},
    "probe: loss": {"loss": "-"},
    "probe: top-1 on train/, %": {"acc1": "-"},
    "probe: top-1 on val/, %": {"val_acc1": "-"},
}
MARKED = 20  # values up to which each is marked: a single one would be invisible without, and many hide the dashes
CLASSES = 20  # of the most helped and of the most harmed classes that are named
HELPED, HARMED = "#0b66b3", "#d9730d"
TILE = 224  # px; smaller crops are enlarged to about this side in a picture of views
LABEL_HEIGHT, GAP = 34, 6  # px


class Series(NamedTuple):
    """A line for the legend, and its values: {key of the log: {epoch: value}}."""

    label: str
    is_probe: bool
    values: dict[str, dict[int, float]]


# Logs


def read_runs(paths: Sequence[str]) -> list[Series]:
    """The pre-training runs and the probes' heads in these logs, labelled by the folder as it was given.

    Damaged lines and logs without a line are left out, which stderr says. Raises UsageError if a file is missing.
    """
    runs = []
    for path in paths:
        if not os.path.isfile(path):
            raise UsageError(f"{path}: no such file; name the {LOG_NAME} of a run")
        records, damaged = metrics.read_jsonl(path)
        if damaged or not records:
            sys.stderr.write(one_line(f"{path}: {len(records)} epochs, {damaged} damaged lines are left out"))
        runs += series_of(path.removesuffix(f"/{LOG_NAME}"), records)
    return runs


def series_of(name: str, records: Sequence[Mapping]) -> list[Series]:
    """The series of a log: one of the pre-training, and one for each head of each probe."""
    found: dict[tuple, Series] = {}
    first_lrs: dict[str, list] = {}  # of a probe: a head is known by the learning rate it began with
    for record in records:
        is_probe = record.get("probe") is not None
        title = f"{name}, probe {record['probe']}" if is_probe else name
        lrs = first_lrs.setdefault(title, _as_list(record.get("lr")) if is_probe else [None])
        for head, lr in enumerate(lrs):
            label = f"{title}, lr {lr:g}" if _is_number(lr) else title
            series = found.setdefault((title, head), Series(label, is_probe, {}))
            for key, value in record.items():
                values = _as_list(value)
                if head < len(values) and _is_number(values[head]):  # of two lines of one epoch the later counts
                    series.values.setdefault(key, {})[record["epoch"]] = values[head]
    return list(found.values())


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# Pictures of training logs


def curves(runs: Sequence[Series]) -> "Figure":
    """A panel for each figure that any of the runs has, over the epochs. Raises UsageError if they have none."""
    from matplotlib import colormaps

    shown = {title: [run for run in runs if run.is_probe == title.startswith("probe")] for title in PANELS}
    panels = {
        title: keys for title, keys in PANELS.items() if any(keys.keys() & run.values.keys() for run in shown[title])
    }
    if not panels:
        raise UsageError("nothing to draw: the logs have no epoch with figures of a training run")
    columns = min(3, len(panels))
    figure, axes = _panels(len(panels), columns, (4.5, 3), 0.25 * len(runs))
    colours = colormaps["turbo"](torch.linspace(0.05, 0.95, len(runs)).numpy())
    for axis, (title, keys) in zip(axes, panels.items()):
        for run, colour in zip(runs, colours):
            if run in shown[title]:
                _draw_run(axis, run, keys, colour)
        axis.set_title(title, fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if title == "probe: loss":
            axis.set_yscale("log")  # one head that diverged must not flatten all others
        if "spread" in keys:
            axis.set_ylim(0, 1.03)  # its own range would make noise look like a collapse
        if len(keys) > 1:
            styles = [axis.plot([], [], style, color="gray", linewidth=1.3)[0] for style in keys.values()]
            axis.legend(styles, [metrics.SYMBOLS[key] for key in keys], fontsize=8)
    figure.supxlabel("epoch", fontsize=10)
    handles = [axes[0].plot([], [], color=colour)[0] for colour in colours]
    labels = [plain_text(run.label) for run in runs]
    figure.legend(handles, labels, loc="outside upper center", fontsize=9, ncols=columns)  # a panel holds 60 letters
    return figure


def _panels(count: int, columns: int, size: tuple[float, float], above: float, **shared) -> tuple:
    """A figure, and the axes of its `count` panels of a size in inches, with some space above them."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + above), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _draw_run(axis: "Axes", run: Series, keys: Mapping[str, str], colour: object) -> None:
    for key, style in keys.items():
        if values := sorted(run.values.get(key, {}).items()):
            marker = "." if len(values) <= MARKED else None
            axis.plot(*zip(*values), style, color=colour, marker=marker, markersize=5, linewidth=1.3)


# Pictures of evaluations


def plain_text(name: str, longest: int = 60) -> str:
    """A name as matplotlib shows it in a label: no formula in it, printable, and of a length that leaves room."""
    name = name if len(name) <= longest else f"…{name[1 - longest :]}"
    name = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves labels out that begin with _


def corruptions(evaluation: Mapping) -> "Figure":
    """Accuracy against severity for each corruption, one line per row.

    Dashed: the row's accuracy on val, if that was evaluated. Dotted: chance.
    """
    cells = evaluation["cells"]
    known = itertools.chain(*testsets.CORRUPTIONS.values())
    names = [name for name in known if report.cells_of(evaluation, f"corruption/{name}")]
    figure, axes = _panels(len(names), min(5, len(names)), (2.6, 2.4), 0.6, sharey=True)
    for name, axis in zip(names, axes):
        severities = {s: cells[key] for s in testsets.SEVERITIES if (key := f"corruption/{name}/{s}") in cells}
        for index, (row, runs) in enumerate(report.rows_of(evaluation).items()):
            top1 = [report.mean_top1(cell, runs) for cell in severities.values()]
            axis.plot(list(severities), top1, marker=".", color=f"C{index}", label=plain_text(row))
            if "val" in cells:
                clean = report.mean_top1(cells["val"], runs)
                axis.axhline(clean, color=f"C{index}", linestyle="--", linewidth=0.9)
        chance = axis.axhline(100 / len(evaluation["wnids"]), color="gray", linestyle=":", linewidth=1.2)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xticks(list(testsets.SEVERITIES))
    figure.supxlabel("severity")
    figure.supylabel("top-1, %")
    handles, labels = axes[0].get_legend_handles_labels()
    if "val" in cells:
        handles, labels = [*handles, axes[0].plot([], [], "--", color="gray")[0]], [*labels, "on val"]
    figure.legend([*handles, chance], [*labels, "chance"], loc="outside upper center", ncols=min(4, len(handles) + 1))
    return figure


def class_bars(evaluation: Mapping, suite: str, base: str, row: str) -> "Figure":
    """A bar for each class: its top-1 in `row` minus that in `base`, with its standard error.

    Of many classes, those that `row` helps and harms most. evaluation: what eval_robustness.py --json wrote.
    """
    found = report.class_differences(evaluation, suite, base, row)
    shown = found if len(found) <= 2 * CLASSES else found[:CLASSES] + found[-CLASSES:]
    figure, (axis,) = _panels(1, 1, (7.5, 0.19 * len(shown)), 1.6)
    places = range(0, -len(shown), -1)
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
    drawn = f"; drawn: the {CLASSES} at either end" if len(shown) < len(found) else ""
    title = f"{suite}: {plain_text(row)} against {plain_text(base)}"
    axis.set_title(f"{title}\nclasses helped: {helped}, harmed: {harmed}, of {len(found)}{drawn}", fontsize=10)
    return figure


# Pictures of training views; without matplotlib


def save_views(
    path: str, query: torch.Tensor, key: torch.Tensor, negatives: torch.Tensor, titles: Sequence[str]
) -> None:
    """Write a picture of a step's views, a column each and small images enlarged.

    query, key: normalised images (N, 3, S, S); negatives: (N, n, 3, S, S); titles: n of them, for the negatives.
    """
    columns = dict(zip(["query", "key", *titles], [query, key, *negatives.unbind(1)]))
    side = query.shape[3] * max(1, TILE // query.shape[3])
    step = side + GAP
    sheet = Image.new("RGB", (step * len(columns) + GAP, LABEL_HEIGHT + step * len(query)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(min(side, TILE) // 9)
    for column, (label, images) in enumerate(columns.items()):
        left = GAP + column * step
        pen.text((left + 2, 5), label, fill="black", font=font)
        for row, image in enumerate(augment.denormalize(images).cpu()):
            sheet.paste(to_pil_image(image).resize((side, side), Image.BICUBIC), (left, LABEL_HEIGHT + row * step))
    sheet.save(path)


# Command


def parse_args() -> argparse.Namespace:
    parser = options.OptionParser("Draw training logs, or the classes that a row of an evaluation helps and harms.")
    parser.prog = "plot.py"  # as errors begin
    # fmt: off
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help=f"{LOG_NAME} of runs, or one JSON file of eval_robustness.py")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture: .png, .pdf or .svg")
    parser.add_argument("--set", default="val", metavar="SET", help="of an evaluation: val, corruption, sketch, …")
    parser.add_argument("--rows", nargs=2, metavar=("BASE", "ROW"),
                        help="of an evaluation: compare ROW with BASE; default: the first two")
    # fmt: on
    return parser.parse_args()


def read_evaluation(path: str) -> dict:
    """The content of an eval_robustness.py --json file. Raises UsageError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not (content["checkpoints"] and content["cells"]):
            raise ValueError("it holds no results")
    except Exception as error:  # whatever fails in reading means: damaged, or not ours
        reason = f"not JSON of an evaluation ({type(error).__name__}: {first_line(error)})"
        raise UsageError(
            f"{path}: {reason}; name what eval_robustness.py --json wrote, or a run's {LOG_NAME}"
        ) from error
    return content


def draw(args: argparse.Namespace) -> "Figure":
    if not any(path.endswith(".json") for path in args.files):
        return curves(read_runs(args.files))
    if len(args.files) > 1:
        raise UsageError(f"{args.files[1]}: an evaluation is drawn by itself; one JSON file holds all of its rows")
    evaluation = read_evaluation(args.files[0])
    rows = args.rows or list(report.rows_of(evaluation))[:2]
    if len(rows) < 2:
        raise UsageError(f"{args.files[0]}: it has one row, {rows[0]}; evaluate two rows, --pretrained A=FILE B=FILE")
    return class_bars(evaluation, args.set, *rows)


def check_picture(option: str, path: str) -> None:
    """Raise UsageError unless a picture can be drawn to this file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{option} {path}: matplotlib is not installed; pip install matplotlib")
    options.check_file(option, path, endings=(".png", ".pdf", ".svg"))


def main() -> None:
    args = parse_args()
    check_picture("--out", args.out)
    draw(args).savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli_main(main, again="run the same command again")
