"""Lists of files, as arrays; trees of folders that mislead; pairs of photos and textures; class lists."""

import functools
import gc
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.folder
from helpers import write_folder, write_photo

from moco.data import folders
from moco.errors import UsageError


def listing(root):
    """The paths, below a folder of class folders, of its images."""
    return folders.list_images(root).paths.names()


def test_image_suffixes_are_torchvisions():
    assert folders.IMG_EXTENSIONS == torchvision.datasets.folder.IMG_EXTENSIONS


# Lists of files


def test_paths_act_as_a_sequence_of_str():
    names = ["a/1.png", "a/ä.png", "b/\udcff.png", "c/d/x.png"]
    paths, plain = folders.PathArray("/data/", names), ["/data/" + name for name in names]
    assert list(paths) == plain and len(paths) == 4 and paths.names() == names
    assert [paths[i] for i in range(-4, 4)] == plain + plain and paths[np.int32(2)] == plain[2]
    assert list(paths[1:3]) == plain[1:3] and list(paths[::-1]) == plain[::-1] == list(reversed(paths))
    assert list(paths[[2, 0]]) == [plain[2], plain[0]] and not paths[[]]
    assert list(paths[np.array([True, False, False, True])]) == [plain[0], plain[3]]
    assert plain[3] in paths and paths.index(plain[1]) == 1
    assert list(pickle.loads(pickle.dumps(paths))) == plain
    for index in (4, -5):
        with pytest.raises(IndexError):
            paths[index]


def listed_as_before(root):
    """The sorted paths of a folder, one class after the other."""
    return [
        path
        for name in sorted(os.listdir(root))
        for path in sorted(os.path.join(folder, file) for folder, _, some in os.walk(root / name) for file in some)
    ]


