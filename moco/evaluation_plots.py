"""Pictures of an evaluation: corruptions by severity, and the classes that a row helps and harms. Needs matplotlib."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moco import by_class, testsets

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


def classes(evaluation: Mapping, suite: str, base: str, row: str) -> "Figure":
    """A bar for each class: its top-1 in `row` minus that in `base`, with its standard error.

    Of many classes, those that `row` helps and harms most. evaluation: what eval_robustness.py --json wrote.
    """
    from matplotlib.figure import Figure

    found = by_class.class_differences(evaluation, suite, base, row)
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
