"""eval_robustness.py --set NAME=DIR: columns of their own, and the shape and texture accuracy beside the shape bias."""

import json
import statistics

import pytest
from helpers import EVALUATE, PROBE, SMALL_PROBE, paint, refused, run_script, write_folder

from moco.errors import UsageError
from moco.evaluation import report, results, testsets
from moco.evaluation.testsets import TestSet

WNIDS = ["n01", "n02", "n03"]


def make(tmp_path, cells, categories=None, runs=2):
    """A report of the rows plain and patch; cells: {key: a result for each}."""
    path = tmp_path / "m.pth"
    path.write_bytes(b"weights")
    made = results.new({"plain": [str(path)], "patch": [str(path)]}, [{}] * 2, WNIDS, 28, None)
    for key, values in cells.items():
        test_set = TestSet(key, f"/{key}", ["x"] * 4, [0, 0, 1, 1], None, categories if key == "set/cues" else None)
        results.add(made, test_set, values, 28, WNIDS)
    return made


def result(top1, **more):
    return {"top1": top1, "top1_shared_classes": top1, "n": 4, "classes": {}} | more


CUES = [
    result(50.0, conflicts=4, shape_decisions=1, texture_decisions=2, shape_bias=100 / 3),
    result(75.0, conflicts=4, shape_decisions=3, texture_decisions=0, shape_bias=100.0),
]


def test_shape_and_texture_accuracy_stand_beside_the_shape_bias(tmp_path):
    lines = report.table(make(tmp_path, {"stylized": CUES})).splitlines()
    assert lines[0] == "| model | K | alpha | Stylized | Shape bias | Shape accuracy | Texture accuracy |"
    assert lines[2:] == [
        "| plain | – | – | 50.00 | 33.33 | 25.00 | 50.00 |",
        "| patch | – | – | 75.00 | 100.00 | 75.00 | 0.00 |",
    ]


def test_a_further_set_has_columns_of_its_own(tmp_path):
    values = [result(10.0), result(20.0, top1_shared_classes=30.0)]
    made = make(tmp_path, {"val": [result(60.0)] * 2, "set/a": values, "set/b": [result(1.0), result(2.0)]})
    lines = report.table(made).splitlines()
    assert lines[0] == "| model | K | alpha | val | a | a, shared classes | b |"
    assert lines[3] == "| patch | – | – | 60.00 | 20.00 | 30.00 | 2.00 |"
    assert report.differences(made) == ["patch against plain: val +0.00, a +10.00, a, shared classes +20.00, b +1.00"]
    assert [note.split(",")[0] for note in report.notes(made)] == ["val: 4 images", "a: 4 images", "b: 4 images"]


def test_a_column_and_a_note_say_how_many_categories_count(tmp_path):
    made = make(tmp_path, {"set/cues": CUES, "set/other": [result(1.0)] * 2}, {"cat": [0], "dog": [1]})
    header = report.table(made).splitlines()[0]
    for column in ("cues", "cues: Shape bias", "cues: Texture accuracy"):
        assert f"| {column} (2 of 16 categories) |" in header
    assert header.endswith("| other |")
    note, _ = report.notes(made)
    assert "decided between 2 of 16 categories (cat, dog) by mean probability" in note and "Shape bias over" not in note
    made["cells"]["set/cues"]["results"][0]["conflicts"] = 3
    assert "; Shape bias over the 3 of these images whose cues are two different classes" in report.notes(made)[0]


