"""Finished runs that disturbed ones are compared with."""

from types import SimpleNamespace

import pytest
from helpers import (
    EVALUATE,
    PRETRAIN,
    PROBE,
    SMALL,
    SMALL_PROBE,
    TORCHRUN,
    log,
    run_script,
    same,
    weights,
    write_folder,
)

LATEST = {PRETRAIN: "checkpoint_latest.pth.tar", PROBE: "checkpoint_robust_random.pth.tar"}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Undisturbed runs of three epochs of five steps: their data, commands and results.

    command(script, folder, *options) trains in a folder; assert_continues(script, folder, *options) resumes what was
    saved there and compares the end with the undisturbed run.
    """
    root = tmp_path_factory.mktemp("whole")
    data = write_folder(root / "data", train=20)

    def command(script, folder, *options):
        small = [*SMALL, "--knn", "--knn-freq", 1] if script == PRETRAIN else SMALL_PROBE
        return [script, *small, "--epochs", 3, "-p", 1, *options, "--ckpt_path", folder, data]

    def assert_equal(script, folder, other=None):
        other, name = other or root / script, LATEST[script]
        mine, theirs = log(folder), log(other)
        for line, wanted in zip(mine, theirs):
            if "knn_top1" not in line:  # a signal in the last step of an epoch skips its kNN
                wanted.pop("knn_top1", None)
        assert mine == theirs and same(weights(folder / name), weights(other / name))

    def assert_continues(script, folder, *options, launcher=(), other=None):
        again = run_script(*command(script, folder, *options, "--resume", "auto"), launcher=launcher)
        assert_equal(script, folder, other)
        return again

    def evaluation(folder):
        head = root / PROBE / "model_best_random.pth.tar"
        return [EVALUATE, "--pretrained", head, "--val", data, "-j", 0, "--json", folder / "r.json"]

    for script in (PRETRAIN, PROBE):
        run_script(*command(script, root / script))
    return SimpleNamespace(
        command=command, assert_equal=assert_equal, assert_continues=assert_continues, evaluation=evaluation,
        folder=lambda script: root / script,
    )  # fmt: skip


@pytest.fixture(scope="session")
def whole_of_two(whole, tmp_path_factory):
    """The folder of the undisturbed pre-training of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    run_script(*whole.command(PRETRAIN, folder), launcher=[*TORCHRUN, "--nproc-per-node=2"])
    return folder
