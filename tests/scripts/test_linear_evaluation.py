"""main_lincls.py as people type it."""

import runpy
import shutil

import pytest
import torch
from helpers import (
    FAULTS,
    PRETRAIN,
    PROBE,
    REPOSITORY,
    SMALL,
    SMALL_PROBE,
    log,
    refused,
    run_script,
    same,
    weights,
    write_folder,
)

LAST, BEST = "checkpoint_robust_random.pth.tar", "model_best_random.pth.tar"
LRS = ("--lr", 0.01, 0.1, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("probe") / "data", train=20)  # 5 steps of 8 images per epoch


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Three heads trained for three epochs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run_script(PROBE, *SMALL_PROBE, *LRS, "--epochs", 3, "--ckpt_path", folder, data)
    return folder


def assert_equal_runs(one, other):
    """Log, heads, momenta, best accuracies and the best head's file are the same."""
    assert log(one) == log(other)
    first, second = (torch.load(folder / LAST, weights_only=True) for folder in (one, other))
    assert same(first["heads"], second["heads"]) and same(first["state_dict"], second["state_dict"])
    momenta = [[state["momentum_buffer"] for state in run["optimizers"]["state"].values()] for run in (first, second)]
    assert all(map(torch.equal, *momenta))
    names = ("epoch", "step", "lrs", "best_acc1", "best_acc1s", "winner", "seed", "wnids", "image_size")
    assert all(first[name] == second[name] for name in names)
    assert same(weights(one / BEST), weights(other / BEST))


def test_the_log_has_a_line_per_epoch_with_each_head(whole):
    records = log(whole)
    assert [record["epoch"] for record in records] == [0, 1, 2]
    for record in records:
        assert list(record) == ["probe", "epoch", "lr", "loss", "acc1", "bad_images", "val_acc1", "val_acc5"]
        assert (record["probe"], record["lr"], record["bad_images"]) == ("random", [0.01, 0.1, 1], 0)
        assert all(len(record[name]) == 3 for name in ("loss", "acc1", "val_acc1", "val_acc5"))
        assert len(set(record["loss"])) == 3 and record["val_acc5"] == [100, 100, 100]
    saved = torch.load(whole / LAST, weights_only=True)
    assert float(saved["best_acc1"]) == pytest.approx(max(max(record["val_acc1"]) for record in records), abs=1e-3)


def test_lr_drops_tenfold_at_the_schedule_in_the_log_too(data, tmp_path):
    schedule = ["--epochs", 3, "--schedule", 1, 2, "--lr", 1, "--ckpt_path", tmp_path, data]
    run = run_script(PROBE, *SMALL_PROBE, *schedule)
    assert [record["lr"] for record in log(tmp_path)] == [[1], [0.1], [0.01]]  # lists, as with several heads
    assert "epoch 1 [5/5]  loss " in run.stdout and "  lr 0.1  " in run.stdout


def test_stopped_within_an_epoch_and_resumed_equals_uninterrupted(data, whole, tmp_path):
    settings = [PROBE, *SMALL_PROBE, *LRS, "--epochs", 3, "--ckpt_path", tmp_path, data]
    run = run_script(FAULTS, "SIGTERM in step 8", *settings, check=False)
    assert run.returncode == 143 and run.stderr == "", run.stderr
    assert "stopped by SIGTERM in epoch 1 after step 3, saved; continue with --resume auto" in run.stdout
    assert len(log(tmp_path)) == 1
    assert "starting at epoch 1 step 3 " in run_script(*settings, "--resume", "auto").stdout
    assert_equal_runs(tmp_path, whole)


