"""The test sets: what is listed, under which classes, and the classes of a head."""

import os
import shutil
import unicodedata

import pytest
from helpers import paint, write_folder

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
    few = TestSet("rendition", "", [""] * 60, [0] * 30 + [1] * 30)  # a head may know classes that the set lacks
    assert few.warning([*wnids, "n01484850"]).startswith("2 of 2 classes do not have 40 to 499 images (n01440764 30")
    assert odd._replace(key="rendition").warning(wnids) == odd._replace(key="set/own").warning(wnids) == ""


HEAD = ["ant", "bee", "café", "dog"]


@pytest.mark.parametrize("key", ["val", "sketch", "stylized", "corruption/fog/3"])
def test_missing_classes_are_named_whatever_they_are_called(tmp_path, key):
    write_folder(tmp_path, classes=("ant", "bee", "cow"), train=1, val=1)
    found = testsets.list_test_set(key, str(tmp_path / "val"), HEAD)
    told = "2 of the head's 4 classes are missing (café, dog), and 1 folders are none of them (cow)"
    assert found.warning(HEAD) == told
    assert found._replace(key="rendition").warning(HEAD) == found._replace(key="set/own").warning(HEAD) == ""
    write_folder(tmp_path / "one", classes=("ant",), train=1, val=1)
    alone = testsets.list_test_set("rendition", str(tmp_path / "one" / "val"), HEAD)  # any guess is right
    assert "3 of the head's 4 classes are missing" in alone.warning(HEAD)


def test_names_match_in_any_normalisation_and_never_but_for_case(tmp_path):
    for name in unicodedata.normalize("NFD", "café"), "ant":
        paint(tmp_path / name / "a.png", 0)
    assert testsets.list_test_set("val", str(tmp_path), HEAD).labels.tolist() == [0, 2]
    (tmp_path / "ant").rename(tmp_path / "Ant")
    with pytest.raises(UsageError, match="its class folder Ant is ant in the head; rename it"):
        testsets.list_test_set("val", str(tmp_path), HEAD)


def test_only_an_empty_folder_of_a_class_of_the_head_is_refused(tmp_path):
    (tmp_path / "cow").mkdir()
    with pytest.raises(UsageError, match="no image in 1: cow"):  # nor another
        testsets.list_test_set("val", str(tmp_path), HEAD)
    paint(tmp_path / "ant" / "a.png", 0)
    assert testsets.list_test_set("val", str(tmp_path), HEAD).labels.tolist() == [0]
    (tmp_path / "bee").mkdir()
    with pytest.raises(UsageError, match="no image in 1: bee"):
        testsets.list_test_set("val", str(tmp_path), HEAD)


