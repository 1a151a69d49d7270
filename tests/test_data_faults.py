"""Data that are not what they seem: trees of folders, class files, values of images, downloads."""

import contextlib
import functools
import io
import os
import random
import shutil
import signal
import socket
import sys
import types
import zlib
from pathlib import Path

import files
import image_lists
import numpy as np
import pytest
import torch
from helpers import EVALUATE, PRETRAIN, PROBE, SMALL, SMALL_PROBE, fill_encoder, refused, write_folder, write_photo
from PIL import Image

from moco.data import datasets, folders, images
from moco.data.datasets import ImageList, StrictDataset
from moco.data.images import BadImage
from moco.encoders import build_encoder
from moco.errors import RunError, UsageError
from moco.evaluation import released, testsets


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch):
    monkeypatch.setattr(images, "RETRY_SECONDS", 0)


# Trees


def moco_listing(root):
    return [os.path.relpath(path, root) for path in folders.list_images(root).paths]


def preprocess_listing(root):
    return [os.path.join(name, image) for name, names in image_lists.list_images(root).items() for image in names]


LISTINGS = {"moco": (moco_listing, UsageError), "preprocess": (preprocess_listing, files.UsageError)}


@pytest.fixture(params=LISTINGS)
def lister(request):
    """(list the images below a folder of class folders, the exception that refuses it)"""
    return LISTINGS[request.param]


