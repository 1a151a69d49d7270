"""The end of the quick start: a sentence on what this run found, and a picture of it.

    python -m moco.quickstart quickstart_out/table.json --views quickstart_out/patch.png --out quickstart_out/result.png

Reads what eval_robustness.py --json wrote, and pictures that moco-non-sem-neg.py --preview drew. The table's first row
is the baseline; run i of another row is compared with run i of the baseline, which has the same seed.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from PIL import Image, ImageDraw, ImageFont

COLUMNS = ("val", "Corruption", "Sketch", "Stylized", "Rendition", "Shape bias")  # those of the table that are drawn
COLOURS = ("#6b6b6b", "#0b66b3", "#d9730d", "#2b8a57", "#8a3ffc", "#b3123f")  # of the rows, in their order
WIDTH, HEIGHT = 1600, 900  # px, of the picture
SCALE = 2  # drawn this much larger, then averaged

Table = dict[str, dict[str, list[float]]]  # row, column → a figure for each run, in percent


class Difference(NamedTuple):
    """A row against the baseline in one column, in points."""

    mean: float
    error: float | None  # standard error of the paired differences; None for a single pair

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + ("" if self.error is None else f"±{self.error:.1f}")


def read_table(path: Path) -> Table:
    """The table of a finished evaluation. OSError or ValueError where there is none in the file."""
    table = json.loads(path.read_text()).get("table")
    if not table:
        raise ValueError("it holds no table; the evaluation did not finish")
    return {row: {column: figures[column] for column in COLUMNS if column in figures} for row, figures in table.items()}


def differences(table: Table) -> dict[str, dict[str, Difference]]:
    """Each row but the first against the first, column by column, by pairs of runs."""
    (_, baseline), *others = table.items()
    return {
        row: {column: difference(runs, baseline[column]) for column, runs in figures.items() if column in baseline}
        for row, figures in others
    }


def difference(runs: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The mean of runs[i] - baseline[i]; of the means, without an error, where their numbers differ."""
    if len(runs) != len(baseline):
        return Difference(statistics.fmean(runs) - statistics.fmean(baseline), None)
    pairs = [one - other for one, other in zip(runs, baseline)]
    return Difference(statistics.fmean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None)


def sentences(table: Table) -> list[str]:
    """What the table shows, a sentence for each row but the first, and one on how far to trust them."""
    baseline, runs = next(iter(table)), max(len(runs) for row in table.values() for runs in row.values())
    lines = [sentence(row, baseline, found) for row, found in differences(table).items()]
    if runs > 1:
        spread = {column: statistics.stdev(figures) for column, figures in table[baseline].items() if len(figures) > 1}
        lines.append(
            f"Means of {runs} paired seeds ± standard error; {baseline} itself varies from seed to seed with a"
            f" standard deviation of {min(spread.values()):.1f} (" + min(spread, key=spread.get) + ") to"
            f" {max(spread.values()):.1f} points (" + max(spread, key=spread.get) + ")."
        )
    else:
        lines.append("One seed: another seed moves each figure by some points; QUICKSTART_SEEDS=3 shows by how much.")
    return lines


def sentence(row: str, baseline: str, found: dict[str, Difference]) -> str:
    """One row in words. With several seeds a column counts as better or worse beyond two standard errors."""
    better, worse = (
        [column for column, one in found.items() if sign * one.mean > 2 * (one.error or 0)] for sign in (1, -1)
    )
    verdict = f"better in {len(better)} of {len(found)} columns"
    if worse:
        verdict += f", worse in {len(worse)} ({', '.join(worse)})"
    if len(better) + len(worse) < len(found):
        verdict += f", within noise in {len(found) - len(better) - len(worse)}"
    return (
        f"{row} against {baseline}: {verdict}; "
        + ", ".join(f"{column} {one}" for column, one in found.items())
        + " points."
    )


# --- the picture


class Pen:
    """Draws in picture coordinates on a sheet SCALE times as large."""

    def __init__(self, width: int, height: int):
        self.sheet = Image.new("RGB", (SCALE * width, SCALE * height), "white")
        self.draw = ImageDraw.Draw(self.sheet)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> None:
        self.draw.line([(SCALE * x, SCALE * y) for x, y in points], colour, round(SCALE * width))

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.draw.ellipse(
            [SCALE * (x - radius), SCALE * (y - radius), SCALE * (x + radius), SCALE * (y + radius)], colour
        )

    def text(self, x: float, y: float, text: str, size: int, colour: str = "#222222", anchor: str = "la") -> None:
        self.draw.text((SCALE * x, SCALE * y), text, colour, ImageFont.load_default(SCALE * size), anchor)

    def picture(self, image: Image.Image, x: float, y: float, width: float, height: float) -> float:
        """Paste an image as large as it fits; returns the height it takes."""
        zoom = min(SCALE * width / image.width, SCALE * height / image.height)
        large = image.resize((round(zoom * image.width), round(zoom * image.height)), Image.LANCZOS)
        self.sheet.paste(large, (round(SCALE * x), round(SCALE * y)))
        return large.height / SCALE

    def save(self, path: Path) -> None:
        self.sheet.reduce(SCALE).save(path, optimize=True)


