"""Pictures: curves of training logs, and the views of a training step.

Loss, similarities, spread and accuracies over the epochs, several runs side by side:
    python -m moco.plot ckpts/*/log.jsonl --out curves.png
All but the views need matplotlib.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from moco import augment, options
from moco.errors import UsageError, printable
from moco.processes.exits import cli_main
from moco.training import metrics

PANELS = {  # title: {key of the figures: line style}
    "loss": {"loss": "-"},
    "cosine": {"q_k": "-", "q_t": "--", "q_queue": ":"},
    "spread": {"spread": "-"},
    "contrast accuracy, %": {"contrast_acc": "-"},
    "200-nearest-neighbour top-1, %": {"knn_top1": "-"},
    "probe: loss": {"probe: loss": "-"},
    "probe: top-1 on train/, %": {"probe: acc1": "-"},
    "probe: top-1 on val/, %": {"probe: val_acc1": "-"},
}
TILE = 224  # px; smaller crops are enlarged to about this side in a picture of views
LABEL_HEIGHT, GAP = 34, 6  # px
Runs = dict[str, dict[str, dict[int, float]]]  # {label: {key of the log, a probe's after "probe: ": {epoch: figure}}}


def read_runs(paths: Sequence[str]) -> Runs:
    """The pre-training runs and the probes' heads in these logs, labelled by the folder as it was given.

    Damaged lines and logs without a line are left out, which stderr says. Raises UsageError if a file is missing.
    """
    runs: Runs = {}
    for path in paths:
        if not os.path.isfile(path):
            raise UsageError(f"{path}: no such file; name the log.jsonl of a run")
        records, damaged = metrics.read_jsonl(path)
        if damaged or not records:
            print(f"{path}: {len(records)} epochs, {damaged} damaged lines are left out", file=sys.stderr)
        runs |= runs_of(path.removesuffix("/log.jsonl"), records)
    return runs


def runs_of(name: str, records: Iterable[Mapping]) -> Runs:
    """The pre-training run of a log, and each head of each probe, known by the learning rate that it began with."""
    runs: Runs = {}
    labels = {None: [name]}
    for record in records:
        probe = record.get("probe")
        if probe not in labels:
            labels[probe] = [f"{name}, probe {probe}, lr {lr:g}" for lr in record.get("lr", [])]
        for key, value in record.items():
            values = value if isinstance(value, list) else [value] * len(labels[probe])
            for label, figure in zip(labels[probe], values):
                if isinstance(figure, (int, float)):
                    figures = runs.setdefault(label, {}).setdefault(key if probe is None else f"probe: {key}", {})
                    figures[record["epoch"]] = figure
    return runs


def curves(runs: Runs) -> Any:
    """A matplotlib Figure with a panel for each figure of the runs over the epochs. UsageError if they have none."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    found = {key for figures in runs.values() for key in figures}
    panels = {title: keys for title, keys in PANELS.items() if keys.keys() & found}
    if not panels:
        raise UsageError("nothing to draw: the logs have no epoch with figures of a training run")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows + 0.25 * len(runs)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    colours = colormaps["turbo"](torch.linspace(0.05, 0.95, len(runs)).numpy())
    for axis, (title, keys) in zip(axes, panels.items()):
        axis.set_title(title, fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for figures, colour in zip(runs.values(), colours):
            for key, style in keys.items():
                points = figures.get(key, {})
                line = {"color": colour, "marker": ".", "markersize": 5, "linewidth": 1.3}
                axis.plot(list(points), list(points.values()), style, **line)
        if title == "probe: loss":
            axis.set_yscale("log")  # one head that diverged must not flatten all others
        if title == "spread":
            axis.set_ylim(0, 1.03)  # its own range would make noise look like a collapse
        if len(keys) > 1:
            styles = [axis.plot([], [], style, color="gray", linewidth=1.3)[0] for style in keys.values()]
            axis.legend(styles, [metrics.SYMBOLS[key] for key in keys], fontsize=8)
    figure.supxlabel("epoch", fontsize=10)
    handles = [axes[0].plot([], [], color=colour)[0] for colour in colours]
    labels = [f" {printable(label)[-60:]}".replace("$", r"\$") for label in runs]  # $: a formula; a first _: hidden
    figure.legend(handles, labels, loc="outside upper center", fontsize=9, ncols=columns)  # a panel holds 60 letters
    return figure


# Training views; without matplotlib


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


def parse_args() -> argparse.Namespace:
    parser = options.OptionParser("Draw the curves of training logs.")
    parser.prog, parser.usage = "plot.py", "%(prog)s LOG…\nto begin: python -m moco.plot RUN/log.jsonl --out log.png"
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl of runs")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture: .png, .pdf or .svg")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--out {args.out}: matplotlib is not installed; pip install matplotlib")
    options.check_file("--out", args.out, endings=(".png", ".pdf", ".svg"))
    curves(read_runs(args.logs)).savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli_main(main, again="run the same command again")