@pytest.fixture
def tree(tmp_path):
    """Two classes with an image each, and one of them with a folder in between."""
    for name in ("train/n01/a.JPEG", "train/n02/sub/b.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    return tmp_path / "train"


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def make_socket(path):
    folder = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(folder)


REFUSED = {
    "a link to itself": lambda root: link(root / "n01" / "loop", "loop"),
    "a link to its folder": lambda root: link(root / "n01" / "loop", "."),
    "a link to the class": lambda root: link(root / "n02" / "sub" / "loop", "../../n02"),
    "a link to the root": lambda root: link(root / "n01" / "loop", ".."),
    "a link above the root": lambda root: link(root / "n01" / "loop", "../.."),
    "a link to /": lambda root: link(root / "n01" / "loop", "/"),
    "two links up": lambda root: [link(root / "n01" / name, "..") for name in ("one", "two")],
    "two links to each other": lambda root: [link(root / "n01" / "x", "y"), link(root / "n01" / "y", "x")],
    "a class link to the root": lambda root: link(root / "n03", "."),
    "a class link to a class": lambda root: link(root / "n03", "n01"),
    "a class link into a class": lambda root: link(root / "n00", "n02/sub"),
    "a link to another class": lambda root: link(root / "n01" / "more", "../n02"),
    "a dangling class link": lambda root: link(root / "n03", "/nowhere/n03"),
    "a dangling folder link": lambda root: link(root / "n01" / "more", "../gone"),
    "a dangling image link": lambda root: link(root / "n01" / "c.JPEG", "../gone.JPEG"),
    "an empty class": lambda root: (root / "n03").mkdir(),
    "a class of hidden files": lambda root: write_litter(root / "n03"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_tree_with_links_that_mislead_is_refused(tree, lister, fault):
    list_below, error = lister
    REFUSED[fault](tree)
    with pytest.raises(error, match=str(tree)) as refusal:
        list_below(tree)
    assert "\n" not in str(refusal.value)


LITTER = (".DS_Store", "._a.JPEG", ".hidden.png", "Thumbs.db")


def write_litter(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in LITTER:
        (folder / name).touch()
    for name in (".ipynb_checkpoints", "__MACOSX", "lost+found", "@eaDir", ".Trash-0"):
        (folder / name).mkdir()
        (folder / name / "copy.JPEG").touch()
        (folder / name / "loop").symlink_to(folder)


IGNORED = {
    "hidden entries": write_litter,
    "a fifo": lambda folder: os.mkfifo(folder / "x.JPEG"),
    "a socket": lambda folder: make_socket(folder / "x.JPEG"),
    "a link to a device": lambda folder: link(folder / "x.JPEG", "/dev/zero"),
    "a link to a fifo": lambda folder: [os.mkfifo(folder / "fifo"), link(folder / "x.JPEG", "fifo")],
    "an empty subfolder": lambda folder: (folder / "x.JPEG").mkdir(),
    "other files": lambda folder: (folder / "labels.txt").touch(),
}


@pytest.mark.parametrize("kind", IGNORED)
@pytest.mark.parametrize("place", [".", "n01", "n02/sub"])
def test_what_is_no_image_is_not_listed(tree, lister, kind, place):
    if (kind, place) == ("an empty subfolder", "."):
        return  # that is a class
    before = lister[0](tree)
    IGNORED[kind](tree / place)
    assert lister[0](tree) == before == ["n01/a.JPEG", "n02/sub/b.png"]


def test_links_to_data_elsewhere_are_listed(tree, lister, tmp_path):
    other = tmp_path / "other"
    write_photo(other / "n03" / "deep" / "c.JPEG")
    link(tree / "n03", "../other/n03")
    link(tree / "n01" / "linked.JPEG", "../../other/n03/deep/c.JPEG")
    assert lister[0](tree) == ["n01/a.JPEG", "n01/linked.JPEG", "n02/sub/b.png", "n03/deep/c.JPEG"]


@pytest.mark.parametrize("place", [".", "n01", "n02/sub"])
@pytest.mark.parametrize("denied", ["scandir", "access"])
def test_an_unreadable_folder_is_refused_with_its_path(tree, lister, monkeypatch, place, denied):
    """As root nothing is unreadable: the system's answer is put in."""
    folder, real = str(tree / place), getattr(os, denied)

    def deny(path, *args):
        if Path(path) == Path(folder):
            if denied == "access":
                return False
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args)

    monkeypatch.setattr(os, denied, deny)
    with pytest.raises(lister[1], match="Permission denied") as refusal:
        lister[0](tree)
    assert str(refusal.value).startswith(str(Path(folder))) and "remove" not in str(refusal.value)


def test_a_split_that_cannot_be_read_is_not_missing(tree, monkeypatch):
    def denied(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", denied)
    for call in (folders.list_images, functools.partial(folders.split_path, split="train"), testsets.class_root):
        with pytest.raises(UsageError, match="Permission denied"):
            call(str(tree))


def test_a_dangling_split_is_not_missing(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").symlink_to("gone")
    for call in (functools.partial(folders.split_path, split="val"), testsets.class_root):
        with pytest.raises(UsageError, match="val: a link that leads nowhere .gone."):
            call(str(tmp_path))


def test_no_file_is_asked_for_its_type(tree, lister, monkeypatch):
    """The folder's entry says it: a stat for each of 1.28 million files takes minutes on a network drive."""
    for number in range(50):
        (tree / "n01" / f"{number}.JPEG").touch()
    asked, real = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(str(path)) or real(path, **options))
    assert len(lister[0](tree)) == 52
    assert not [path for path in asked if path.endswith(".JPEG")]


def test_both_sides_know_the_same_images():
    assert image_lists.IMAGE_SUFFIXES == folders.IMG_EXTENSIONS and image_lists.NOT_DATA == folders.NOT_DATA


def test_a_tree_deeper_than_the_recursion_limit(tmp_path, lister):
    folders = [str(tmp_path / "train"), str(tmp_path / "train" / "n01")]
    for _ in range(1050):
        folders.append(folders[-1] + "/d")
    for folder in folders:
        os.mkdir(folder)
    Path(folders[-1], "a.JPEG").touch()
    assert len(lister[0](tmp_path / "train")) == 1
    os.remove(Path(folders[-1], "a.JPEG"))  # pytest's own removal is recursive
    for folder in reversed(folders):
        os.rmdir(folder)


@pytest.mark.parametrize("fault", ["a link to the root", "a dangling class link", "a class link to a class"])
@pytest.mark.parametrize("script", [PRETRAIN, PROBE, EVALUATE])
def test_every_script_refuses_a_misleading_tree(tmp_path, script, fault):
    data = write_folder(tmp_path / "data", train=8)
    for split in ("train", "val"):
        REFUSED[fault](data / split)
    if script == EVALUATE:
        torch.save(linear_checkpoint(2), tmp_path / "model_best_0000.pth.tar")
        message = refused(script, "--val", data, "--pretrained", tmp_path / "model_best_0000.pth.tar")
    else:
        options = SMALL if script == PRETRAIN else SMALL_PROBE
        message = refused(script, *options, "--epochs", 1, "--ckpt_path", tmp_path / "out", data)
    assert str(data) in message and "link" in message


def linear_checkpoint(outputs):
    model = build_encoder("resnet10", outputs)
    fill_encoder(model)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    return {"state_dict": state, "arch": "resnet10", "image_size": 32, "wnids": ["n01", "n02"][:outputs]}


class RandomTree:
    """A random folder of class folders: `images`, what its lister must give, and `refused`, whether it must not."""

    NAMES = ("a", "b c", "ü", "n\udcff", "new\nline", "x" * 200, "-r", "%s", "{}x")

    def __init__(self, root, seed):
        self.rng, self.root, self.images, self.refused, self.count = random.Random(seed), root, set(), False, 0
        self.outside = root.parent / "outside"
        self.outside.mkdir()
        root.mkdir()
        for _ in range(self.rng.randint(1, 3)):
            self.fill_class(self.name())
        if self.rng.random() < 0.2:
            self.mislead(root)
        if self.rng.random() < 0.3:
            write_litter(root)

    def name(self):
        self.count += 1
        return f"{self.rng.choice(self.NAMES)}_{self.count}"

    def fill_class(self, name):
        below = len(self.images)
        folder = self.root / name
        if self.rng.random() < 0.3:  # a link to a folder elsewhere
            target = self.outside / self.name()
            target.mkdir()
            folder.symlink_to(target)
        else:
            folder.mkdir()
        self.fill(folder, depth=0)
        self.refused |= len(self.images) == below

    def fill(self, folder, depth):
        for _ in range(self.rng.randint(0 if depth else 1, 4)):
            draw = self.rng.random()
            if draw < 0.45:
                self.add_image(folder)
            elif draw < 0.6:
                self.add_odd(folder)
            elif draw < 0.65:
                self.mislead(folder)
            elif depth < 3:
                self.add_folder(folder, depth)

    def add_image(self, folder):
        path = folder / (self.name() + self.rng.choice([".JPEG", ".jpg", ".Png", ".webp"]))
        if self.rng.random() < 0.2:
            target = self.outside / self.name()
            target.touch()
            path.symlink_to(target)
        else:
            path.touch()
        self.images.add(os.path.relpath(path, self.root))

    def add_odd(self, folder):
        path = folder / (self.name() + ".JPEG")
        self.rng.choice(
            [
                lambda: os.mkfifo(path),
                lambda: path.symlink_to("/dev/null"),
                lambda: path.with_suffix(".txt").touch(),
                lambda: (folder / f".{path.name[:100]}").touch(),
                lambda: (folder / ".DS_Store").touch(),
                lambda: path.mkdir(),
            ]
        )()

    def add_folder(self, folder, depth):
        path = folder / self.name()
        if self.rng.random() < 0.2:
            target = self.outside / self.name()
            target.mkdir()
            path.symlink_to(target)
        else:
            path.mkdir()
        self.fill(path, depth + 1)

    def mislead(self, folder):
        below = [path for path in self.root.glob("**/") if path.is_dir()]
        target = self.rng.choice(["/nowhere", "gone", ".", "..", folder, self.root, *below])
        (folder / self.name()).symlink_to(target)
        self.refused = True


@contextlib.contextmanager
def at_most(seconds):
    def give_up(*_):
        raise AssertionError(f"takes more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def check_random_trees(folder, seeds):
    outcomes = []
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        tree = RandomTree(place / "train", seed)
        for list_below, error in LISTINGS.values():
            try:
                with at_most(10):
                    listed = list_below(tree.root)
            except error as refusal:
                assert tree.refused, f"tree {seed} is sound: {refusal}"
            else:
                assert not tree.refused, f"tree {seed} must be refused"
                assert sorted(listed) == sorted(tree.images), f"tree {seed}"
        outcomes.append(tree.refused)
        shutil.rmtree(place)
    assert 0.1 < sum(outcomes) / len(outcomes) < 0.9


def test_300_random_trees_give_their_images_or_are_refused(tmp_path):
    check_random_trees(tmp_path, range(300))


@pytest.mark.slow
def test_2000_random_trees_give_their_images_or_are_refused(tmp_path):
    check_random_trees(tmp_path, range(1000, 3000))


def test_two_photos_of_one_texture_are_refused(tmp_path):
    write_folder(tmp_path / "data", train=2)
    write_folder(tmp_path / "data-texture", train=2, suffix=".png")
    write_photo(tmp_path / "data" / "train" / "n01" / "n01_0.png")
    with pytest.raises(UsageError, match="differ from another in the suffix only.*n01_0"):
        folders.list_texture_pairs(str(tmp_path / "data-texture"))


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    write_folder(tmp_path / "data", train=2)
    write_folder(tmp_path / "data-texture", train=1, suffix=".png")
    write_photo(tmp_path / "data" / "train" / "n01" / "odd\udcff.JPEG")
    unmatched = folders.list_texture_pairs(str(tmp_path / "data-texture")).unmatched
    assert "odd\\udcff" in unmatched and unmatched.encode()


def test_a_corruption_in_both_layouts_is_refused(tmp_path):
    for place in ("fog/1/n01", "weather/fog/1/n01"):
        write_photo(tmp_path / place / "a.JPEG")
    with pytest.raises(UsageError, match="are the same test set; remove one"):
        testsets.corruption_folders(str(tmp_path))
    shutil.rmtree(tmp_path / "weather")
    (tmp_path / "weather").symlink_to(".")  # both layouts of the same folders
    assert list(testsets.corruption_folders(str(tmp_path))) == [("fog", 1)]


# Class files


SPELLINGS = {
    "bom": "\ufeffn02\nn01\n".encode(),
    "utf-16": "n02\nn01\n".encode("utf-16"),
    "utf-16, big-endian": b"\xfe\xff" + "n02\nn01\n".encode("utf-16-be"),
    "crlf": b"n02\r\nn01\r\n",
    "old mac": b"n02\rn01",
    "trailing spaces": b"n02  \n\tn01 \n\n",
    "joined files with a bom each": "\ufeffn02\n\ufeffn01".encode(),
    "no-break spaces": "n02\u00a0\nn01".encode(),
}
MISSPELT = {
    "duplicates": (b"n01\nn02\nn01\n", "n01 twice"),
    "empty": (b"\xef\xbb\xbf\n", "it is empty"),
    "utf-16 without a mark": ("n02\nn01\n".encode("utf-16-le"), "not a readable text file"),
    "utf-32": ("n02\nn01\n".encode("utf-32"), "not a readable text file"),
    "a photo": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not a readable text file"),
    "a zero-width space": ("n01\u200b\nn02".encode(), "invisible characters"),
    "a NUL": (b"n01\0\nn02", "invisible characters"),
}


def read_for_evaluation(path):
    return folders.read_class_list(path)


def read_for_subset(path):
    import imagenet_100_subset

    return imagenet_100_subset.read_classes(path)


READERS = pytest.mark.parametrize("read", [read_for_evaluation, read_for_subset])


@READERS
@pytest.mark.parametrize("kind", SPELLINGS)
def test_class_files_are_read_in_any_spelling(tmp_path, read, kind):
    (tmp_path / "classes.txt").write_bytes(SPELLINGS[kind])
    assert read(tmp_path / "classes.txt") == ["n01", "n02"]


@READERS
@pytest.mark.parametrize("kind", MISSPELT)
def test_class_files_that_cannot_be_right_are_refused(tmp_path, read, kind):
    data, told = MISSPELT[kind]
    (tmp_path / "classes.txt").write_bytes(data)
    with pytest.raises((UsageError, files.UsageError), match=f"--classes .*classes.txt: .*{told}"):
        read(tmp_path / "classes.txt")


def test_a_listed_class_that_val_lacks_is_refused(tmp_path):
    write_folder(tmp_path / "data", val=1)
    torch.save(
        {name: value for name, value in linear_checkpoint(2).items() if name != "wnids"},
        tmp_path / "model_best_0000.pth.tar",
    )
    (tmp_path / "classes.txt").write_text("n01\nnO2\n")
    message = refused(
        EVALUATE, "--val", tmp_path / "data", "--classes", tmp_path / "classes.txt",
        "--pretrained", tmp_path / "model_best_0000.pth.tar",
    )  # fmt: skip
    assert "1 of its 2 classes, for example nO2, are not in --val" in message


# Values of images


RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
EXPECTED = (RAMP >> 8).astype(np.uint8)


def encoded(pixels, kind, **options):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def png16(pixels):
    """A PNG of 16 bits per sample, RGB (H, W, 3) or gray with alpha (H, W, 2), which PIL cannot write."""
    height, width, bands = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, {2: 4, 3: 2}[bands], 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, chunks))


def png_chunk(chunk):
    kind, data = chunk
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def tiff12(values):
    """A TIFF of 12 bits per sample, packed; values: (H, W) with an even W."""
    pairs = values.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    data = packed.astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1)]
    tags += [(278, height), (279, len(data))]
    entries = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in tags
    )
    return b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little") + entries + bytes(4) + data


