"""Tables of a study: means over seeds, paired differences with errors and p-values, the pages they stand in."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def mean_sd(values: list[float], digits: int = 1) -> str:
    spread = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def difference(values: list[float]) -> str:
    """Mean ± standard error of paired differences, and t."""
    mean = statistics.fmean(values)
    digits = 1 if abs(mean) >= 1 else 2
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.{digits}f}±{error:.{digits}f}" + (f" (t {mean / error:.1f})" if error else "")


def p_value(values: list[float]) -> float:
    """Two-sided p of Student's t-test that the mean of these paired differences is 0."""
    df, error = len(values) - 1, statistics.stdev(values) / len(values) ** 0.5
    if not error:
        return 1.0
    t, steps = abs(statistics.fmean(values) / error), 2000
    density = [(1 + (t * (i + 0.5) / steps) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps)]  # midpoint rule
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    return 1 - 2 * scale * t / steps * math.fsum(density)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."""
    order, corrected, highest = sorted(range(len(p_values)), key=p_values.__getitem__), {}, 0.0
    for place, index in enumerate(order):
        highest = corrected[index] = max(highest, min(1.0, (len(order) - place) * p_values[index]))
    return [corrected[index] for index in range(len(order))]


def p_row(pairs: list[list[float]]) -> list[str]:
    """The cells below a row of paired differences, those of a column in each list."""
    return [f"{p:.3f}" if p >= 0.001 else "<0.001" for p in holm(list(map(p_value, pairs)))]


def rewrite(docs: Path, names: Sequence[str], tables: Mapping[str, str]) -> None:
    """Put each table, {mark: table}, between its marks in one of those pages. ValueError: a mark is missing."""
    pages = {docs / name: (docs / name).read_text() for name in names}
    for mark, table in tables.items():
        start, end = f"<!-- {mark} -->\n", f"\n<!-- /{mark} -->"
        path = next((path for path, text in pages.items() if start in text), None)
        if path is None or end not in pages[path].split(start)[1]:
            raise ValueError(f"{docs}: there is no {start.strip()} … {end.strip()} in {' or '.join(names)}")
        before, rest = pages[path].split(start)
        pages[path] = before + start + table + end + rest.split(end)[1]
    for path, text in pages.items():
        path.write_text(text)
