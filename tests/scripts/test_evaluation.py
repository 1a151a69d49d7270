"""eval_robustness.py as people type it."""

import json
import shutil

import pytest
import torch
from helpers import EVALUATE, PRETRAIN, PROBE, SMALL, SMALL_PROBE, TORCHRUN, refused, run_script, write_folder


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A linear checkpoint on random features of three classes, and its data with four test sets."""
    root = tmp_path_factory.mktemp("linear")
    data = write_folder(root / "data", classes=("n01", "n02", "n03"), train=4, val=5)
    run_script(PROBE, *SMALL_PROBE, "-b", 4, "--epochs", 1, "--ckpt_path", root, data)
    for name, severity in (("fog", 1), ("fog", 2), ("spatter", 5)):
        shutil.copytree(data / "val", root / "c" / name / str(severity))
    (root / "c" / "fog" / "2" / "n02" / "n02_1.JPEG").unlink()
    return root


def evaluation(linear, *options, **settings):
    return run_script(
        EVALUATE, "--pretrained", f"mine={linear / 'model_best_random.pth.tar'}", "--val", linear / "data",
        "--corruption", linear / "c", "--sketch", linear / "data" / "train", "-j", 1, *options, **settings,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_exactly_the_figures_of_one(linear, tmp_path):
    one = evaluation(linear, "--allow-partial", "--json", tmp_path / "one.json", "-b", 4)
    torchrun = [*TORCHRUN, "--nproc-per-node=2"]
    two = evaluation(linear, "--allow-partial", "--json", tmp_path / "two.json", "-b", 4, launcher=torchrun)
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    assert "| mine |" in two.stdout and one.stdout.replace("one.json", "two.json") == two.stdout


def test_an_incomplete_corruption_set_exits_non_zero(linear, tmp_path):
    run = evaluation(linear, "--json", tmp_path / "r.json", check=False)
    assert run.returncode == 1 and "Corruption (partial, resized)" in run.stdout and "Traceback" not in run.stderr
    assert "3 corruptions × severities; partial, 73 of 75" in run.stdout
    quick = evaluation(linear, "--json", tmp_path / "q.json", "--limit", 1, "--allow-partial")
    assert "only the first 1 images of each class" in quick.stdout and "val: 3 images" in quick.stdout


def test_a_killed_evaluation_resumes_to_the_same_file(linear, tmp_path):
    evaluation(linear, "--allow-partial", "--json", tmp_path / "whole.json")
    whole = json.loads((tmp_path / "whole.json").read_text())
    half = whole | {"cells": {key: cell for key, cell in whole["cells"].items() if key in ("val", "corruption/fog/2")}}
    del half["table"]  # as the file is after two test sets
    marked = json.loads(json.dumps(half))
    marked["cells"]["val"]["results"][0]["top1"] = 12.5  # taken over, not evaluated again
    for name, content in (("half", half), ("marked", marked)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        run = evaluation(linear, "--allow-partial", "--json", tmp_path / f"{name}.json")
        assert "2 of 5 test sets are already in" in run.stderr
    assert (tmp_path / "half.json").read_text() == (tmp_path / "whole.json").read_text()
    assert "| mine | – | – | 12.50 |" in run.stdout


def test_bad_inputs_are_refused(linear, tmp_path):
    best, data = linear / "model_best_random.pth.tar", linear / "data"
    run_script(PRETRAIN, *SMALL, "--epochs", 1, "--ckpt_path", tmp_path, data)
    for options, message in (
        (["--pretrained", best], "nothing to test on"),
        (["--val", data], "nothing to test"),
        (["--pretrained", best, "--val", data, "--compare", "paper"], "not a row of the published table"),
        (["--pretrained", best, "--val", data, "--json", tmp_path / "no" / "r.json"], "no folder"),
        (["--pretrained", best, "--val", data, "--plot", tmp_path / "p.png"], "add --corruption DIR"),
        (["--pretrained", tmp_path / "checkpoint_0000.pth.tar", "--val", data], "no linear head"),
        (["--pretrained", best, "--val", tmp_path / "nowhere"], "no such directory"),
        (["--pretrained", f"a={best}", f"a={best}", "--val", data], "the name a is taken"),
    ):
        assert message in refused(EVALUATE, *options)


def test_a_head_without_class_list_needs_one(linear, tmp_path):
    published = torch.load(linear / "model_best_random.pth.tar", weights_only=True)
    del published["wnids"], published["image_size"]
    path, classes = tmp_path / "published.pth.tar", tmp_path / "classes.txt"
    torch.save(published, path)
    classes.write_text("n02\nn01\nn03\n")
    settings = ["--pretrained", path, "--sketch", linear / "data" / "val", "--json", tmp_path / "r.json"]
    assert "--classes" in refused(EVALUATE, *settings)
    assert "no such file" in refused(EVALUATE, *settings, "--classes", tmp_path / "nowhere.txt")
    run_script(EVALUATE, *settings, "--classes", classes, "-j", 0)
    assert json.loads((tmp_path / "r.json").read_text())["wnids"] == ["n01", "n02", "n03"]  # sorted