def test_a_probe_shares_the_folder_of_its_pretraining_only(data, tmp_path):
    run_script(PRETRAIN, *SMALL, "--epochs", 2, "--save-freq", 1, "--ckpt_path", tmp_path, data)
    settings = [PROBE, *SMALL_PROBE, "--epochs", 1, "--ckpt_path", tmp_path, data, "--pretrained"]
    first, second = (tmp_path / f"checkpoint_000{epoch}.pth.tar" for epoch in (0, 1))
    run_script(*settings, first)
    assert "taking checkpoint_0001.pth.tar\n" in run_script(*settings, tmp_path).stderr
    assert [record.get("probe") for record in log(tmp_path)] == [None, None, "0000", "0001"]
    probed, frozen = weights(tmp_path / "checkpoint_robust_0001.pth.tar"), weights(second)
    names = [name for name in probed if ".fc." not in name]
    assert all(torch.equal(probed[name], frozen[name.replace("module.", "module.encoder_q.")]) for name in names)
    assert "it holds another run (checkpoint_robust_0001.pth.tar)" in refused(*settings, second)
    resume = ["--epochs", 2, "--resume", "auto"]
    first.rename(tmp_path / "kept.pth.tar")
    second.rename(first)  # another backbone of the same name
    assert "this probe was trained on a different backbone than --pretrained" in refused(*settings, first, *resume)
    first.rename(second)
    run_script(*settings, second, *resume)
    assert [record.get("probe") for record in log(tmp_path)] == [None, None, "0000", "0001", "0001"]


@pytest.mark.parametrize("file, name", [
    ("ckpts/RUN/checkpoint_0199.pth.tar", "0199"), ("moco_lr0.03_batch128_epoch200.pth.tar", "epoch200"),
    ("checkpoint_latest.pth.tar", "latest"), ("my_runs/resnet50.pth", "resnet50"), ("", "random"),
    ("released:patch-k16384-a2-run1", "patch-k16384-a2-run1")])  # fmt: skip
def test_run_names_follow_the_published_rule(file, name):
    assert runpy.run_path(str(REPOSITORY / PROBE), run_name="script")["run_name"](file) == name


def test_heads_side_by_side_learn_what_each_learns_alone(data, whole, tmp_path):
    run = run_script(PROBE, *SMALL_PROBE, "--epochs", 3, "--ckpt_path", tmp_path, "--lr", 0.1, data)
    assert "by lr" not in run.stdout
    alone, three = (torch.load(folder / LAST, weights_only=True) for folder in (tmp_path, whole))
    assert torch.equal(three["heads"]["1.weight"], alone["heads"]["0.weight"])
    winners = [three["state_dict"]["module.fc.weight"].equal(three["heads"][f"{i}.weight"]) for i in range(3)]
    assert sum(winners) == 1 and three["best_acc1s"][1] == alone["best_acc1s"][0]
    assert [record["loss"] for record in log(tmp_path)] == [record["loss"][1:2] for record in log(whole)]
    resume = ["--epochs", 4, "--resume", whole / LAST, "--ckpt_path", tmp_path / "more", data]
    resumed = run_script(PROBE, *SMALL_PROBE, *LRS, *resume)
    assert "by lr  0.01: " in resumed.stdout.splitlines()[-1] and "  1: " in resumed.stdout.splitlines()[-1]
    best = torch.load(whole / BEST, weights_only=True)
    for lrs, file in ([], whole), (["--lr", 3, 10], whole / BEST):  # whichever are given: one head is tested
        tested = run_script(PROBE, *SMALL_PROBE, *lrs, "--evaluate", "--resume", file, data)
        assert f"top-1 {best['best_acc1']:.2f} %" in tested.stdout.splitlines()[-1]


