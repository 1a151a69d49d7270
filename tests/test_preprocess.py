"""The data set scripts, run as people run them, on miniature ImageNets."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import REPOSITORY, run_script, write_folder, write_photo
from PIL import Image

SUBSET, TEXTURE, FOLDERS = (
    f"preprocess/{name}.py" for name in ("imagenet_100_subset", "imagenet_texture_syn", "torchvision_folders")
)


@pytest.fixture
def imagenet(tmp_path):
    """Two classes of photos, and in the first one the files that real ImageNet holds and a few worse ones."""
    root = write_folder(tmp_path / "imagenet", train=6, val=2)
    odd = root / "train" / "n01"
    photo = Image.open(odd / "n01_0.JPEG").resize((120, 110))
    photo.save(odd / "png.JPEG", "PNG")
    photo.convert("CMYK").save(odd / "cmyk.JPEG", "JPEG")
    photo.convert("L").save(odd / "grey.JPEG", "JPEG")
    photo.resize((60, 400)).save(odd / "narrow.JPEG", "JPEG")
    whole = (odd / "n01_1.JPEG").read_bytes()
    (odd / "truncated.JPEG").write_bytes(whole[: len(whole) // 2])
    (odd / "empty.JPEG").write_bytes(b"")
    return root


def tree(root):
    """{relative path: bytes} of all files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def synthesise(source, destination, *options, **settings):
    return run_script(TEXTURE, "--imagenet_path", source, "--imagenet_t_path", destination, *options, **settings)


def subset(source, destination, *options, **settings):
    (source / "classes.txt").write_text("n02\nn01\n")
    return run_script(
        SUBSET,
        "--imagenet_path",
        source,
        "--imagenet100_path",
        destination,
        "--classes",
        source / "classes.txt",
        *options,
        **settings,
    )


def test_from_imagenet_to_training_with_textures(imagenet, tmp_path):
    data = tmp_path / "imagenet-100"
    subset(imagenet, data)
    run = synthesise(data, tmp_path / "imagenet-100-texture", "--workers", 2, check=False)
    assert run.returncode == 1 and "wrote 16 textures; 13 photos below 96 px were enlarged first" in run.stdout
    told = run.stderr.splitlines()
    assert "2 broken images were left out:" in told
    assert any("train/n01/truncated.JPEG" in line for line in told) and any(
        "train/n01/empty.JPEG" in line for line in told
    )
    textures = sorted((tmp_path / "imagenet-100-texture").rglob("*.*"))
    assert len(textures) == 16 and all(Image.open(path).size == (224, 224) for path in textures)

    training = run_script(
        "moco-non-sem-neg.py",
        "-a",
        "resnet10",
        "--image-size",
        32,
        "--batch-size",
        8,
        "--moco-k",
        64,
        "-j",
        1,
        "--epochs",
        1,
        "--robust",
        "texture_syn",
        "--ckpt_path",
        tmp_path / "ckpt",
        tmp_path / "imagenet-100-texture",
    )
    assert "photos skipped because they have no texture: 2: " in training.stdout
    assert (tmp_path / "ckpt" / "checkpoint_0000.pth.tar").exists()


def test_textures_depend_on_the_seed_and_the_path_alone(imagenet, tmp_path):
    for name, options in (
        ("one", ["--workers", 1]),
        ("two", ["--workers", 2]),
        ("seed", ["--workers", 2, "--seed", 1]),
    ):
        synthesise(imagenet, tmp_path / name, *options, check=False)
    for part in ("1/3", "3/3", "2/3"):
        synthesise(imagenet, tmp_path / "shards", "--shard", part, "--workers", 1, check=False)
    one = tree(tmp_path / "one")
    assert len(one) == 16 and one == tree(tmp_path / "two") == tree(tmp_path / "shards")
    other = tree(tmp_path / "seed")
    assert one.keys() == other.keys() and all(one[name] != other[name] for name in one)