SCALED = {
    "16 bits, png": encoded(RAMP, "PNG"),
    "16 bits, tiff": encoded(RAMP, "TIFF"),
    "16 bits, packed tiff": encoded(RAMP, "TIFF", compression="tiff_lzw"),
    "16 bits, big-endian tiff": encoded(RAMP.astype(">u2"), "TIFF"),
    "16 bits, 0 is white": encoded(65535 - RAMP, "TIFF", tiffinfo={262: 0}),
    "12 bits, tiff": tiff12(RAMP >> 4),
    "12 bits, pgm": b"P5 8 8 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
    "16 bits, pgm": b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes(),
    "16 bits, RGB png": png16(np.stack([RAMP] * 3, 2)),
    "16 bits, gray and alpha": png16(np.stack([RAMP, np.full_like(RAMP, 65535)], 2)),
    "8 bits": encoded(EXPECTED, "PNG"),
}
UNKNOWN = {
    "floats of 0 to 1": (encoded(RAMP.astype(np.float32) / 65535, "TIFF"), "floats"),
    "floats of 0 to 255": (encoded(RAMP.astype(np.float32) / 257, "TIFF"), "floats"),
    "int32 of 0 to 255": (encoded(EXPECTED.astype(np.int32), "TIFF"), "signed"),
    "uint32": (encoded(EXPECTED.astype(np.int32), "TIFF", tiffinfo={339: 1}), "32-bit integers|signed"),
    "portable float map": (b"Pf\n8 8\n-1.0\n" + np.ones((8, 8), np.float32).tobytes(), "floats"),
    "12 bits in a 16-bit png": (encoded(RAMP >> 4, "PNG"), "reach only 4095 of 65535"),
    "10 bits in a 16-bit tiff": (encoded(RAMP >> 6, "TIFF"), "reach only 1023 of 65535"),
    "8 bits in a 16-bit png": (encoded(RAMP >> 8, "PNG"), "reach only 255 of 65535"),
    "12 bits in a 16-bit pgm": (b"P5 8 8 65535\n" + (RAMP >> 4).astype(">u2").tobytes(), "reach only 4095"),
    "12 bits in a 16-bit RGB png": (png16(np.stack([RAMP >> 4] * 3, 2)), "a 16th of 65535"),
    "8 bits in a 16-bit RGB png": (png16(np.stack([RAMP >> 8] * 3, 2)), "a 16th of 65535"),
    "12 bits in a 16-bit RGB ppm": (
        b"P6 8 8 65535\n" + np.stack([RAMP >> 4] * 3, 2).astype(">u2").tobytes(),
        "a 16th of 65535",
    ),
    "12 bits in gray with alpha": (png16(np.stack([RAMP >> 4, np.full_like(RAMP, 65535)], 2)), "a 16th of 65535"),
}