def test_names_of_further_sets_are_checked():
    report.check_set_name("ImageNet-A", ["imagenet-v2"])
    for name, message in {
        "val": "val is a column of the table already",
        "SKETCH": "is a column of the table already",
        "shape bias": "Shape bias is a column of the table already",
        "IMAGENET-V2": "imagenet-v2 is a further set already",
        "": "a name is up to 40 letters",
        "a/b": "a name is up to 40 letters",
        "a|b": "a name is up to 40 letters",
        "a, shared classes": "a name is up to 40 letters",
        "x" * 41: "a name is up to 40 letters",
    }.items():
        with pytest.raises(UsageError, match=message):
            report.check_set_name(name, ["imagenet-v2"])


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A linear checkpoint of two ImageNet classes, a cat and a dog, and its data."""
    root = tmp_path_factory.mktemp("linear")
    data = write_folder(root / "data", classes=("n02099601", "n02123045"), train=4, val=3)
    run_script(PROBE, *SMALL_PROBE, "-b", 4, "--epochs", 1, "--ckpt_path", root, data)
    for i, name in enumerate(("cat/cat1-dog2.png", "dog/dog1-cat1.png", "dog/dog2-cat1.png", "knife/knife1-cat1.png")):
        paint(root / "cues" / name, i)
    return root


def test_further_sets_are_evaluated_and_resumed(linear, tmp_path):
    command = [
        EVALUATE, "--pretrained", f"mine={linear / 'model_best_random.pth.tar'}", "--json", tmp_path / "r.json",
        "--set", f"own={linear / 'data'}", "--set", f"cues={linear / 'cues'}", "-j", 0,
    ]  # fmt: skip
    run = run_script(*command, "--val", linear / "data")
    made = json.loads((tmp_path / "r.json").read_text())
    assert list(made["cells"]) == ["val", "set/own", "set/cues"]
    assert made["cells"]["set/own"]["results"] == made["cells"]["val"]["results"]
    assert made["cells"]["set/own"]["folder"] == str(linear / "data" / "val")
    row, cues = made["table"]["mine"], made["cells"]["set/cues"]
    assert row["own"] == row["val"] and cues["n"] == 3 and cues["categories"] == ["cat", "dog"]
    assert row["cues: Shape accuracy"][0] + row["cues: Texture accuracy"][0] == pytest.approx(100)  # two categories
    assert "cues (2 of 16 categories)" in run.stdout
    again = run_script(*command)
    assert "2 of 2 test sets are already in" in again.stderr and "cues (2 of 16 categories)" in again.stdout
    assert statistics.fmean(json.loads((tmp_path / "r.json").read_text())["table"]["mine"]["own"]) == row["own"][0]


def test_textures_of_val_are_a_further_set(linear, tmp_path):
    small = ["--patch", 24, "--size", 32, "--splits", "val", "--workers", 1]
    script = "preprocess/imagenet_texture_syn.py"
    run_script(script, "--imagenet_path", linear / "data", "--imagenet_t_path", tmp_path / "t", *small)
    model = ["--pretrained", linear / "model_best_random.pth.tar", "--json", tmp_path / "r.json", "-j", 0]
    run_script(EVALUATE, *model, "--set", f"texture={tmp_path / 't'}")
    (cell,) = json.loads((tmp_path / "r.json").read_text())["cells"].values()
    assert cell["n"] == 6 and cell["folder"] == str(tmp_path / "t" / "val")


def test_further_sets_without_a_name_or_folder_are_refused(linear):
    model = ["--pretrained", linear / "model_best_random.pth.tar", "--set"]
    for entries, message in (
        ([linear / "cues"], f"as in --set cues={linear / 'cues'}"),
        (["cues="], "a set needs a name and a folder"),
        ([f"val={linear / 'cues'}"], "val is a column of the table already"),
        ([f"a={linear / 'cues'}", f"a={linear / 'data'}"], "a is a further set already"),
        ([f"a={linear / 'nowhere'}"], "no such directory"),
    ):
        assert message in refused(EVALUATE, *model, *entries)


def test_a_report_with_impossible_cue_figures_is_refused(tmp_path):
    path = tmp_path / "r.json"
    results.save(path, make(tmp_path, {"stylized": CUES}))
    broken = json.loads(path.read_text())
    broken["cells"]["stylized"]["results"][0]["conflicts"] = 2
    path.write_text(json.dumps(broken))
    with pytest.raises(UsageError, match="more decisions for shape or texture than the 2 images"):
        results.reuse_results(path, make(tmp_path, {}), [])


def test_a_set_of_categories_is_not_resized_at_the_crops_size():
    test_set = TestSet("set/cues", "", [], [], None, {"cat": [0], "dog": [1]})
    assert test_set.preprocessing(224) == "CenterCrop(224)"
    assert test_set._replace(categories=None).preprocessing(224) == "Resize(256), CenterCrop(224)"
    assert testsets.TestSet("stylized", "", [], []).preprocessing(224) == "CenterCrop(224)"