def test_small_patches_for_small_photos(imagenet, tmp_path):
    run = synthesise(imagenet, tmp_path / "t", "--patch", 24, "--size", 64, "--workers", 1, check=False)
    assert "wrote 16 textures; 0 photos below 24 px were enlarged first" in run.stdout
    assert all(Image.open(path).size == (64, 64) for path in (tmp_path / "t").rglob("*.png"))
    synthesise(imagenet, tmp_path / "p", "--patch", 24, "--size", 64, "--preview", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width < 2 * 224
    refused = synthesise(imagenet, tmp_path / "t", "--patch", 4, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--patch 4" in refused.stderr


@pytest.mark.parametrize("script", [SUBSET, TEXTURE, FOLDERS, "preprocess/shapes.py"])
def test_help_fits_the_terminal_and_shows_defaults_that_exist(script):
    help_text = run_script(script, "--help", env={"COLUMNS": "80"}).stdout
    assert max(map(len, help_text.splitlines())) <= 80
    assert "None" not in help_text and "\n" + 30 * " " not in help_text.partition("options:")[2]


def test_killed_and_started_again_equals_uninterrupted(imagenet, tmp_path):
    for i in range(6, 30):
        write_photo(imagenet / "train" / "n02" / f"n02_{i}.JPEG", seed=i)
    synthesise(imagenet, tmp_path / "whole", "--workers", 2, check=False)
    whole = tree(tmp_path / "whole")
    for workers in (1, 2):
        destination = tmp_path / f"cut{workers}"
        command = [
            sys.executable,
            TEXTURE,
            "--imagenet_path",
            imagenet,
            "--imagenet_t_path",
            destination,
            "--workers",
            str(workers),
        ]
        for wanted in (5, 14, 23):
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            deadline = time.monotonic() + 60
            while len(list(destination.rglob("*.png"))) < wanted and time.monotonic() < deadline:
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert wanted <= len(list(destination.rglob("*.png"))) < len(whole)
        synthesise(imagenet, destination, "--workers", workers, check=False)
        assert tree(destination) == whole


def test_what_is_there_is_kept_unless_asked_for_anew(imagenet, tmp_path):
    destination = tmp_path / "t"
    synthesise(imagenet, destination, "--limit", 1, "--workers", 1)  # the first photo of each class
    texture = destination / "train" / "n02" / "n02_0.png"
    right = texture.read_bytes()
    assert sorted(tree(destination)) == ["train/n01/cmyk.png", "train/n02/n02_0.png"]
    texture.write_bytes(b"mine")
    assert "2 of them done" in synthesise(imagenet, destination, "--limit", 1).stdout
    assert texture.read_bytes() == b"mine"
    synthesise(imagenet, destination, "--limit", 1, "--overwrite")
    assert texture.read_bytes() == right


def test_other_splits_and_a_preview_that_writes_nothing_else(imagenet, tmp_path):
    synthesise(imagenet, tmp_path / "t", "--splits", "val", "--workers", 1)
    assert len(tree(tmp_path / "t")) == 4 and (tmp_path / "t" / "val" / "n02" / "n02_1.png").exists()
    synthesise(imagenet, tmp_path / "p", "--splits", "val", "--preview", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 2 * (224 + 96 + 224) and not (tmp_path / "p").exists()


def external_program(path, body):
    path.write_text(f"#!{sys.executable}\nimport sys, time\nfrom PIL import Image\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_authors_program_gets_the_patches_and_a_time_limit(imagenet, tmp_path):
    # As texture-synthesis is called; it pastes the patches instead.
    paste = external_program(
        tmp_path / "my program",
        """
assert sys.argv[1:4] == ["--out-size", "224", "--out"] and sys.argv[5] == "generate" and len(sys.argv) == 8
canvas = Image.new("RGB", (224, 224))
for i, name in enumerate(sys.argv[6:]):
    patch = Image.open(name)
    assert patch.size == (96, 96)
    canvas.paste(patch, (96 * i, 0))
canvas.save(sys.argv[4])""",
    )
    synthesise(imagenet, tmp_path / "t", "--splits", "val", "--texture-synthesis", paste, "--workers", 1)
    texture = np.asarray(Image.open(tmp_path / "t" / "val" / "n01" / "n01_0.png"))
    photo = Image.open(imagenet / "val" / "n01" / "n01_0.JPEG").resize((120, 96), Image.BICUBIC)
    assert np.array_equal(texture[:96, :96], np.asarray(photo)[:, 12:108])

    slow = external_program(tmp_path / "slow", "time.sleep(60)")
    run = synthesise(
        imagenet,
        tmp_path / "s",
        "--splits",
        "val",
        "--texture-synthesis",
        slow,
        "--time-limit",
        1,
        "--limit",
        1,
        "--workers",
        2,
        check=False,
    )
    assert run.returncode == 1 and run.stderr.count("took more than 1 s") == 2 and tree(tmp_path / "s") == {}
    failing = external_program(tmp_path / "failing", "sys.exit('out of ideas')")
    run = synthesise(
        imagenet, tmp_path / "s", "--splits", "val", "--texture-synthesis", failing, "--limit", 1, check=False
    )
    assert run.returncode == 1 and run.stderr.count("out of ideas") == 2 and tree(tmp_path / "s") == {}


@pytest.mark.parametrize(
    "options, told",
    [
        (["--splits", "test"], "no test/ folder; SRC is the folder above it, and has train, val"),
        (["--shard", "0/4"], "'0/4' is not a part I/N"),
        (["--shard", "5/4"], "'5/4'"),
        (["--workers", "0"], "'0' is not a whole number of 1 or more"),
        (["--limit", "none"], "'none'"),
        (["--texture-synthesis", "no-such-program"], "no such program"),
        (["--preview", "sheet.jpg"], "does not end in .png"),
    ],
)
def test_bad_texture_options_end_in_one_line(imagenet, tmp_path, options, told):
    run = synthesise(imagenet, tmp_path / "t", *options, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and told in run.stderr and not (tmp_path / "t").exists()


def test_two_photos_of_one_texture_are_refused(imagenet, tmp_path):
    write_photo(imagenet / "train" / "n01" / "n01_0.png")
    run = synthesise(imagenet, tmp_path / "t", check=False)
    assert run.returncode == 2 and "1 photos differ from another in the suffix only" in run.stderr


@pytest.mark.parametrize("mode", ["symlink", "hardlink", "copy"])
def test_the_subset_holds_the_listed_classes_and_stays(imagenet, tmp_path, mode):
    for split in ("train", "val"):
        write_photo(imagenet / split / "n03" / "other.JPEG")
    destination = tmp_path / "i100"
    run = subset(imagenet, destination, "--mode", mode)
    assert "4 class folders made, 0 were there already" in run.stdout
    assert f"{destination / 'train'}: 2 classes, 18 photos" in run.stdout and "n01 12, n02 6" in run.stdout
    assert sorted(path.name for path in destination.iterdir()) == ["train", "val"]
    for split in ("train", "val"):
        for wnid in ("n01", "n02"):
            folder = destination / split / wnid
            assert folder.is_symlink() == (mode == "symlink")
            assert tree(folder) == tree(imagenet / split / wnid)
            if mode == "symlink":
                assert not os.path.isabs(os.readlink(folder))
    a, b = (root / "val" / "n01" / "n01_0.JPEG" for root in (imagenet, destination))
    assert (a.stat().st_ino == b.stat().st_ino) == (mode != "copy")
    before = {path: path.lstat().st_mtime_ns for path in destination.rglob("*")}
    assert "0 class folders made, 4 were there already" in subset(imagenet, destination, "--mode", mode).stdout
    assert {path: path.lstat().st_mtime_ns for path in destination.rglob("*")} == before


def test_missing_classes_are_all_listed_and_nothing_is_made(imagenet, tmp_path):
    shutil.rmtree(imagenet / "val" / "n01")
    shutil.rmtree(imagenet / "train" / "n02")
    run = subset(imagenet, tmp_path / "i100", check=False)
    assert run.returncode == 1 and "2 of 4 class folders are missing" in run.stderr
    assert "val/n01" in run.stderr and "train/n02" in run.stderr and not (tmp_path / "i100").exists()


def test_a_class_that_was_half_made_is_made_anew(imagenet, tmp_path):
    """A copy that was killed leaves its half outside of the splits, and the next run completes the class."""
    half = tmp_path / "i100" / ".partial" / "train" / "n01"
    half.mkdir(parents=True)
    (half / "n01_0.JPEG").write_bytes(b"half")
    subset(imagenet, tmp_path / "i100", "--mode", "copy")
    assert tree(tmp_path / "i100" / "train" / "n01") == tree(imagenet / "train" / "n01")
    assert not (tmp_path / "i100" / ".partial").exists()


def test_smaller_copies(imagenet, tmp_path):
    run = subset(imagenet, tmp_path / "i100", "--resize", 48, "--workers", 2, check=False)
    assert run.returncode == 1 and "2 broken images were left out" in run.stderr
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "i100" / "train" / "n01").iterdir()}
    assert len(sizes) == 10 and sizes["n01_0.JPEG"] == (60, 48) and sizes["narrow.JPEG"] == (48, 320)
    assert all(Image.open(path).format == "JPEG" for path in (tmp_path / "i100").rglob("*.JPEG"))
    assert Image.open(tmp_path / "i100" / "train" / "n01" / "cmyk.JPEG").mode == "RGB"


def test_the_shipped_list_is_imagenet_100s(tmp_path):
    """The default list: without --classes, a folder without those classes misses 200 folders."""
    write_folder(tmp_path / "imagenet")
    run = run_script(
        SUBSET, "--imagenet_path", tmp_path / "imagenet", "--imagenet100_path", tmp_path / "i100", check=False
    )
    assert (
        run.returncode == 1 and "200 of 200 class folders are missing" in run.stderr and "train/n02869837" in run.stderr
    )


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda root: shutil.rmtree(root / "val"), "no val/ folder"),
        (lambda root: [shutil.rmtree(folder) for folder in (root / "val").iterdir()], "sorted into <wnid>/ folders"),
    ],
)
def test_an_imagenet_that_is_not_unpacked_right_is_refused(imagenet, tmp_path, change, told):
    change(imagenet)
    run = subset(imagenet, tmp_path / "i100", check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and told in run.stderr


def write_fashion_mnist(folder):
    """Files as FashionMNIST's archive holds them: 4 training and 2 test images, image i all of gray 10 i, label i."""
    import gzip

    folder.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 2)):
        images = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        images += b"".join(bytes([10 * i] * 784) for i in range(count))
        labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(data)