def test_a_resumed_probe_knows_its_heads_by_their_rates_and_keeps_its_options(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "own")
    command = [PROBE, *SMALL_PROBE, "--epochs", 4, "--resume", "auto", "--ckpt_path", tmp_path / "own", data]
    for options, told in (
        (["--lr", 0.01, 0.1, 3], "it has heads for --lr 0.01 0.1 1, this run has 0.01 0.1 3"),
        ([*LRS, "--weight-decay", 0.1], "it was saved with --weight-decay 0.0, this run has 0.1; repeat it"),
        ([*LRS, "--image-size", 40], "it was saved with --image-size 32, this run has 40"),
        ([*LRS, "--batch-size", 4], "it was saved with images per step 8, this run has 4"),
        ([*LRS, "--seed", 2], "it was saved with --seed 1, this run has 2"),
    ):
        assert told in refused(*command, *options)
    assert log(tmp_path / "own") == log(whole)
    run_script(*command, "--lr", 1, 0.01, 0.1)
    run_script(PROBE, *SMALL_PROBE, *LRS, "--epochs", 4, "--ckpt_path", tmp_path / "at once", data)
    assert_equal_runs(tmp_path / "own", tmp_path / "at once")


def test_evaluate_needs_neither_training_images_nor_the_arch(data, whole, tmp_path):
    settings = ["--evaluate", "--resume", whole / BEST]
    expected = run_script(PROBE, *SMALL_PROBE, *settings, data).stdout.splitlines()[-1]
    shutil.copytree(data / "val", tmp_path / "val")
    assert "of 6 images" in expected
    assert run_script(PROBE, "-b", 3, "-j", 0, *settings, tmp_path).stdout.splitlines()[-1] == expected


def test_a_probe_ends_once_no_head_is_finite(data, tmp_path):
    settings = [PROBE, *SMALL_PROBE, "--epochs", 40, "--ckpt_path", tmp_path, data]
    run = run_script(*settings, "--lr", 1e38, 9e37, check=False)
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert "a smaller --lr, for example 9e+36" in run.stderr
    run_script(*settings, "--lr", 1e38, 0.1)
    best = torch.load(tmp_path / BEST, weights_only=True)
    assert best["state_dict"]["module.fc.weight"].isfinite().all()
    last = torch.load(tmp_path / LAST, weights_only=True)
    assert last["epoch"] == 40 and not last["heads"]["0.weight"].isfinite().all()


# Refusals


def test_bad_checkpoints_are_refused(data, whole, tmp_path):
    run_script(PRETRAIN, *SMALL, "--epochs", 1, "--ckpt_path", tmp_path, data)
    pretrained, linear = tmp_path / "checkpoint_0000.pth.tar", whole / BEST
    for options, message in (
        (["--pretrained", REPOSITORY / "README.md"], "not a checkpoint"),
        (["-a", "resnet50", "--pretrained", pretrained], "resnet10, not --arch resnet50"),
        (["-e", "--resume", pretrained], "no linear head"),
        (["-e"], "--evaluate needs"),
        (["--resume", whole.parent], "it holds no checkpoint_*.pth.tar; name "),
        (["--resume", linear, "--lr", 0.1, "--epochs", 9], "it has heads for --lr 0.01 0.1 1, this run has 0.1"),
        (["--lr", 1, "x", 2], "is not one or more numbers above 0"),
        (["--features", "f.npy"], "its name must end in .npz"),
        (["--features", "f.npz", "--export-backbone", "b.pth"], "writes the backbone and does nothing else"),
        (["--export-backbone", "b.pth"], "--export-backbone needs --pretrained"),
        (["--export-backbone", "b.pth", "-a", "resnet50", "--pretrained", linear], "not --arch resnet50"),
    ):
        assert message in refused(PROBE, *SMALL_PROBE, *options, "--ckpt_path", tmp_path / "new", data)
    assert [path.name for path in tmp_path.glob("new/*")] in ([], [".lock"])  # until this process ends
    other = write_folder(tmp_path / "other", classes=("n01", "n07", "n08"))
    line = refused(PROBE, *SMALL_PROBE, "-e", "--resume", linear, other)
    assert "2 classes that differ from the 3 of this data (for example n02)" in line
    (other / "val" / "n07").rename(other / "val" / "n04")
    assert "different classes" in refused(PROBE, "-b", 8, other)
    assert "it has no queue" in refused(PRETRAIN, *SMALL, "--resume", linear, data)
