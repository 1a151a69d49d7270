"""Describe and draw the result of the quick start; quickstart.sh runs it last.

    python docs/quickstart_result.py quickstart_out/table.json --views quickstart_out/patch.png --out result.png

Reads what eval_robustness.py --json wrote, and pictures that moco-non-sem-neg.py --preview drew. The table's first row
is the baseline. Needs only PIL.
"""

import argparse
import itertools
import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLUMNS = ("val", "Corruption", "Sketch", "Stylized", "Rendition", "Shape bias")  # the columns that are drawn
COLOURS = ("#6b6b6b", "#0b66b3", "#d9730d", "#2b8a57", "#8a3ffc", "#b3123f")  # of the rows, in their order
GREY, LIGHT = "#666666", "#e4e4e4"
WIDTH, HEIGHT = 1600, 900  # px, of the picture
SCALE = 2  # drawn this much larger, then averaged

Table = dict[str, dict[str, list[float]]]  # row, column → a figure for each run, in percent
Differences = dict[str, dict[str, "Difference"]]  # row, column → against the first row


class Difference(NamedTuple):
    """A row against the baseline in one column, in points."""

    mean: float
    error: float  # standard error: over runs if there are three or more, else over the test images

    def __str__(self) -> str:
        return f"{self.mean:+.1f}±{self.error:.1f}"


def read_table(path: Path) -> tuple[Table, Differences]:
    """The table of a finished evaluation. OSError or ValueError where there is none in the file."""
    content = json.loads(path.read_text())
    if not content.get("table"):
        raise ValueError("it holds no table; the evaluation did not finish")
    found = {
        row: {column: Difference(*pair) for column, pair in own.items() if column in COLUMNS}
        for row, own in content["differences"].items()
    }
    return {row: {c: own[c] for c in COLUMNS if c in own} for row, own in content["table"].items()}, found


def text(table: Table, differences: Differences) -> str:
    """The table for a terminal of 80 columns: mean±standard deviation, and below a row its difference."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    widths = [max(len(column), 9) + 1 for column in columns]

    def line(title: str, cells: Sequence[str]) -> str:
        return f"{title:<18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))

    lines = [line("top-1 %", columns)]
    for row, own in table.items():
        lines.append(line(row, [mean_sd(own.get(column, [])) for column in columns]))
        if found := differences.get(row):
            lines.append(line("  difference", [str(found.get(column, "")) for column in columns]))
    return "\n".join(lines)


def mean_sd(runs: Sequence[float]) -> str:
    spread = f"±{statistics.stdev(runs):.1f}" if len(runs) > 1 else ""
    return f"{statistics.fmean(runs):.1f}{spread}" if runs else ""


def sentences(table: Table, differences: Differences) -> list[str]:
    """A sentence on each row but the first, and one on how far to trust them."""
    title = next(iter(table))
    lines = [sentence(row, title, found) for row, found in differences.items()]
    runs = max_runs(table)
    if runs < 3:
        return [
            *lines,
            "± standard error over the test images; another seed moves a figure by more: QUICKSTART_SEEDS=3",
        ]
    return [*lines, f"Means of {runs} seeds; ± standard error of the difference, over the seeds."]


def sentence(row: str, baseline: str, found: dict[str, Difference]) -> str:
    """One row in words. A column counts as better or worse beyond two standard errors of the difference."""
    better, worse = ([column for column, one in found.items() if sign * one.mean > 2 * one.error] for sign in (1, -1))
    verdict = f"better in {len(better)} of {len(found)} columns"
    if worse:
        verdict += f", worse in {len(worse)} ({', '.join(worse)})"
    if len(better) + len(worse) < len(found):
        verdict += f", within noise in {len(found) - len(better) - len(worse)}"
    return f"{row} against {baseline}: {verdict}."


def max_runs(table: Table) -> int:
    return max(len(runs) for row in table.values() for runs in row.values())


# --- the picture


class Pen:
    """Draw in picture coordinates on a sheet SCALE times as large."""

    def __init__(self, width: int, height: int):
        self.sheet = Image.new("RGB", (SCALE * width, SCALE * height), "white")
        self.draw = ImageDraw.Draw(self.sheet)

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1) -> None:
        self.draw.line([SCALE * at for at in (*start, *end)], colour, round(SCALE * width))

    def dot(self, x: float, y: float, colour: str, radius: float = 9) -> None:
        self.draw.ellipse([SCALE * at for at in (x - radius, y - radius, x + radius, y + radius)], colour)

    def text(self, x: float, y: float, text: str, size: int, colour: str = "#222222", anchor: str = "la") -> None:
        self.draw.text((SCALE * x, SCALE * y), text, colour, ImageFont.load_default(SCALE * size), anchor)

    def picture(self, image: Image.Image, x: float, y: float, width: float, height: float) -> float:
        """Paste an image as large as it fits; returns the height it takes."""
        zoom = min(SCALE * width / image.width, SCALE * height / image.height)
        large = image.resize((round(zoom * image.width), round(zoom * image.height)), Image.LANCZOS)
        self.sheet.paste(large, (round(SCALE * x), round(SCALE * y)))
        return large.height / SCALE


def draw(table: Table, differences: Differences, views: Sequence[Image.Image], path: Path) -> None:
    """Save the picture: a group of dots for each column of the table, and beside them the views in one column."""
    pen, runs = Pen(WIDTH, HEIGHT), max_runs(table)
    plot_width = WIDTH - 60 - (430 if views else 0)
    pen.text(50, 36, "Negatives that keep the texture and lose the shape", 34)
    counted = f"means and single runs of {runs} seeds" if runs > 1 else "one seed, ± error of the difference"
    pen.text(50, 84, f"linear probe, top-1 in percent, {counted}", 20, GREY)
    draw_legend(pen, list(table), 50, 126, plot_width)
    draw_dots(pen, table, differences, left=90, top=220, right=plot_width, bottom=HEIGHT - 70)
    if views:
        pen.text(plot_width + 40, 84, "queries, keys, negatives (NS) as trained on", 20, GREY)
    y, height = 130.0, (HEIGHT - 130 - 30 * len(views)) / max(1, len(views))
    for image in views:
        y += pen.picture(image, plot_width + 40, y, WIDTH - plot_width - 70, height) + 30
    pen.sheet.reduce(SCALE).save(path, optimize=True)


def draw_legend(pen: Pen, rows: Sequence[str], x: float, y: float, right: float) -> None:
    """The rows' names beside their dots, on further lines where one is too short."""
    left = x
    for row, colour in zip(rows, itertools.cycle(COLOURS)):
        length = pen.draw.textlength(row, ImageFont.load_default(SCALE * 22)) / SCALE
        if x + length + 30 > right:
            x, y = left, y + 34
        pen.dot(x + 9, y + 13, colour)
        pen.text(x + 28, y + 13, row, 22, anchor="lm")
        x += length + 66


