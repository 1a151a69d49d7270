"""Folders without class folders, given to the scripts."""

from helpers import PRETRAIN, PROBE, SMALL, SMALL_PROBE, log, refused, run_script, same, weights, write_photo


def write_images(folder):
    for number in range(8):
        write_photo(folder / f"{number}.JPEG", seed=number)


def test_a_flat_folder_trains_as_one_class_folder_does(tmp_path):
    write_images(tmp_path / "flat" / "train")
    write_images(tmp_path / "one" / "train" / "all")
    command = [PRETRAIN, *SMALL, "--moco-k", 8, "--epochs", 1, "--ckpt_path"]
    flat = run_script(*command, tmp_path / "a", tmp_path / "flat")
    one = run_script(*command, tmp_path / "b", tmp_path / "one")
    assert "8 in 1 class, as there are no class folders\n" in flat.stdout and "class folders" not in one.stdout
    assert same(*(weights(tmp_path / name / "checkpoint_0000.pth.tar") for name in "ab"))
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_what_needs_labels_refuses_a_flat_folder(tmp_path):
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "val")
    line = refused(PRETRAIN, *SMALL, "--knn", "--ckpt_path", tmp_path / "ckpt", tmp_path / "data")
    assert "--knn needs labels" in line and "leave out --knn" in line
    line = refused(PROBE, *SMALL_PROBE, "--ckpt_path", tmp_path / "ckpt", tmp_path / "data")
    assert "no class folders, only 8 images" in line and "one folder of images per class" in line
