"""docs/studies: which runs the study of docs/effect.md makes, and its tables, from made-up results."""

import json

import pytest
from helpers import REPOSITORY

from docs.studies import effect


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


def test_the_report_fills_every_mark_of_the_pages(tmp_path):
    pytest.importorskip("matplotlib")
    for name in effect.PAGES:
        (tmp_path / name).write_text((REPOSITORY / "docs" / name).read_text())
    lines = results([run for stage in effect.stages({}).values() for run in stage]).values()
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    effect.write_report(tmp_path / "results.jsonl", tmp_path / "none.jsonl", tmp_path)
    written = [(tmp_path / name).read_text() for name in effect.PAGES]
    assert "| alpha 2 − plain | 5 |" in written[0] and "plain, 24 epochs" in written[1]
    assert (tmp_path / "effect_alpha.png").stat().st_size < 100_000
    effect.write_report(tmp_path / "results.jsonl", tmp_path / "none.jsonl", tmp_path)
    assert [(tmp_path / name).read_text() for name in effect.PAGES] == written
