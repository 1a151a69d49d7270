"""docs/studies: which runs the study of docs/effect.md makes, and its tables."""

import re

import pytest
from helpers import REPOSITORY

from docs.studies import effect, tables


def results(runs):
    """Lines for some runs: val counts them, the other columns are 10 below."""
    figures = [dict.fromkeys(effect.COLUMNS, 40.0) | {"val": 50.0 + place} for place in range(len(runs))]
    return {run.name: {"name": run.name, "data": run.data, "figures": each} for run, each in zip(runs, figures)}


def test_no_two_runs_share_a_name_and_the_best_of_the_grid_are_repeated():
    grid = effect.stages({})["grid"]
    assert effect.best_settings(results(grid[:-1])) is None
    stages = effect.stages(results(grid))
    assert {run.settings for run in stages["best"]} == {grid[-1].settings}
    runs = sum(map(list, stages.values()), [])
    assert len({run.name for run in runs}) == len(set(runs))
    options = effect.Run(effect.MAIN, 2.5, 7, effect.changed(lr=0.12, moco_k=512)).pretraining_options()
    assert {"--lr=0.12", "--moco-k=512", "--alpha=2.5", "--robust=patch", "--seed=7"} <= set(options)
    assert "--robust=none" in effect.Run(effect.MAIN, None, 7).pretraining_options()


def test_the_pages_hold_what_the_report_makes_of_the_results(tmp_path):
    assert tables.p_value([1, -1, 2, 0.5, 0.1, 0.3]) == pytest.approx(0.2874337, abs=1e-6)  # of scipy
    assert tables.holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    pytest.importorskip("matplotlib")
    pages = {name: (REPOSITORY / "docs" / name).read_text() for name in effect.PAGES}
    for name, text in pages.items():
        (tmp_path / name).write_text(re.sub(r"(?s)(<!-- (\w+) -->\n).*?(\n<!-- /\2 -->)", r"\1\3", text))
    studies = REPOSITORY / "docs" / "studies"
    effect.write_report(studies / "effect.jsonl", studies / "effect_mechanism.jsonl", tmp_path)
    assert {name: (tmp_path / name).read_text() for name in pages} == pages
