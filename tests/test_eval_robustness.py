"""The evaluation script's own logic: rows, class lists, and every column of a miniature of all test sets."""

import argparse
import json

import pytest
import torch
from helpers import GrayLevels, paint, write_folder

import eval_robustness
from moco.data import folders
from moco.distributed import DistContext
from moco.errors import UsageError
from moco.evaluation import results, testsets
from moco.training import files

WNIDS = ["n01", "n02", "n03", "n04"]
IMAGENET_100 = folders.read_class_list(folders.IMAGENET_100)


def test_every_column_of_a_miniature_is_computed_by_hand(tmp_path, capsys):
    """Decision d of an image is painted as its gray level. The datasets' order is not the head's: n00 comes before all,
    n99 after; n04 is missing but in val."""
    for folder in ("val/val", "sketch", "stylized/val", "rendition"):  # extra classes everywhere
        paint(tmp_path / folder / "n00" / "a.png", 0)
        paint(tmp_path / folder / "n99" / "a.png", 3)
    for wnid, decisions in {"n01": (0, 0, 1), "n04": (3, 3), "n02": (1, 0, 1)}.items():
        for i, decision in enumerate(decisions):  # 2 + 2 + 2 of 8 right: 75 %
            paint(tmp_path / "val" / "val" / wnid / f"{i}.png", decision)
    for name, severity, decisions in (
        ("fog", 1, (0, 0)),
        ("fog", 5, (0, 3, 3)),
        ("snow", 2, (2,)),
        ("spatter", 1, (0, 2)),
    ):
        for i, decision in enumerate(decisions):  # n01: 100 %, 33.3 %, 0 %: mean 44.44; extra: 50 %
            paint(tmp_path / "c" / name / str(severity) / "n01" / f"{i}.png", decision, size=28)
    for i, decision in enumerate((1, 2, 2, 1, 1)):  # n02: 3 of 5 right
        paint(tmp_path / "sketch" / "n02" / f"{i}.png", decision)
    for i, decision in enumerate((2, 2, 0, 3)):  # n03 with the texture of n01: 2 shape, 1 texture of 4
        paint(tmp_path / "stylized" / "val" / "n03" / f"n01-{i}.png", decision)
    for i, decision in enumerate((1, 0, 3)):  # n02: one right; where n01, absent, comes first, n02 is
        paint(tmp_path / "rendition" / "n02" / f"{i}.png", decision)  # second: right among the shared classes
    paint(tmp_path / "rendition" / "n04" / "0.png", 3)

    class Off(GrayLevels):
        """Always decides for the class after."""

        def forward(self, images):
            return super().forward(images).roll(1, dims=1)

    models = [GrayLevels(), Off()]
    for model in models:
        model.fc = torch.nn.Linear(1, 4)
    directories = {
        suite: str(tmp_path / folder)
        for suite, folder in (
            ("val", "val"),
            ("corruption", "c"),
            ("sketch", "sketch"),
            ("stylized", "stylized"),
            ("rendition", "rendition"),
        )
    }
    test_sets = testsets.list_test_sets(directories, WNIDS)
    (tmp_path / "m.pth").write_bytes(b"")
    args = argparse.Namespace(
        json=str(tmp_path / "r.json"),
        limit=None,
        workers=0,
        batch_size=3,
        compare=None,
        plot=None,
        by_class=False,
        latex=False,
    )
    rows = {"right": [str(tmp_path / "m.pth")], "off": [str(tmp_path / "m.pth")]}
    result = results.new(rows, [{}, {}], WNIDS, 28, None)
    output = files.of_file("--json", args.json)
    eval_robustness.evaluate(DistContext(), args, models, WNIDS, 28, test_sets, result, output)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| model | K | alpha | val | Corruption (partial) | Sketch | Stylized | Rendition | Rendition, shared classes |"
        " Corruption, extra four | Shape bias | Shape accuracy | Texture accuracy |"
    )
    assert (
        lines[2] == "| right | – | – | 75.00 | 44.44 | 60.00 | 50.00 | 50.00 | 75.00 | 50.00 | 66.67 | 50.00 | 25.00 |"
    )
    # Off by one: right is what was painted as the class before. Val: 1 of 8. Corruption: 0, 2 of 3 and 0.
    # Stylized: no shape, one texture of 4.
    assert lines[3].startswith("| off | – | – | 12.50 | 22.22 | 0.00 | 0.00 |") and lines[3].endswith(
        "| 0.00 | 0.00 | 0.00 | 25.00 |"
    )
    assert any(
        line.startswith("Corruption: 8 images, CenterCrop(28), 4 corruptions × severities; partial, 72 of 75")
        for line in lines
    )
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["cells"]["val"]["results"][0]["classes"] == {
        "n01": {"n": 3, "correct": 2},
        "n02": {"n": 3, "correct": 2},
        "n04": {"n": 2, "correct": 2},
    }
    assert saved["table"]["right"]["Corruption"] == [pytest.approx(400 / 9)]


def test_rows_are_files_or_named_lists_of_them(tmp_path):
    odd = tmp_path / "a=b.pth"
    odd.write_bytes(b"")
    assert eval_robustness.parse_rows(["x.pth", "n=a.pth,b.pth", str(odd)]) == {
        "x.pth": ["x.pth"],
        "n": ["a.pth", "b.pth"],
        str(odd): [str(odd)],
    }
    with pytest.raises(UsageError, match="name n is taken"):
        eval_robustness.parse_rows(["n=a.pth", "n=b.pth"])


def test_the_checkpoints_own_classes_come_first(tmp_path):
    (tmp_path / "c.txt").write_text("n07\nn03\n")
    assert testsets.head_classes("x", {"wnids": ["a", "b"]}, 2, classes=tmp_path / "c.txt") == ["a", "b"]
    assert testsets.head_classes("x", {}, 1000, classes=tmp_path / "c.txt") == ["n03", "n07"]
    with pytest.raises(UsageError, match="2 classes, but the head of x has 1 outputs"):
        testsets.head_classes("x", {}, 1, classes=tmp_path / "c.txt")


def test_then_those_of_val_if_there_are_as_many(tmp_path):
    data = write_folder(tmp_path / "data", classes=("n08", "n02", "n05"), train=1, val=1)
    assert testsets.head_classes("x", {}, 3, val=data) == ["n02", "n05", "n08"]
    with pytest.raises(UsageError, match="--classes .*give as --val.*train the head"):
        testsets.head_classes("x", {}, 4, val=data)


def test_then_imagenet_100_if_it_fits(tmp_path):
    assert testsets.head_classes("x", {}, 100) == IMAGENET_100 and len(set(IMAGENET_100)) == 100
    for wnid in [*IMAGENET_100, "n00000000"]:  # a larger validation set, of all of ImageNet, say
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / "a.JPEG").write_bytes(b"")
    assert testsets.head_classes("x", {}, 100, val=tmp_path) == IMAGENET_100
    with pytest.raises(UsageError):  # 1000 outputs: ImageNet's, or the published 100?
        testsets.head_classes("x", {}, 1000)
    (tmp_path / "val" / IMAGENET_100[0]).rename(tmp_path / "val" / "n00000001")
    with pytest.raises(UsageError):
        testsets.head_classes("x", {}, 100, val=tmp_path)
