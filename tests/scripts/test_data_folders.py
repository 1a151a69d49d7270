"""Pre-training on a folder of images without class folders."""

import json
import os

import files
import image_lists
import pytest
from helpers import PRETRAIN, PROBE, SMALL, SMALL_PROBE, refused, run_script, same, weights, write_photo

from moco.data import folders
from moco.errors import UsageError
from moco.evaluation import testsets


def write_images(folder):
    for number in range(8):
        write_photo(folder / f"{number}.JPEG", seed=number)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_without_class_folders_are_one_class(tmp_path):
    write_images(tmp_path / "data" / "train")
    (tmp_path / "data" / "train" / ".thumbnails").mkdir()
    found = folders.list_training_images(str(tmp_path / "data"))
    assert list(found.photos) == [str(tmp_path / "data" / "train" / f"{number}.JPEG") for number in range(8)]
    assert list(found.labels) == [0] * 8 and found.classes == ["all"] and found.textures is None


def test_images_beside_class_folders_are_refused(tmp_path):
    train = write_images(tmp_path / "data" / "train")
    write_photo(train / "cat" / "a.png")
    for list_below, error in (
        (lambda: folders.list_training_images(str(tmp_path / "data")), UsageError),
        (lambda: folders.list_images(train), UsageError),
        (lambda: testsets.list_test_set("sketch", str(train), ["cat"]), UsageError),
        (lambda: image_lists.list_images(train), files.UsageError),
        (lambda: image_lists.list_images(train, without_classes=True), files.UsageError),
    ):
        with pytest.raises(error, match="it has 1 class folders and, beside them, images: 8: 0.JPEG, 1.JPEG"):
            list_below()
    line = refused(PRETRAIN, *SMALL, "--ckpt_path", tmp_path / "ckpt", tmp_path / "data")
    assert "0.JPEG" in line and "move these" in line


def test_a_folder_without_any_image_is_refused(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for call in (folders.list_training_images, lambda root: image_lists.list_images(tmp_path / "data" / "train", True)):
        with pytest.raises((UsageError, files.UsageError), match="it has no class folders$"):
            call(str(tmp_path / "data"))


def test_what_needs_labels_refuses_a_flat_folder(tmp_path):
    root = tmp_path / "data"
    write_images(root / "train")
    write_images(root / "val")
    line = refused(PRETRAIN, *SMALL, "--knn", "--ckpt_path", tmp_path / "ckpt", root)
    assert "--knn needs labels" in line and "leave out --knn" in line
    line = refused(PROBE, *SMALL_PROBE, "--ckpt_path", tmp_path / "ckpt", root)
    assert "no class folders, only 8 images" in line and "one folder of images per class" in line
    with pytest.raises(UsageError, match="no class folders, only 8 images"):
        testsets.list_test_set("sketch", str(root / "val"), ["n01"])
    with pytest.raises(files.UsageError, match="only 8 images; make one folder of images per class"):
        image_lists.list_images(root / "val")


def test_a_flat_folder_has_textures_and_pairs(tmp_path):
    write_images(tmp_path / "x" / "train")
    command = ["--imagenet_path", tmp_path / "x", "--imagenet_t_path", tmp_path / "x-texture", "--workers", 1]
    run_script("preprocess/imagenet_texture_syn.py", *command, "--patch", 16, "--size", 32)
    data = folders.list_texture_pairs(str(tmp_path / "x-texture"))
    assert [os.path.basename(path) for path in data.photos] == [f"{number}.JPEG" for number in range(8)]
    assert [os.path.basename(path) for path in data.textures] == [f"{number}.png" for number in range(8)]
    assert data.labels == [0] * 8 and data.classes == ["all"]


def test_a_flat_folder_trains_as_one_class_folder_does(tmp_path):
    write_images(tmp_path / "flat" / "train")
    write_images(tmp_path / "one" / "train" / "all")
    command = [PRETRAIN, *SMALL, "--moco-k", 8, "--epochs", 1, "--ckpt_path"]
    flat = run_script(*command, tmp_path / "a", tmp_path / "flat")
    one = run_script(*command, tmp_path / "b", tmp_path / "one")
    assert "8 in 1 class, as there are no class folders\n" in flat.stdout and "class folders" not in one.stdout
    assert same(*(weights(tmp_path / name / "checkpoint_0000.pth.tar") for name in "ab"))
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in "ab"]
    assert losses[0] == losses[1]