def test_files_are_listed_in_the_order_of_their_paths(tmp_path, monkeypatch):
    for name in ("b/2.png", "a/x.png", "a/x/1.png", "a/x-y/1.png", "a/x.png.png", "a-b/\udcff.png", "a/10.JPG"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    paths, labels, classes = folders.list_images(tmp_path / "train")
    assert list(paths) == listed_as_before(tmp_path / "train") and classes == ["a", "a-b", "b"]
    assert labels.tolist() == [0] * 5 + [1, 2]
    for folder in (".", "./", "../train/."):
        monkeypatch.chdir(tmp_path / "train")
        assert [os.path.realpath(path) for path in folders.list_images(folder).paths] == list(paths)
    assert folders.list_images(".").paths[-1] == "b/2.png"


def test_a_list_of_files_takes_the_memory_of_its_arrays(tmp_path):
    """ImageNet's 1.28 million files have names of 30 bytes below their root: their list is pickled in under 60 MB."""
    for label in range(3):
        (tmp_path / f"n{label}").mkdir()
        for i in range(300):
            (tmp_path / f"n{label}" / f"{i:05}.JPEG").touch()
    folders.list_images(tmp_path)  # imports, caches
    gc.collect()
    blocks = sys.getallocatedblocks()
    listed = folders.list_images(tmp_path)
    gc.collect()
    assert len(listed.paths) == 900 and sys.getallocatedblocks() - blocks < 100  # no object per file
    name = "n0/00000.JPEG\0"
    assert len(pickle.dumps(listed)) < 900 * (len(name) + 8 + 4) + 1000  # the name, its end, the label


def test_the_first_images_of_each_class(tmp_path):
    for name in ("a/3.png", "a/1.png", "a/2.png", "b/1.png", "c/1.png", "c/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = folders.list_images(tmp_path)
    first = listed.first(2)
    assert first.paths.names() == ["a/1.png", "a/2.png", "b/1.png", "c/1.png", "c/2.png"]
    assert first.labels.tolist() == [0, 0, 1, 2, 2] and first.classes == ["a", "b", "c"]
    assert listed.first(None).paths.names() == listed.paths.names()


def test_empty_class_folders_are_named(data):
    (data / "train" / "n03").mkdir()
    with pytest.raises(UsageError, match="1: n03"):
        folders.list_images(data / "train")


@pytest.mark.parametrize("missing", ["root", "split"])
def test_missing_directories_are_named(data, missing):
    with pytest.raises(UsageError, match="no such directory" if missing == "root" else "no test/ folder"):
        folders.split_path(data / "nowhere" if missing == "root" else data, "train" if missing == "root" else "test")


# Folders without class folders


def write_images(folder):
    for number in range(8):
        write_photo(folder / f"{number}.JPEG", seed=number)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_without_class_folders_are_one_class(tmp_path):
    train = write_images(tmp_path / "data" / "train")
    (train / ".thumbnails").mkdir()
    found = folders.list_training_images(str(tmp_path / "data"))
    assert list(found.photos) == [str(train / f"{number}.JPEG") for number in range(8)]
    assert found.labels.tolist() == [0] * 8 and found.classes == ["all"] and found.textures is None
    assert folders.count_classes(str(tmp_path / "data"), ["all"]) == "1 class, as there are no class folders"
    with pytest.raises(UsageError, match="no class folders, only 8 images; labels are needed here: make one folder of"):
        folders.list_images(train)


@pytest.mark.parametrize("flat", [True, False])
def test_images_beside_class_folders_are_refused(tmp_path, flat):
    write_photo(write_images(tmp_path) / "cat" / "a.png")
    with pytest.raises(UsageError, match="1 class folders and, beside them, images: 8: 0.JPEG, 1.JPEG.*move these"):
        folders.list_images(tmp_path, flat)


def test_a_folder_without_any_image_is_refused(tmp_path):
    for flat in (True, False):
        with pytest.raises(UsageError, match="it has no class folders$"):
            folders.list_images(tmp_path, flat)


# Trees


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
def test_a_tree_with_links_that_mislead_is_refused(tree, fault):
    REFUSED[fault](tree)
    with pytest.raises(UsageError, match=str(tree)) as refusal:
        listing(tree)
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
def test_what_is_no_image_is_not_listed(tree, kind, place):
    if (kind, place) == ("an empty subfolder", "."):
        return  # that is a class
    before = listing(tree)
    IGNORED[kind](tree / place)
    assert listing(tree) == before == ["n01/a.JPEG", "n02/sub/b.png"]


def test_links_to_data_elsewhere_are_listed(tree, tmp_path):
    other = tmp_path / "other"
    write_photo(other / "n03" / "deep" / "c.JPEG")
    link(tree / "n03", "../other/n03")
    link(tree / "n01" / "linked.JPEG", "../../other/n03/deep/c.JPEG")
    assert listing(tree) == ["n01/a.JPEG", "n01/linked.JPEG", "n02/sub/b.png", "n03/deep/c.JPEG"]


@pytest.mark.parametrize("place", [".", "n01", "n02/sub"])
@pytest.mark.parametrize("denied", ["scandir", "stat"])
def test_an_unreadable_folder_is_refused_with_its_path(tree, monkeypatch, place, denied):
    """As root nothing is unreadable: the system's answer is put in. Without x, a folder can be listed, not entered."""
    folder, real = str(tree / place), getattr(os, denied)

    def deny(path, *args, **options):
        if Path(path) == Path(folder) and (denied == "scandir" or str(path).endswith("/.")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, denied, deny)
    with pytest.raises(UsageError, match="Permission denied") as refusal:
        listing(tree)
    assert str(refusal.value).startswith(str(Path(folder))) and "remove" not in str(refusal.value)


def test_a_split_that_cannot_be_read_is_not_missing(tree, monkeypatch):
    def denied(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", denied)
    for call in (folders.list_images, functools.partial(folders.split_path, split="train")):
        with pytest.raises(UsageError, match="Permission denied"):
            call(str(tree))


def test_a_dangling_split_is_not_missing(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").symlink_to("gone")
    with pytest.raises(UsageError, match="val: a link that leads nowhere .gone."):
        folders.split_path(str(tmp_path), "val")


def test_no_file_is_asked_for_its_type(tree, monkeypatch):
    """The folder's entry says it: a stat for each of 1.28 million files takes minutes on a network drive."""
    for number in range(50):
        (tree / "n01" / f"{number}.JPEG").touch()
    asked, real = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(str(path)) or real(path, **options))
    assert len(listing(tree)) == 52
    assert not [path for path in asked if path.endswith(".JPEG")]


# Pairs


def write_pairs(tmp_path):
    write_folder(tmp_path / "x", train=4)
    write_folder(tmp_path / "x-texture", train=4, suffix=".png")
    return tmp_path / "x-texture"


def test_photo_and_texture_are_paired_by_relative_path(tmp_path):
    data = write_pairs(tmp_path)
    photos, textures, labels, classes, unmatched = folders.list_texture_pairs(f"{data}/")
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert len(photos) == 8 and classes == ["n01", "n02"] and unmatched == ""
    for photo, texture in zip(photos, textures):
        assert texture == photo.replace("/x/", "/x-texture/").replace(".JPEG", ".png")


def test_only_the_last_folder_name_is_taken_for_the_pair(tmp_path):
    data = write_pairs(tmp_path / "my-texture")
    photos, *_ = folders.list_texture_pairs(data)
    assert photos[0].startswith(str(tmp_path / "my-texture" / "x" / "train"))


def test_textures_without_photo_are_counted_and_five_named(tmp_path):
    data = write_pairs(tmp_path)
    for i in range(4):
        (data.with_name("x") / "train" / "n02" / f"n02_{i}.JPEG").unlink()
    write_photo(data.with_name("x") / "train" / "n02" / "other.JPEG")
    for name in "abc":
        write_photo(data / "train" / "n01" / f"{name}.png")
    with pytest.raises(UsageError) as error:
        folders.list_texture_pairs(data)
    assert "7: " in str(error.value) and "and 2 more" in str(error.value) and str(error.value).count(".png") == 5


def test_photos_without_texture_are_left_out_and_counted(tmp_path):
    data = write_pairs(tmp_path)
    for label in (1, 2):
        for i in range(3):
            (data / "train" / f"n0{label}" / f"n0{label}_{i}.png").unlink()
    photos, textures, labels, _, unmatched = folders.list_texture_pairs(data)
    assert labels.tolist() == [0, 1]
    assert [Path(path).stem for path in photos] == [Path(path).stem for path in textures] == ["n01_3", "n02_3"]
    assert unmatched.startswith("6: ") and unmatched.endswith("and 1 more") and unmatched.count(".JPEG") == 5


def test_texture_needs_its_name_and_its_sibling(data, tmp_path):
    with pytest.raises(UsageError, match="ends in -texture"):
        folders.list_texture_pairs(data)
    write_folder(tmp_path / "y-texture")
    with pytest.raises(UsageError, match="no such directory"):
        folders.list_texture_pairs(tmp_path / "y-texture")


def test_pairs_keep_their_labels_whatever_their_order(tmp_path):
    """Here a-b sorts before a, once a name follows."""
    for root, suffix in (("x", ".JPEG"), ("x-texture", ".png")):
        for name in ("a/1", "a/2", "a-b/1", "a/sub/1", "b/1"):
            path = tmp_path / root / "train" / (name + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (tmp_path / "x/train/b/only.JPEG").touch()
    data = folders.list_texture_pairs(str(tmp_path / "x-texture"))
    stems = [os.path.relpath(path, tmp_path / "x" / "train")[: -len(".JPEG")] for path in data.photos]
    assert stems == ["a-b/1", "a/1", "a/2", "a/sub/1", "b/1"] and data.labels.tolist() == [1, 0, 0, 0, 2]
    assert [path.replace("-texture", "").replace(".png", ".JPEG") for path in data.textures] == list(data.photos)
    assert data.unmatched == f"1: {tmp_path}/x/train/b/only.JPEG"


def test_photos_and_textures_without_class_folders_are_paired(tmp_path):
    write_images(tmp_path / "x" / "train")
    for number in range(8):
        write_photo(tmp_path / "x-texture" / "train" / f"{number}.png")
    data = folders.list_texture_pairs(str(tmp_path / "x-texture"))
    assert [os.path.basename(path) for path in data.photos] == [f"{number}.JPEG" for number in range(8)]
    assert [os.path.basename(path) for path in data.textures] == [f"{number}.png" for number in range(8)]
    assert data.labels.tolist() == [0] * 8 and data.classes == ["all"]


def test_two_photos_of_one_texture_are_refused(tmp_path):
    write_folder(tmp_path / "data", train=2)
    write_folder(tmp_path / "data-texture", train=2, suffix=".png")
    write_photo(tmp_path / "data" / "train" / "n01" / "n01_0.png")
    with pytest.raises(UsageError, match="same name but different suffixes.*cannot be paired: 1: .*n01_0"):
        folders.list_texture_pairs(str(tmp_path / "data-texture"))


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    write_folder(tmp_path / "data", train=2)
    write_folder(tmp_path / "data-texture", train=1, suffix=".png")
    write_photo(tmp_path / "data" / "train" / "n01" / "odd\udcff.JPEG")
    unmatched = folders.list_texture_pairs(str(tmp_path / "data-texture")).unmatched
    assert "odd\\udcff" in unmatched and unmatched.encode()


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
    "duplicates": (b"n01\nn02\nn01\n", "'n01' is listed twice"),
    "empty": (b"\xef\xbb\xbf\n", "it is empty"),
    "utf-16 without a mark": ("n02\nn01\n".encode("utf-16-le"), "invisible characters"),
    "utf-32": ("n02\nn01\n".encode("utf-32"), "invisible characters"),
    "a photo": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not a readable text file"),
    "a zero-width space": ("n01\u200b\nn02".encode(), "invisible characters"),
    "a missing file": (None, "no such file"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_class_files_are_read_in_any_spelling(tmp_path, kind):
    (tmp_path / "classes.txt").write_bytes(SPELLINGS[kind])
    assert folders.read_class_list(tmp_path / "classes.txt") == ["n01", "n02"]


@pytest.mark.parametrize("kind", MISSPELT)
def test_class_files_that_cannot_be_right_are_refused(tmp_path, kind):
    data, told = MISSPELT[kind]
    if data is not None:
        (tmp_path / "classes.txt").write_bytes(data)
    with pytest.raises(UsageError, match=f"--classes .*classes.txt: .*{told}"):
        folders.read_class_list(tmp_path / "classes.txt")
