"""preprocess/imagenet_100_subset.py, run as people run it."""

import os
import shutil

import numpy as np
import pytest
from helpers import run_script, started, write_photo
from PIL import Image
from preprocessing import SUBSET, refusal, subset_command, texture_command, tree

from moco.training import files


def test_the_subset_holds_links_to_the_listed_classes_and_stays(imagenet):
    for split in ("train", "val"):
        write_photo(imagenet / split / "n03" / "other.JPEG")
    data, command = imagenet.parent / "i100", subset_command(imagenet)
    run = run_script(*command)
    assert "4 class folders made, 0 were there already" in run.stdout
    assert f"{data / 'train'}: 2 classes, 6 photos" in run.stdout and "n01 3, n02 3" in run.stdout
    links = {str(path.relative_to(data)): path for path in data.glob("[!.]*/*")}
    assert links.keys() == {"train/n01", "train/n02", "val/n01", "val/n02"}
    assert all(path.samefile(imagenet / name) and not os.path.isabs(os.readlink(path)) for name, path in links.items())
    before = {path: path.lstat().st_mtime_ns for path in links.values()}
    assert "0 class folders made, 4 were there already" in run_script(*command).stdout
    assert {path: path.lstat().st_mtime_ns for path in links.values()} == before
    shutil.rmtree(data)
    assert "12 photos, 0 of them done" in run_script(*subset_command(imagenet, "--mode", "copy")).stdout
    copied = tree(data)
    assert not (data / "val" / "n01").is_symlink() and copied.pop("subset.json")
    assert copied.items() <= tree(imagenet).items() and len(copied) == 12  # neither the third class nor other files
    shutil.rmtree(data)
    run_script(*command)
    moved = imagenet.rename(imagenet.with_name("moved"))  # the links lead nowhere now
    assert "4 class folders made" in run_script(*subset_command(moved)).stdout


def test_smaller_copies(imagenet):
    odd = imagenet / "train" / "n01" / "part0"
    write_photo(odd / "narrow.JPEG", (60, 400))
    Image.open(odd / "narrow.JPEG").convert("CMYK").save(odd / "cmyk.JPEG", "JPEG")
    Image.fromarray(np.linspace(0, 65535, 6400).astype(np.uint16).reshape(80, 80)).save(odd / "16.JPEG", "PNG")
    Image.fromarray(np.linspace(0, 1, 6400, dtype=np.float32).reshape(80, 80)).save(odd / "floats.JPEG", "TIFF")
    (odd / "n01_0.JPEG").write_bytes(b"broken")
    for number in range(3):
        (imagenet / "train" / "n02" / f"part{number}" / f"n02_{number}.JPEG").write_bytes(b"broken")
    run = run_script(*subset_command(imagenet, "--resize", 48), check=False)
    assert run.returncode == 1 and "5 broken images were left out" in run.stderr
    assert "floats.JPEG: ValueError: its samples are floats" in run.stderr
    made = {path.name: Image.open(path) for path in (imagenet.parent / "i100" / "train").rglob("*.JPEG")}
    assert made.keys() == {"narrow.JPEG", "cmyk.JPEG", "16.JPEG", "n01_1.JPEG", "n01_2.JPEG"}
    assert made["narrow.JPEG"].size == (48, 320) and made["n01_1.JPEG"].size == (60, 48)
    assert "n02" not in os.listdir(imagenet.parent / "i100" / "train")  # all of its photos are broken
    assert all(image.format == "JPEG" and image.mode == "RGB" for image in made.values())
    assert abs(np.asarray(made["16.JPEG"]).mean() - 127) < 3  # 16 bits are scaled, not clipped to white


def test_a_folder_holds_one_subset(imagenet):
    def run(imagenet, *options):
        return run_script(*subset_command(imagenet, *options), check=False)

    data, fewer = imagenet.parent / "i100", imagenet.parent / "fewer.txt"
    (imagenet / "train" / "n01" / "a.avif").touch()
    assert "train: left out, as these formats are not read: " in (stdout := run(imagenet, "--resize", 48).stdout)
    assert "1 .avif" in stdout
    fewer.write_text("n01")
    made = tree(data)
    for options in (), ("--resize", 64), ("--resize", 48, "--classes", fewer):
        assert "i100 holds images made with " in refusal(run(imagenet, *options))
    assert tree(data) == made
    for gone in ("val/n01/part1/n01_1.JPEG", "val/n02/part0/n02_0.JPEG"):  # as if interrupted
        (data / gone).unlink()
    moved = imagenet.rename(imagenet.with_name("moved"))
    (imagenet.parent / "classes.txt").write_text("n01 n02")
    assert run(moved, "--resize", 48).stdout.count("12 photos, 10 of them done") == 1
    assert tree(data) == made


def test_missing_classes_are_all_listed_and_nothing_is_made(imagenet):
    shutil.rmtree(imagenet / "val" / "n01")
    (imagenet.parent / "classes.txt").write_text("n01\nn02\nn0Z\n")
    run = run_script(*subset_command(imagenet), check=False)
    assert run.returncode == 1 and "3 of 6 class folders are missing" in run.stderr
    assert all(name in run.stderr for name in ("val/n01", "train/n0Z", "val/n0Z"))
    assert not (imagenet.parent / "i100").exists()
    run = run_script(SUBSET, "--imagenet_path", imagenet, "--imagenet100_path", imagenet.parent / "i", check=False)
    assert run.returncode == 1 and "200 of 200 class folders are missing" in run.stderr  # those of ImageNet-100


BAD_TREES = {
    "dangling": (lambda folder: (folder / "n01" / "more").symlink_to("gone"), "leads nowhere"),
    "empty class": (lambda folder: shutil.rmtree(folder / "n01") or (folder / "n01").mkdir(), "no image"),
    "flat": (lambda folder: [shutil.rmtree(path) for path in folder.glob("n*")], "class folders"),
    "no split": (shutil.rmtree, "no train/ folder"),
}


@pytest.mark.parametrize("tree", BAD_TREES)
@pytest.mark.parametrize("command", [subset_command, texture_command])
def test_a_misleading_tree_is_refused_before_any_work(imagenet, tree, command):
    change, told = BAD_TREES[tree]
    change(imagenet / "train")
    assert told in refusal(run_script(*command(imagenet), check=False))
    assert not (imagenet.parent / "i100").exists() and not (imagenet.parent / "t").exists()


def test_a_second_run_waits_for_the_first_and_says_so(imagenet):
    (imagenet.parent / "i100").mkdir()
    lock = files.FolderLock("", imagenet.parent / "i100" / ".lock")
    lock.acquire()
    run = started(*subset_command(imagenet))
    line = run.stderr.readline()
    assert "another process is writing" in line and f"process {os.getpid()} on " in line
    assert not list((imagenet.parent / "i100").glob("[!.]*"))
    os.close(files._held.pop(lock.path))  # frees it
    run.communicate(timeout=60)
    assert run.returncode == 0 and len(os.listdir(imagenet.parent / "i100" / "train")) == 2