def preprocess_pixels(path):
    with Image.open(path) as image:
        return np.asarray(files.to_rgb(image))


READ_PIXELS = pytest.mark.parametrize(
    "read",
    [
        lambda path: np.asarray(images.open_rgb(path)),
        lambda path: images.read_rgb(path).permute(1, 2, 0).numpy(),
        preprocess_pixels,
    ],
    ids=["open_rgb", "read_rgb", "preprocess"],
)


@READ_PIXELS
@pytest.mark.parametrize("kind", SCALED)
def test_values_are_scaled_by_what_the_format_declares(tmp_path, read, kind):
    (tmp_path / "image.JPEG").write_bytes(SCALED[kind])
    pixels = read(tmp_path / "image.JPEG")
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - EXPECTED[..., None]).max() <= 1


@READ_PIXELS
@pytest.mark.parametrize("kind", UNKNOWN)
def test_values_of_an_unknown_range_are_refused(tmp_path, read, kind):
    data, told = UNKNOWN[kind]
    (tmp_path / "image.JPEG").write_bytes(data)
    with pytest.raises((BadImage, ValueError), match=told):
        read(tmp_path / "image.JPEG")


@READ_PIXELS
def test_a_black_image_of_16_bits_is_black(tmp_path, read):
    (tmp_path / "image.png").write_bytes(encoded(RAMP * 0, "PNG"))
    assert not read(tmp_path / "image.png").any()