@pytest.mark.parametrize("change", ["size", "time", "name", "class"])
def test_files_that_were_made_again_have_another_stamp(tmp_path, change):
    for name in "ant", "bee":
        paint(tmp_path / name / "a.png", 0)
    before = testsets.list_test_set("val", str(tmp_path), HEAD)
    file, stat = tmp_path / "bee" / "a.png", (tmp_path / "bee" / "a.png").stat()
    if change == "size":
        file.write_bytes(file.read_bytes() + b" ")
        os.utime(file, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(file, ns=(stat.st_mtime_ns + 1, stat.st_mtime_ns + 1))
    else:
        file.rename(file.with_name("b.png")) if change == "name" else file.parent.rename(tmp_path / "dog")
    after = testsets.list_test_set("val", str(tmp_path), HEAD)
    assert after.files_sha256 != before.files_sha256
    tmp_path.joinpath("moved").mkdir()
    (tmp_path / "ant").rename(tmp_path / "moved" / "ant")
    (tmp_path / after.paths[1].split("/")[-2]).rename(tmp_path / "moved" / after.paths[1].split("/")[-2])
    assert testsets.list_test_set("val", str(tmp_path / "moved"), HEAD).files_sha256 == after.files_sha256


def test_no_two_sets_are_the_same_images(tmp_path):
    paint(tmp_path / "val" / "ant" / "a.png", 0)
    (tmp_path / "c" / "fog").mkdir(parents=True)
    for severity in "12":
        (tmp_path / "c" / "fog" / severity).symlink_to(tmp_path / "val")
    for sets in {"val": "", "stylized": ""}, {"val": "", "set/x": "val"}, {"corruption": "c"}:
        with pytest.raises(UsageError, match="would be the same images as"):
            testsets.list_test_sets({key: str(tmp_path / name) for key, name in sets.items()}, HEAD)


def test_only_sets_that_are_published_so_are_looked_for_below_val(tmp_path):
    for name in "val/ant", "val/bee", "ant", "bee":
        paint(tmp_path / name / "a.png", 0)
    keys = ("val", "stylized", "set/x", "sketch", "rendition")
    roots = {key: testsets.class_root(str(tmp_path), key) for key in keys}
    below, itself = f"{tmp_path}/val", str(tmp_path)
    assert roots == {"val": below, "stylized": below, "set/x": below, "sketch": itself, "rendition": itself}


@pytest.mark.parametrize("link", ["val", "val/ant", "images", "hard"])
def test_training_images_are_no_validation(tmp_path, link):
    write_folder(tmp_path, classes=("ant", "bee"), train=1, val=1)
    if link in ("val", "val/ant"):
        shutil.rmtree(tmp_path / link)
        (tmp_path / link).symlink_to(tmp_path / link.replace("val", "train"))
    else:  # a link for each image
        shutil.rmtree(tmp_path / "val")
        copy = os.link if link == "hard" else os.symlink
        shutil.copytree(tmp_path / "train", tmp_path / "val", copy_function=copy)
    (tmp_path / "elsewhere").symlink_to("val")
    with pytest.raises(UsageError, match="these are the training images"):
        testsets.class_root(str(tmp_path / "elsewhere"))
    for look in testsets.class_root, lambda data: folders.split_path(data, "val"):
        with pytest.raises(UsageError, match="these are the training images"):
            look(str(tmp_path))


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
    assert testsets.head_classes("x", {"wnids": ["a", "b"]}, 2) == (["a", "b"], "")
    assert testsets.head_classes("x", {"wnids": ["n03", "n07"]}, 2, classes=tmp_path / "c.txt")[0] == ["n03", "n07"]
    with pytest.raises(UsageError, match="c.txt: x stores other classes; leave out --classes"):
        testsets.head_classes("x", {"wnids": ["a", "b"]}, 2, classes=tmp_path / "c.txt")
    assert testsets.head_classes("x", {}, 1000, classes=tmp_path / "c.txt")[0] == ["n03", "n07"]
    with pytest.raises(UsageError, match="2 classes, but the head of x has 1 outputs"):
        testsets.head_classes("x", {}, 1, classes=tmp_path / "c.txt")


def test_then_those_of_val_if_there_are_as_many(tmp_path):
    data = write_folder(tmp_path / "data", classes=("n08", "n02", "n05"), train=1, val=1)
    assert testsets.head_classes("x", {}, 3, val=data) == (
        ["n02", "n05", "n08"], f"the 3 folders of {data}/val, sorted",
    )  # fmt: skip
    with pytest.raises(UsageError, match="name a file of them with --classes .* --val"):
        testsets.head_classes("x", {}, 4, val=data)


def test_then_imagenet_100_if_it_fits(tmp_path):
    assert testsets.head_classes("x", {}, 100)[0] == IMAGENET_100 and len(set(IMAGENET_100)) == 100
    for wnid in [*IMAGENET_100, "n00000000"]:  # a larger validation set, of all of ImageNet, say
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / "a.JPEG").write_bytes(b"")
    assert testsets.head_classes("x", {}, 100, val=tmp_path) == (IMAGENET_100, "ImageNet-100's")
    with pytest.raises(UsageError):  # 1000 outputs: ImageNet's, or the published 100?
        testsets.head_classes("x", {}, 1000)
    (tmp_path / "val" / IMAGENET_100[0]).rename(tmp_path / "val" / "n00000001")
    with pytest.raises(UsageError):
        testsets.head_classes("x", {}, 100, val=tmp_path)
