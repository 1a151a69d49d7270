"""eval_robustness.py as people type it."""

import csv
import json
import shutil
import sys

import pytest
import torch
from helpers import EVALUATE, TORCHRUN, GrayLevels, paint, refused, run_script, write_folder
from reports import save_linear

import eval_robustness
from moco.evaluation import paper, scores
from moco.evaluation.testsets import SUITES, Suite

CAT, DOG, OTHER = "n02123045", "n02099601", "n03"
WNIDS = ["n01", "n02", "n03", "n04"]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Two linear checkpoints of a cat, a dog and another class, their data and test sets."""
    root = tmp_path_factory.mktemp("linear")
    data = write_folder(root / "data", classes=(DOG, CAT, OTHER), train=2, val=5)
    for seed, name in enumerate(("one", "two")):
        save_linear(root / f"{name}.pth.tar", sorted((DOG, CAT, OTHER)), seed=seed)
    for name in ("fog/1", "fog/2", "spatter/5"):
        shutil.copytree(data / "val", root / "c" / name)
    (root / "c" / "fog" / "2" / CAT / f"{CAT}_1.JPEG").unlink()
    for i, name in enumerate(("cat/cat1-dog2.png", "dog/dog1-cat1.png", "dog/dog2-cat1.png", "knife/knife1-cat1.png")):
        paint(root / "cues" / name, i)
    return root


def evaluation(linear, *options, **settings):
    return run_script(
        EVALUATE, "--pretrained", f"mine={linear / 'one.pth.tar'}", "--val", linear / "data",
        "--corruption", linear / "c", "--sketch", linear / "data" / "train", "-j", 0, *options, **settings,
    )  # fmt: skip


def stored(path):
    return json.loads(path.read_text())


# In this process, with models whose decisions are painted


@pytest.fixture
def painted(tmp_path, monkeypatch, capsys):
    """Run the script on a model that reads its decisions off the images: its options → the lines that it prints."""
    (tmp_path / "m.pth").write_bytes(b"")

    def run(*options):
        monkeypatch.setattr(
            eval_robustness, "load_models", lambda *_: ([GrayLevels()], [{"sha256": "1"}], WNIDS, 28, "")
        )
        arguments = ["--pretrained", "mine=m.pth", *map(str, options), "-j", "0", "-b", "3"]
        monkeypatch.setattr(sys, "argv", [EVALUATE, *arguments])
        eval_robustness.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_every_column_of_a_miniature_is_computed_by_hand(tmp_path, painted):
    """Decision d of an image is painted as its gray level. The datasets' order is not the head's: n00 comes before all,
    n99 after; n04 is missing but in val."""
    for folder in ("val/val", "sketch", "stylized/val", "rendition"):  # extra classes everywhere
        paint(tmp_path / folder / "n00" / "a.png", 0)
        paint(tmp_path / folder / "n99" / "a.png", 3)
    for folder, decisions in {
        "val/val/n01": (0, 0, 1),
        "val/val/n04": (3, 3),
        "val/val/n02": (1, 0, 1),  # 2 + 2 + 2 of 8 right: 75 %
        "sketch/n02": (1, 2, 2, 1, 1),  # 3 of 5 right
        "rendition/n02": (1, 0, 3),  # one right; where n01, absent, comes first, n02 is second: right among the shared
        "rendition/n04": (3,),
    }.items():
        for i, decision in enumerate(decisions):
            paint(tmp_path / folder / f"{i}.png", decision)
    for name, decisions in {"fog/1": (0, 0), "fog/5": (0, 3, 3), "snow/2": (2,), "spatter/1": (0, 2)}.items():
        for i, decision in enumerate(decisions):  # n01: 100 %, 33.3 %, 0 %: mean 44.44; extra: 50 %
            paint(tmp_path / "corruption" / name / "n01" / f"{i}.png", decision, size=28)
    for i, decision in enumerate((2, 2, 0, 3)):  # n03 with the texture of n01: 2 shape, 1 texture of 4
        paint(tmp_path / "stylized" / "val" / "n03" / f"n01-{i}.png", decision)
    folders = [each for suite in SUITES for each in (f"--{suite}", tmp_path / suite)]
    lines = painted(*folders, "--json", "r.json", "--allow-partial")
    assert lines[0] == (
        "| model | K | alpha | val (3 of 4 classes) | Corruption (partial, 1 of 4 classes) | Sketch (1 of 4 classes) |"
        " Stylized (1 of 4 classes) | Rendition | Rendition, shared classes | Corruption, extra four | Shape bias |"
        " Shape accuracy | Texture accuracy |"
    )
    assert lines[2] == (
        "| mine | – | – | 75.00 | 44.44 | 60.00 | 50.00 | 50.00 | 75.00 | 50.00 | 66.67 | 50.00 | 25.00 |"
    )
    (note,) = (line for line in lines if line.startswith("Corruption: "))
    assert "8 images, CenterCrop(28), 4 corruptions × severities, 1 of 4 classes with 1–3 images each; partial" in note
    assert "1 of the head's 4 classes are missing (n03), and 2 folders are none of them (n00, n99)" in str(lines)
    assert stored(tmp_path / "r.json")["table"]["mine"]["Corruption"] == [pytest.approx(400 / 9)]


def test_an_entry_of_suites_is_an_option_a_column_and_compared(tmp_path, monkeypatch, painted):
    with open(paper.TABLE, newline="") as file:
        published = [line | {"my-set": 50, "my-set_std": 1} for line in csv.DictReader(file)]
    published[0]["name"] = "mine"
    with open("published.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, published[0])
        writer.writeheader()
        writer.writerows(published)
    monkeypatch.setattr(paper, "TABLE", "published.csv")
    monkeypatch.setitem(SUITES, "my-set", Suite("My set", counts=range(2, 3), paper_classes=1))
    for i, decision in enumerate((1, 0)):
        paint(tmp_path / "s" / "n02" / f"{i}.png", decision)
    options = ["--my-set", tmp_path / "s", "--json", "r.json", "--compare", "paper"]
    lines = painted(*options)
    assert lines[0] == "| model | K | alpha | My set (1 of 4 classes) |" and lines[2] == "| mine | – | – | 50.00 |"
    assert "My set is not compared: crops of 28 px, published: 224" in lines
    monkeypatch.setattr(paper, "SIZE", 28)
    monkeypatch.setattr(paper, "CLASSES", 4)
    assert "| mine, paper | 50.00±1.00 |" in painted(*options)


def test_the_precision_is_told_and_its_backbones_compute_in_it(tmp_path, painted):
    paint(tmp_path / "s" / "n02" / "a.png", 1)
    options, lowered = ["--set", f"s={tmp_path / 's'}", "--json", "r.json"], []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: lowered.append(torch.is_autocast_enabled("cpu")) if isinstance(module, GrayLevels) else None
    )
    for precision in "fp32", "bf16", "bf16":
        lines = painted(*options, "--precision", precision)
        assert ("computed in bf16 (--precision)" in lines) == (precision == "bf16")
    handle.remove()
    assert lowered == [False, True]  # what is done is not repeated


def test_rows_are_files_or_named_lists_of_them(tmp_path):
    odd = tmp_path / "a=b,c.pth"
    odd.write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_best_0199.pth.tar").touch()
    rows = eval_robustness.parse_rows(["x.pth", "n=a.pth,run", str(odd)])
    assert rows == {"x.pth": ["x.pth"], "n": ["a.pth", "run/model_best_0199.pth.tar"], str(odd): [str(odd)]}


# As a program


@pytest.mark.slow
def test_two_processes_give_exactly_the_figures_of_one(linear, tmp_path):
    one = evaluation(linear, "--allow-partial", "--json", tmp_path / "one.json", "-b", 4)
    torchrun = [*TORCHRUN, "--nproc-per-node=2"]
    two = evaluation(linear, "--allow-partial", "--json", tmp_path / "two.json", "-b", 4, launcher=torchrun)
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    assert "| mine |" in two.stdout and one.stdout.replace("one.json", "two.json") == two.stdout


def test_an_incomplete_corruption_set_exits_non_zero(linear, tmp_path):
    run = evaluation(linear, "--json", tmp_path / "r.json", "--limit", 1, check=False)
    assert run.returncode == 1 and "| Corruption (partial, resized) |" in run.stdout and "Traceback" not in run.stderr
    assert "3 corruptions × severities, 3 of 3 classes with 1 images each; partial, 73 of 75" in run.stdout
    assert "RESIZED" in run.stdout
    assert "only the first 1 images of each class" in run.stdout and "val: 3 images" in run.stdout


def test_a_killed_evaluation_resumes_to_the_same_file(linear, tmp_path):
    evaluation(linear, "--allow-partial", "--json", tmp_path / "whole.json")
    whole = stored(tmp_path / "whole.json")
    half = whole | {"cells": {key: cell for key, cell in whole["cells"].items() if key in ("val", "corruption/fog/2")}}
    del half["table"]  # as the file is after two test sets
    marked = json.loads(json.dumps(half))
    result = marked["cells"]["val"]["results"][0]  # taken over, not evaluated again
    result["masks"]["correct"] = scores.pack([1, *[0] * 14])
    for place, each in enumerate(result["classes"].values()):
        each["correct"] = int(not place)
    result["top1"] = 100 / 15
    for name, content in (("half", half), ("marked", marked)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        run = evaluation(linear, "--allow-partial", "--json", tmp_path / f"{name}.json")
        assert "2 of 5 test sets are already in" in run.stderr
    assert (tmp_path / "half.json").read_text() == (tmp_path / "whole.json").read_text()
    assert "| mine | – | – | 6.67 |" in run.stdout


def test_models_and_sets_are_added_and_every_table_is_printed_from_the_file(linear, tmp_path):
    rows = [f"{name}={linear / name}.pth.tar" for name in ("one", "two")]
    shutil.copytree(linear / "data" / "val", tmp_path / "own", copy_function=shutil.copyfile)  # with other times
    sets = ["--set", f"own={tmp_path / 'own'}", "--set", f"cues={linear / 'cues'}", "-j", 0]
    common = ["--json", tmp_path / "r.json", "--val", linear / "data"]
    run_script(EVALUATE, "--pretrained", rows[0], *common)
    run = run_script(EVALUATE, "--pretrained", *rows, *sets, *common)
    made = stored(tmp_path / "r.json")
    assert list(made["cells"]) == ["val", "set/own", "set/cues"] and made["earlier"] == {}
    assert made["cells"]["set/own"]["results"] == made["cells"]["val"]["results"]
    row, cues = made["table"]["one"], made["cells"]["set/cues"]
    assert cues["n"] == 3 and cues["categories"] == ["cat", "dog"] and "cues (2 of 16 categories)" in run.stdout
    assert row["cues: Shape accuracy"][0] + row["cues: Texture accuracy"][0] == pytest.approx(100)  # two categories
    again = run_script(EVALUATE, "--pretrained", *rows, *sets, *common, "--by-class", "--latex")
    assert "3 of 3 test sets are already in" in again.stderr and stored(tmp_path / "r.json") == made
    assert "| class | val | own | cues |" in again.stdout and r"\bottomrule" in again.stdout


def test_bad_inputs_are_refused(linear, tmp_path):
    best, data, cues = linear / "one.pth.tar", linear / "data", linear / "cues"
    model = ["--pretrained", best]
    torch.save({"state_dict": {"queue": torch.ones(1)}}, tmp_path / "pretraining.pth.tar")
    (tmp_path / "foreign.json").write_text('{"name": "package"}')
    for options, message in (
        (model, "nothing to test on: use any of --val DIR --corruption DIR"),
        (["--val", data], "nothing to test"),
        ([*model, "--val", data, "--compare", "paper"], "not a row of the published table"),
        ([*model, "--val", data, "--json", tmp_path / "foreign.json"], "not written by these scripts"),
        ([*model, "--val", data, "--by-class"], "name two or more"),
        (["--pretrained", tmp_path / "pretraining.pth.tar", "--val", data], "no linear head"),
        ([*model, "--val", tmp_path / "nowhere"], "no such directory"),
        (["--pretrained", f"a={best}", f"a={best}", "--val", data], "the name a is taken"),
        ([*model, "--set", cues], f"as in --set cues={cues}"),
    ):
        assert message in refused(EVALUATE, *options)
    for names, message in (
        (("A", "shape bias", "VAL", "K"), "there is a column of this name already"),
        (("", "a/b", "a, shared classes", "x" * 41), "a name is up to 40 letters"),
    ):
        for name in names:
            assert message in refused(EVALUATE, *model, "--set", f"a={cues}", f"{name}={data}")
    assert (tmp_path / "foreign.json").read_text() == '{"name": "package"}'


def test_a_head_without_class_list_needs_one(linear, tmp_path):
    path, classes = tmp_path / "published.pth.tar", tmp_path / "classes.txt"
    save_linear(path, None, outputs=3)
    classes.write_text("\n".join((OTHER, DOG, CAT)))
    settings = ["--pretrained", path, "--sketch", linear / "data" / "val", "--json", tmp_path / "r.json"]
    assert "--classes" in refused(EVALUATE, *settings)
    run_script(EVALUATE, *settings, "--classes", classes, "-j", 0)
    assert stored(tmp_path / "r.json")["wnids"] == [DOG, CAT, OTHER]  # sorted
