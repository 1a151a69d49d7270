"""The test sets: what is listed, under which classes, and the classes of a head."""

import pytest
from helpers import write_folder

from moco.data import folders
from moco.errors import UsageError
from moco.evaluation import testsets
from moco.evaluation.testsets import TestSet

IMAGENET_100 = folders.read_class_list(folders.IMAGENET_100)


def test_unexpected_numbers_of_images_get_a_warning():
    wnids = ["n01440764", "n01443537"]
    odd, usual = (TestSet("val", "", [""] * (50 + n), [0] * 50 + [1] * n) for n in (49, 50))
    assert odd.warning(wnids) == "1 of 2 classes do not have 50 images (n01443537 49)"
    assert odd.warning(["disc", "ring"]) == usual.warning(wnids) == ""
    assert odd._replace(key="corruption/fog/3").warning(wnids) and not odd._replace(key="sketch").warning(wnids)
    few = TestSet("rendition", "", [""] * 30, [0] * 30)  # a head may know classes that the set lacks
    assert few.warning(wnids) == "1 of 1 classes do not have 40 to 499 images (n01440764 30)"
    assert odd._replace(key="rendition").warning(wnids) == odd._replace(key="set/own").warning(wnids) == ""


def test_folders_that_are_no_corruption_are_listed(tmp_path):
    for name in ("fog/1", "gausian_noise/1", "noise/shot_noise/2", "noise/static/3", ".cache/1", "notes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "README.md").write_text("")
    assert testsets.unknown_corruptions(str(tmp_path)) == ["gausian_noise", "noise/static", "notes"]


def test_both_layouts_of_corruptions_are_found_but_not_of_one(tmp_path):
    for name in ("fog/1", "noise/shot_noise/2"):
        (tmp_path / name).mkdir(parents=True)
    found = {"corruption/shot_noise/2": f"{tmp_path}/noise/shot_noise/2", "corruption/fog/1": f"{tmp_path}/fog/1"}
    assert testsets.corruption_folders(str(tmp_path)) == found
    (tmp_path / "weather/fog/1").mkdir(parents=True)
    with pytest.raises(UsageError, match="weather/fog/1 and .*fog/1 are the same test set; remove one"):
        testsets.corruption_folders(str(tmp_path))
    with pytest.raises(UsageError, match="no <corruption>/<severity>/<wnid> folders"):
        testsets.corruption_folders(str(tmp_path / "fog"))


# Classes of a head


def test_the_checkpoints_own_classes_come_first(tmp_path):
    (tmp_path / "c.txt").write_text("n07\nn03\n")
    assert testsets.head_classes("x", {"wnids": ["a", "b"]}, 2, classes=tmp_path / "c.txt") == ["a", "b"]
    assert testsets.head_classes("x", {}, 1000, classes=tmp_path / "c.txt") == ["n03", "n07"]
    with pytest.raises(UsageError, match="2 classes, but the head of x has 1 outputs"):
        testsets.head_classes("x", {}, 1, classes=tmp_path / "c.txt")


def test_then_those_of_val_if_there_are_as_many(tmp_path):
    data = write_folder(tmp_path / "data", classes=("n08", "n02", "n05"), train=1, val=1)
    assert testsets.head_classes("x", {}, 3, val=data) == ["n02", "n05", "n08"]
    with pytest.raises(UsageError, match="name a file of them with --classes .* --val"):
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
