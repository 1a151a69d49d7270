"""Pre-training on a folder of images without class folders."""

import json

import pytest
from helpers import PRETRAIN, SMALL, run_script, same, weights, write_photo

from moco import datasets
from moco.errors import UsageError


def write_images(folder):
    for number in range(8):
        write_photo(folder / f"{number}.JPEG", seed=number)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_without_class_folders_are_one_class(tmp_path):
    write_images(tmp_path / "data" / "train")
    (tmp_path / "data" / "train" / ".thumbnails").mkdir()
    found = datasets.list_training_images(str(tmp_path / "data"))
    assert list(found.photos) == [str(tmp_path / "data" / "train" / f"{number}.JPEG") for number in range(8)]
    assert list(found.labels) == [0] * 8 and found.classes == ["all"] and found.textures is None


def test_class_folders_come_first(tmp_path):
    write_images(tmp_path / "data" / "train")
    write_photo(tmp_path / "data" / "train" / "cat" / "a.png")
    assert datasets.list_training_images(str(tmp_path / "data")).classes == ["cat"]


def test_without_any_image_the_folder_for_unlabelled_ones_is_named(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match="no class folders; images without labels belong into one, all/"):
        datasets.list_training_images(str(tmp_path / "data"))
    with pytest.raises(UsageError, match="no class folders"):
        datasets.list_images(write_images(tmp_path / "val"))  # a test set needs labels


def test_a_flat_folder_trains_as_one_class_folder_does(tmp_path):
    write_images(tmp_path / "flat" / "train")
    write_images(tmp_path / "one" / "train" / "all")
    command = [PRETRAIN, *SMALL, "--moco-k", 8, "--epochs", 1, "--ckpt_path"]
    flat = run_script(*command, tmp_path / "a", tmp_path / "flat")
    one = run_script(*command, tmp_path / "b", tmp_path / "one")
    line = f"{tmp_path / 'flat' / 'train'} has no class folders: its images are one class"
    assert line in flat.stdout and "class folders" not in one.stdout
    assert same(*(weights(tmp_path / name / "checkpoint_0000.pth.tar") for name in "ab"))
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in "ab"]
    assert losses[0] == losses[1]