@READ_PIXELS
@pytest.mark.parametrize("megabytes", [1.5, 20])
def test_a_png_with_a_large_colour_profile_is_read(tmp_path, read, megabytes):
    profile = np.random.default_rng(0).integers(0, 256, int(megabytes * 2**20), dtype=np.uint8).tobytes()
    Image.fromarray(EXPECTED).convert("RGB").save(tmp_path / "image.png", icc_profile=profile)
    assert np.array_equal(read(tmp_path / "image.png")[..., 0], EXPECTED)


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (3, 40000)])
def test_a_narrow_image_in_a_test_set_is_named(tmp_path, size):
    Image.new("L", size).save(tmp_path / "narrow.png")
    dataset = StrictDataset(ImageList([str(tmp_path / "narrow.png")], [0], datasets.eval_transform(224)))
    with pytest.raises(RunError, match="narrow.png: .*x.* px: too narrow .* to 256 px; a test counts every image"):
        dataset[0]


def test_a_long_image_is_still_resized(tmp_path):
    Image.new("L", (2000, 2), 70).save(tmp_path / "long.png")
    pixels = datasets.eval_transform(32)(str(tmp_path / "long.png"))
    assert pixels.shape == (3, 32, 32) and (pixels == 70).all()


# Downloads


NAME = "released:patch-k16384-a2-run1"


