"""docs/studies: which runs the studies make, and that the pages hold the tables that follow from the results."""

import re

import pytest
from helpers import REPOSITORY

from docs.studies import effect, emoji, tables
from docs.studies.runs import read_results


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


def emptied(names, folder):
    """{name: text} of pages of docs/, and copies in a folder without what stands between the marks."""
    pages = {name: (REPOSITORY / "docs" / name).read_text() for name in names}
    for name, text in pages.items():
        (folder / name).write_text(re.sub(r"(?s)(<!-- (\w+) -->\n).*?(\n<!-- /\2 -->)", r"\1\3", text))
    return pages


def test_the_pages_hold_what_the_report_makes_of_the_results(tmp_path):
    assert tables.p_value([1, -1, 2, 0.5, 0.1, 0.3]) == pytest.approx(0.2874337, abs=1e-6)  # of scipy
    assert tables.holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    pytest.importorskip("matplotlib")
    pages = emptied(effect.PAGES, tmp_path)
    studies = REPOSITORY / "docs" / "studies"
    effect.write_report(studies / "effect.jsonl", studies / "effect_mechanism.jsonl", tmp_path)
    assert {name: (tmp_path / name).read_text() for name in pages} == pages


def test_the_emoji_study_runs_what_plain_alone_chose():
    def lines(runs, vals):
        return {run.name: {"figures": {"val": val}} for run, val in zip(runs, vals)}

    assert [len(runs) for runs in emoji.stages({}).values()] == [12, 0, 0, 0]
    tuned = lines(emoji.GRID, [20.0] * 5 + [21.0] + [20.0] * 6)
    longer = emoji.stages(tuned)["length"]
    assert [run.epochs for run in longer] == [20, 40, 80] and longer[0] == emoji.GRID[5]
    for vals, epochs in ((21, 22.6, 30), 20), ((21, 23, 24), 40), ((21, 23, 25), 80), ((21, 19, 25), 20):
        stages = emoji.stages(tuned | lines(longer, vals))
        assert {run.epochs for run in stages["pairs"] + stages["others"]} == {epochs}
    pairs, others = stages["pairs"], stages["others"]
    assert [run.arm for run in pairs] == ["plain", "patch2"] * 5 and [run.seed for run in pairs[::2]] == [*emoji.SEEDS]
    assert [run.arm for run in others] == ["texture2"] * 3 + ["patch1"] * 3 + ["patch3"] * 3
    assert {run.data for run in pairs + others} == {"emoji"} and emoji.best({}, emoji.GRID) is None
    assert {run[4:7] for run in pairs + others} == {emoji.GRID[5][4:7]}


def test_the_page_of_emoji_holds_what_the_report_makes_of_the_results(tmp_path):
    pages = emptied(emoji.PAGES, tmp_path)
    results = read_results(REPOSITORY / "docs" / "studies" / "emoji.jsonl")
    tables.rewrite(tmp_path, emoji.PAGES, emoji.tables(results))
    assert {name: (tmp_path / name).read_text() for name in pages} == pages