def draw_dots(
    pen: Pen, table: Table, differences: Differences, left: float, top: float, right: float, bottom: float
) -> None:
    """A labelled axis, and for each column the rows side by side: a dot for the mean, a line over the runs' range.

    Of a single run the line is the standard error of its difference from the first row.
    """
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    spans = {
        (row, column): [runs[0] - error, runs[0] + error] if len(runs) == 1 else runs
        for row, own in table.items()
        for column, runs in own.items()
        for error in [differences.get(row, {}).get(column, Difference(0, 0)).error]
    }
    figures = [figure for span in spans.values() for figure in span]
    low, high = 10 * int(min(figures) / 10 - 0.2), min(100, 10 * int(max(figures) / 10 + 1.2))

    def height(figure: float) -> float:
        return bottom - (figure - low) / (high - low) * (bottom - top)

    for tick in range(low, high + 1, 10):
        pen.line((left, height(tick)), (right, height(tick)), LIGHT)
        pen.text(left - 12, height(tick), str(tick), 18, GREY, "rm")
    group = (right - left) / len(columns)
    for place, column in enumerate(columns):
        start = left + place * group
        pen.text(start + group / 2, bottom + 24, column, 22, anchor="ma")
        if column == "Shape bias":  # not an accuracy
            pen.line((start, top), (start, bottom), "#999999")
        for number, ((row, own), colour) in enumerate(zip(table.items(), itertools.cycle(COLOURS))):
            if runs := own.get(column):
                x = start + group / 2 + (number - (len(table) - 1) / 2) * group / (len(table) + 0.6)
                mean, heights = statistics.fmean(runs), [height(figure) for figure in spans[row, column]]
                pen.line((x, min(heights)), (x, max(heights)), colour, 2)
                for y in heights:
                    pen.line((x - 7, y), (x + 7, y), colour, 2)
                pen.dot(x, height(mean), colour)
                pen.text(x, min(*heights, height(mean) - 9) - 5, f"{mean:.0f}", 17, colour, "mb")


def main() -> None:
    parser = argparse.ArgumentParser(description="Describe and draw what a robustness table shows.")
    parser.add_argument("table", type=Path, metavar="TABLE.json", help="what eval_robustness.py --json wrote")
    parser.add_argument(
        "--views", type=Path, nargs="*", default=[], metavar="FILE.png", help="what moco-non-sem-neg.py --preview drew"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    args = parser.parse_args()
    try:
        table, differences = read_table(args.table)
        draw(table, differences, [Image.open(path).convert("RGB") for path in args.views], args.out)
    except (OSError, ValueError) as error:  # also an --out of a suffix that PIL does not know
        parser.exit(2, f"{parser.prog}: error: {args.table} → {args.out}: {error}\n")
    told = (textwrap.fill(each, 80) for each in sentences(table, differences))
    print(text(table, differences), "", *told, sep="\n")


if __name__ == "__main__":
    main()