def whole_checkpoint():
    data = io.BytesIO()
    torch.save({"state_dict": {"module.conv1.weight": torch.ones(1000)}, "epoch": 200}, data)
    return data.getvalue()


def legacy_checkpoint():
    data = io.BytesIO()
    torch.save({"state_dict": {"fc.weight": torch.ones(1000)}}, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


NO_CHECKPOINT = {
    "a web page": (b"<!DOCTYPE html><html>Quota exceeded</html>", "web page"),
    "a web page after a blank line": (b"\r\n <HTML>virus scan warning</html>", "web page"),
    "truncated": (whole_checkpoint()[:-300], "damaged or truncated"),
    "truncated, legacy format": (legacy_checkpoint()[:-300], "damaged or truncated"),
    "empty": (b"", "damaged or truncated"),
    "text": (b"quota", "another kind of file"),
    "another file of PyTorch's": (encoded(EXPECTED, "PNG"), "another kind of file"),
}


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """A drive that serves drive.data, and counts the downloads; drive.cached is where the file is kept."""

    def download(id, output):
        state.downloads += 1
        Path(output).write_bytes(state.data)
        return output

    folder = tmp_path / "non-semantic-negatives"
    state = types.SimpleNamespace(downloads=0, data=b"", folder=folder, cached=folder / f"{NAME[9:]}.pth.tar")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))
    return state


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_a_download_that_is_no_checkpoint_is_not_kept(drive, kind):
    drive.data, told = NO_CHECKPOINT[kind]
    with pytest.raises(UsageError, match=f"{NAME}: what was downloaded is no checkpoint .*{told}.*drive.google.com"):
        released.local_path(NAME)
    assert not list(drive.folder.iterdir())
    drive.data = whole_checkpoint()
    assert released.local_path(NAME) == str(drive.cached) and drive.downloads == 2


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_a_bad_cached_file_is_said_to_be_deleted(drive, kind):
    drive.folder.mkdir()
    data, told = NO_CHECKPOINT[kind]
    drive.cached.write_bytes(data)
    with pytest.raises(UsageError, match=f"{drive.cached}: .*{told}.*; delete it and run again"):
        released.local_path(NAME)
    assert drive.cached.read_bytes() == data and not drive.downloads


@pytest.mark.parametrize("data", [whole_checkpoint(), legacy_checkpoint()])
def test_a_whole_checkpoint_is_downloaded_once(drive, data):
    drive.data = data
    for _ in range(2):
        assert Path(released.local_path(NAME)).read_bytes() == data
    assert drive.downloads == 1 and list(drive.folder.iterdir()) == [drive.cached]
