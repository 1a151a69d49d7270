"""docs/studies: which runs the study of docs/effect.md makes, and its tables, from made-up results."""

import json

import numpy as np
import pytest
import torch
from helpers import REPOSITORY

from docs.studies import effect, effect_mechanism


def results(runs):
    """Lines for some runs: val counts them, the other columns are 10 below."""
    return {
        run.name: {
            "name": run.name,
            "data": run.data,
            "figures": dict.fromkeys(effect.COLUMNS, 40.0) | {"val": 50.0 + place},
        }
        for place, run in enumerate(runs)
    }


def test_the_best_settings_have_the_highest_val_of_the_grid():
    grid = effect.stages({})["grid"]
    assert effect.best_settings(results(grid[:-1])) is None
    assert effect.best_settings(results(grid)) == grid[-1].settings
    assert {run.settings for run in effect.stages(results(grid))["best"]} == {grid[-1].settings}


def test_no_two_runs_share_a_name():
    runs = [run for stage in effect.stages(results(effect.stages({})["grid"])).values() for run in stage]
    assert len({run.name for run in runs}) == len(set(runs))
    options = effect.Run(effect.MAIN, 2.5, 7, effect.changed(lr=0.12, moco_k=512)).pretraining_options()
    assert {"--lr=0.12", "--moco-k=512", "--alpha=2.5", "--robust=patch", "--seed=7"} <= set(options)
    assert "--robust=none" in effect.Run(effect.MAIN, None, 7).pretraining_options()


def test_the_report_fills_every_mark_of_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    page = (REPOSITORY / "docs" / "effect.md").read_text()
    (tmp_path / "effect.md").write_text(page)
    lines = results([run for stage in effect.stages({}).values() for run in stage]).values()
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    effect.write_report(tmp_path / "results.jsonl", tmp_path / "none.jsonl", tmp_path)
    written = (tmp_path / "effect.md").read_text()
    assert "| alpha 2 − plain | 5 |" in written and "plain, 24 epochs" in written
    assert (tmp_path / "effect_alpha.png").stat().st_size < 100_000
    effect.write_report(tmp_path / "results.jsonl", tmp_path / "none.jsonl", tmp_path)
    assert (tmp_path / "effect.md").read_text() == written


def test_readouts_find_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(900, 8, generator=generator)
    wanted = features[:, :2] @ torch.tensor([[1.0], [2.0]])
    noise = torch.randn(900, 1, generator=generator)
    train, test = features[:600], features[600:]
    assert effect_mechanism.regression_r2(train, test, wanted[:600], wanted[600:]) > 99
    assert effect_mechanism.regression_r2(train, test, noise[:600], noise[600:]) < 5
    labels = features[:, :3].argmax(1)
    assert effect_mechanism.classification_accuracy(train, test, labels[:600], labels[600:]) > 90


def test_shuffled_tiles_come_from_the_image():
    image = torch.arange(3 * 56 * 56).view(3, 56, 56).float()
    negative = effect_mechanism.shuffled(image, np.random.default_rng(0))
    assert negative.shape == image.shape and set(negative[0].ravel().tolist()) <= set(image[0].ravel().tolist())
    assert torch.equal(negative[1] - negative[0], image[1] - image[0]) and not torch.equal(negative, image)