def test_fashion_mnist_from_the_files_of_its_archive(tmp_path):
    write_fashion_mnist(tmp_path / "raw")
    for _ in range(2):  # the second run finds all there
        run_script(FOLDERS, "--dataset", "fashionmnist", "--root", tmp_path / "raw", "--out", tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == [
        "train/Dress/000003.png",
        "train/Pullover/000002.png",
        "train/T-shirt_top/000000.png",
        "train/Trouser/000001.png",
        "val/T-shirt_top/000000.png",
        "val/Trouser/000001.png",
    ]
    image = Image.open(tmp_path / "out" / "train" / "Dress" / "000003.png")
    assert image.mode == "RGB" and image.size == (28, 28) and image.getpixel((3, 4)) == (30, 30, 30)
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == sorted(
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )


def test_stl10_keeps_its_unlabelled_images_apart(tmp_path):
    """Through the script's own functions: torchvision checks the real files' sums, which a miniature cannot have."""
    import torchvision_folders

    class Part:
        classes = ("airplane", "bird")

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Image.new("L", (96, 96), 10 * index), (0, 1, -1)[index]

    torchvision_folders.write_images(Part(), tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["airplane/000000.png", "all/000002.png", "bird/000001.png"]
    assert torchvision_folders.parts_of("stl10").keys() == {"train", "val", "unlabeled/train"}
    assert torchvision_folders.parts_of("cifar10").keys() == {"train", "val"}


def test_raw_files_that_are_not_there_end_in_one_line(tmp_path):
    run = run_script(
        FOLDERS,
        "--dataset",
        "cifar10",
        "--root",
        tmp_path / "raw",
        "--out",
        tmp_path / "out",
        check=False,
        env={"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "downloading them failed" in run.stderr
    assert not (tmp_path / "out").exists()