def draw(table: Table, views: Sequence[Image.Image], path: Path) -> None:
    """Save the picture: a group of dots for each column of the table, and beside them the views in one column."""
    pen = Pen(WIDTH, HEIGHT)
    runs = max(len(runs) for row in table.values() for runs in row.values())
    plot_width = WIDTH - 60 - (430 if views else 0)
    pen.text(50, 36, "Negatives that keep the texture and lose the shape", 34)
    pen.text(
        50,
        84,
        "linear probe on generated data, top-1 in percent, "
        + (f"means and single runs of {runs} seeds" if runs > 1 else "one seed"),
        20,
        "#666666",
    )
    draw_legend(pen, list(table), 50, 126, plot_width)
    draw_dots(pen, table, left=90, top=220, right=plot_width, bottom=HEIGHT - 70)
    y, height = 130.0, (HEIGHT - 130 - 30 * len(views)) / max(1, len(views))
    for image in views:
        y += pen.picture(image, plot_width + 40, y, WIDTH - plot_width - 70, height) + 30
    if views:
        pen.text(plot_width + 40, 84, "queries, keys, negatives (NS) as trained on", 20, "#666666")
    pen.save(path)


def draw_legend(pen: Pen, rows: Sequence[str], x: float, y: float, right: float) -> None:
    """The rows' names beside their dots, two lines where one is too short."""
    left = x
    for row, colour in zip(rows, cycled(COLOURS)):
        length = pen.draw.textlength(row, ImageFont.load_default(SCALE * 22)) / SCALE
        if x + length + 30 > right:
            x, y = left, y + 34
        pen.dot(x + 9, y + 13, 9, colour)
        pen.text(x + 28, y + 13, row, 22, anchor="lm")
        x += length + 66


def draw_dots(pen: Pen, table: Table, left: float, top: float, right: float, bottom: float) -> None:
    """A labelled axis, and for each column the rows side by side: a dot for the mean, a line over the runs' range."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    figures = [figure for row in table.values() for runs in row.values() for figure in runs]
    low, high = 10 * int(min(figures) / 10 - 0.2), min(100, 10 * int(max(figures) / 10 + 1.2))

    def height(figure: float) -> float:
        return bottom - (figure - low) / (high - low) * (bottom - top)

    for tick in range(low, high + 1, 10):
        pen.line([(left, height(tick)), (right, height(tick))], "#e4e4e4")
        pen.text(left - 12, height(tick), str(tick), 18, "#666666", "rm")
    group = (right - left) / len(columns)
    for place, column in enumerate(columns):
        middle = left + (place + 0.5) * group
        if column == "Shape bias":  # not an accuracy
            pen.line([(left + place * group, top), (left + place * group, bottom)], "#999999")
        pen.text(middle, bottom + 24, column, 22, anchor="ma")
        for number, (figures_of_row, colour) in enumerate(zip(table.values(), cycled(COLOURS))):
            if column in figures_of_row:
                x = middle + (number - (len(table) - 1) / 2) * group / (len(table) + 0.6)
                draw_runs(pen, x, [height(figure) for figure in figures_of_row[column]], figures_of_row[column], colour)


def draw_runs(pen: Pen, x: float, heights: Sequence[float], figures: Sequence[float], colour: str) -> None:
    """The runs of one row in one column: their range, each run, their mean and its value."""
    pen.line([(x, min(heights)), (x, max(heights))], colour, 2)
    for height in heights if len(heights) > 1 else ():
        pen.line([(x - 7, height), (x + 7, height)], colour, 2)
    pen.dot(x, statistics.fmean(heights), 9, colour)
    pen.text(x, min(*heights, statistics.fmean(heights) - 9) - 5, f"{statistics.fmean(figures):.0f}", 17, colour, "mb")


def cycled(colours: Sequence[str]) -> Iterator[str]:
    """The colours over and over: more rows than colours are still drawn."""
    while True:
        yield from colours


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, " ".join(f"{self.prog}: error: {message}".split()) + "\n")


def main() -> None:
    parser = Parser(prog="python -m moco.quickstart", description="Say and draw what a robustness table shows.")
    parser.add_argument("table", type=Path, metavar="TABLE.json", help="what eval_robustness.py --json wrote")
    parser.add_argument(
        "--views", type=Path, nargs="*", default=[], metavar="FILE.png", help="what moco-non-sem-neg.py --preview drew"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    args = parser.parse_args()
    if args.out.suffix != ".png":
        parser.error(f"--out {args.out} does not end in .png; try {args.out.with_suffix('.png')}")
    try:
        table = read_table(args.table)
        views = [Image.open(path).convert("RGB") for path in args.views]
        draw(table, views, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error) if isinstance(error, OSError) else f"{args.table}: {error}")
    print("\n".join(sentences(table)))


if __name__ == "__main__":
    main()
