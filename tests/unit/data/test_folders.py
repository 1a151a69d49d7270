"""Lists of files, as arrays; trees of folders that mislead; pairs of photos and textures; class lists."""

import gc
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.folder

from moco.data import folders
from moco.errors import UsageError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


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
    assert list(pickle.loads(pickle.dumps(paths))) == plain
    for index in (4, -5):
        with pytest.raises(IndexError):
            paths[index]


def test_files_are_listed_in_the_order_of_their_paths(tmp_path, monkeypatch):
    names = ["a/10.JPG", "a/x-y/1.png", "a/x.png", "a/x.png.png", "a/x/1.png", "a-b/\udcff.png", "b/2.png"]
    touch(tmp_path / "train", *reversed(names))
    paths, labels, classes, _ = folders.list_images(tmp_path / "train")
    assert paths.names() == names and paths[0] == f"{tmp_path}/train/a/10.JPG" and classes == ["a", "a-b", "b"]
    assert labels.tolist() == [0] * 5 + [1, 2]
    monkeypatch.chdir(tmp_path / "train")
    for folder in (".", "./", "../train/."):
        assert [os.path.realpath(path) for path in folders.list_images(folder).paths] == list(paths)
    assert folders.list_images(".").paths[-1] == "b/2.png"


def test_a_list_of_files_takes_the_memory_of_its_arrays(tmp_path):
    """ImageNet's 1.28 million files have names of 30 bytes below their root: their list is pickled in under 60 MB."""
    touch(tmp_path, *(f"n{label}/{i:05}.JPEG" for label in range(3) for i in range(300)))
    folders.list_images(tmp_path)  # imports, caches
    gc.collect()
    blocks = sys.getallocatedblocks()
    listed = folders.list_images(tmp_path)
    gc.collect()
    assert len(listed.paths) == 900 and sys.getallocatedblocks() - blocks < 100  # no object per file
    assert len(pickle.dumps(listed)) < 900 * (len("n0/00000.JPEG\0") + 8 + 4) + 1000  # the name, its end, the label


def test_the_first_images_of_each_class(tmp_path):
    listed = folders.list_images(touch(tmp_path, "a/3.png", "a/1.png", "a/2.png", "b/1.png", "c/1.png", "c/2.png"))
    first = listed.first(2)
    assert first.paths.names() == ["a/1.png", "a/2.png", "b/1.png", "c/1.png", "c/2.png"]
    assert first.labels.tolist() == [0, 0, 1, 2, 2] and first.classes == ["a", "b", "c"]
    assert listed.first(None).paths.names() == listed.paths.names()


FORMS = "archives, tables and other forms of data: docs/own-data.md#data-in-another-form$"


@pytest.mark.parametrize(
    "files, given, told",
    [
        ("x", "nowhere", f"nowhere: no such directory; DIR must hold train/.*; {FORMS}"),
        ("a.tgz", "a.tgz", f"a.tgz: a file; name the folder that holds train/; {FORMS}"),
        ("n01/a.png", ".", f"no train/ folder and holds n01/; DIR is the .*; {FORMS}"),
        ("cifar-10-batches-py/data_batch_1", ".", f"no train/ folder and holds cifar-10-batches-py/; .*; {FORMS}"),
        ("d/train/0.tar d/train/1.tar", "d", f"d/train: it has no class folders, only 2 .tar; {FORMS}"),
        ("d/data/train-0.parquet", "d", f"d: it has no train/ folder and holds data/; .*; {FORMS}"),
        ("k/ILSVRC/train/n01/a.JPEG", "k", "k: it has no train/ folder and holds ILSVRC/; name k/ILSVRC;"),
        ("train/a/1.heic train/b/2.npy", ".", "no image in 2: a, b, only 1 .heic, 1 .npy .not read; convert images to"),
        ("train/a/1.heic train/b/2.png", ".", "train: no image in 1: a, only 1 .heic"),
    ],
)
def test_what_is_no_data_set_is_refused_with_what_it_holds(tmp_path, files, given, told):
    touch(tmp_path, *files.split())
    with pytest.raises(UsageError, match=told):
        folders.list_training_images(given)


def test_val_that_is_a_broken_link_is_refused(tmp_path):
    (tmp_path / "val").symlink_to("gone")
    with pytest.raises(UsageError, match="val: a link that leads nowhere .gone."):
        folders.split_path(str(tmp_path), "val")


# Folders without class folders


FLAT = [f"{number}.JPEG" for number in range(8)]


def test_images_without_class_folders_are_one_class(tmp_path):
    touch(tmp_path / "train", *FLAT, "notes.txt", ".thumbnails/0.JPEG")
    found = folders.list_training_images(str(tmp_path))
    assert found.photos.names() == FLAT and found.photos.root == f"{tmp_path}/train/"
    assert found.labels.tolist() == [0] * 8 and found.classes == ["all"] and found.textures is None
    with pytest.raises(UsageError, match="no class folders, only 8 images; labels need one folder of"):
        folders.list_images(tmp_path / "train")


@pytest.mark.parametrize("flat", [True, False])
def test_a_folder_is_flat_or_has_class_folders(tmp_path, flat):
    with pytest.raises(UsageError, match="it has no class folders;"):
        folders.list_images(tmp_path, flat)
    touch(tmp_path, *FLAT, "cat/a.png")
    with pytest.raises(UsageError, match="images beside its class folders: 8: 0.JPEG, 1.JPEG"):
        folders.list_images(tmp_path, flat)


# Trees


@pytest.fixture
def tree(tmp_path):
    """Two classes with an image each, and one of them with a folder in between."""
    return touch(tmp_path / "train", "n01/a.JPEG", "n02/sub/b.png")


LINKS = {  # refused: (link, its target)
    "to itself": ("n01/loop", "loop"),
    "to its folder": ("n01/loop", "."),
    "to the class": ("n02/sub/loop", "../../n02"),
    "to the root": ("n01/loop", ".."),
    "above the root": ("n01/loop", "../.."),
    "to /": ("n01/loop", "/"),
    "of a class to the root": ("n03", "."),
    "of a class to a class": ("n03", "n01"),
    "of a class into a class": ("n00", "n02/sub"),
    "to another class": ("n01/more", "../n02"),
    "of a class to nowhere": ("n03", "/nowhere/n03"),
    "of a folder to nowhere": ("n01/more", "../gone"),
    "of an image to nowhere": ("n01/c.JPEG", "../gone.JPEG"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_a_link_that_misleads_is_refused(tree, kind):
    path, target = LINKS[kind]
    (tree / path).symlink_to(target)
    with pytest.raises(UsageError, match=f"^{tree}") as refusal:
        listing(tree)
    assert "\n" not in str(refusal.value)


def write_litter(folder):
    touch(folder, ".DS_Store", "._a.JPEG", ".hidden.png", "Thumbs.db")
    for name in (".ipynb_checkpoints", "__MACOSX", "lost+found", "@eaDir", ".Trash-0"):
        touch(folder / name, "copy.JPEG")
        (folder / name / "loop").symlink_to(folder)


IGNORED = {
    "hidden entries": write_litter,
    "a fifo": lambda folder: os.mkfifo(folder / "x.JPEG"),
    "a link to a device": lambda folder: (folder / "x.JPEG").symlink_to("/dev/zero"),
    "other files": lambda folder: touch(folder, "labels.txt"),
}


@pytest.mark.parametrize("kind", IGNORED)
@pytest.mark.parametrize("place", [".", "n01", "n02/sub"])
def test_anything_else_is_not_listed(tree, kind, place):
    IGNORED[kind](tree / place)
    (tree / "n01" / "empty.JPEG").mkdir()
    assert listing(tree) == ["n01/a.JPEG", "n02/sub/b.png"]


def test_classes_without_images_are_named(tree):
    (tree / "n03").mkdir()
    write_litter(tree / "n04")
    with pytest.raises(UsageError, match="no image in 2: n03, n04"):
        listing(tree)


def test_links_to_data_elsewhere_are_listed(tree, tmp_path):
    touch(tmp_path / "other", "n03/deep/c.JPEG")
    (tree / "n03").symlink_to("../other/n03")
    (tree / "n01" / "linked.JPEG").symlink_to("../../other/n03/deep/c.JPEG")
    assert listing(tree) == ["n01/a.JPEG", "n01/linked.JPEG", "n02/sub/b.png", "n03/deep/c.JPEG"]


@pytest.mark.parametrize("place", [".", "n01", "n02/sub"])
@pytest.mark.parametrize("denied", ["scandir", "stat"])
def test_an_unreadable_folder_is_refused_with_its_path(tree, monkeypatch, place, denied):
    """To root nothing is unreadable: the system's answer is put in. Without x, a folder can be listed, not entered."""
    folder, real = str(tree / place), getattr(os, denied)

    def deny(path, *args, **options):
        if Path(path) == Path(folder) and (denied == "scandir" or place == "." or str(path).endswith("/.")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, denied, deny)
    with pytest.raises(UsageError, match="Permission denied") as refusal:
        listing(tree)
    assert str(refusal.value).startswith(str(Path(folder)))


def test_no_file_is_asked_for_its_type(tree, monkeypatch):
    """The folder's entry says it: a stat for each of 1.28 million files takes minutes on a network drive."""
    touch(tree, *(f"n01/{number}.JPEG" for number in range(50)))
    asked, real = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(str(path)) or real(path, **options))
    assert len(listing(tree)) == 52
    assert not [path for path in asked if path.endswith(".JPEG")]


# Pairs


def pairs(folder, photos, textures):
    """The training images of folder/x-texture, with these photos and textures."""
    touch(folder / "x" / "train", *(f"{photo}.JPEG" for photo in photos))
    touch(folder / "x-texture" / "train", *(f"{texture}.png" for texture in textures))
    return folders.list_training_images(f"{folder}/x-texture/", with_textures=True)


def test_photo_and_texture_are_paired_by_relative_path(tmp_path):
    """Here a-b sorts before a, once a name follows; and the name of the folder above is left alone."""
    stems, folder = ["a-b/1", "a/1", "a/2", "a/sub/1", "b/1"], tmp_path / "my-texture"
    found = pairs(folder, [*stems, "b/odd\udcff"], stems)
    assert list(found.photos) == [f"{folder}/x/train/{stem}.JPEG" for stem in stems]
    assert list(found.textures) == [f"{folder}/x-texture/train/{stem}.png" for stem in stems]
    assert found.labels.tolist() == [1, 0, 0, 0, 2] and found.classes == ["a", "a-b", "b"]
    assert found.unmatched == f"1: {folder}/x/train/b/odd\\udcff.JPEG"  # can be printed


def test_photos_without_texture_are_left_out_and_counted(tmp_path):
    found = pairs(tmp_path, [f"{name}/{i}" for name in "ab" for i in range(4)], ["a/3", "b/3"])
    assert found.photos.names() == ["a/3.JPEG", "b/3.JPEG"] and found.textures.names() == ["a/3.png", "b/3.png"]
    assert found.unmatched.startswith("6: ") and found.unmatched.endswith("and 1 more")
    assert found.unmatched.count(".JPEG") == 5


def test_textures_without_photo_are_counted_and_five_named(tmp_path):
    with pytest.raises(UsageError, match="textures without their photo in .*: 7: .* and 2 more") as error:
        pairs(tmp_path, ["a/0", "b/other"], ["a/0", "b/other", *(f"a/{i}" for i in range(1, 8))])
    assert str(error.value).count(".png") == 5


def test_texture_needs_its_name_and_its_sibling(tmp_path):
    touch(tmp_path, "y/train/a/0.png", "z-texture/train/a/0.png")
    for name, told in ("y", "ends in -texture"), ("z-texture", "/z: no such directory"):
        with pytest.raises(UsageError, match=told):
            folders.list_training_images(str(tmp_path / name), with_textures=True)


def test_photos_and_textures_without_class_folders_are_paired(tmp_path):
    found = pairs(tmp_path, "01", "01")
    assert found.photos.names() == ["0.JPEG", "1.JPEG"] and found.textures.names() == ["0.png", "1.png"]
    assert found.labels.tolist() == [0] * 2 and found.classes == ["all"]


def test_two_photos_of_one_texture_are_refused(tmp_path):
    touch(tmp_path / "x" / "train", "n01/0.png")
    with pytest.raises(UsageError, match="name of another but for the suffix: 1: .*n01/0"):
        pairs(tmp_path, ["n01/0", "n01/1"], ["n01/0"])


# Class files


CLASS_FILES = {  # contents, and the refusal; none if they are n01 and n02
    "bom": ("\ufeffn02\nn01\n".encode(), None),
    "utf-16": ("n02\nn01\n".encode("utf-16"), "not a readable text file"),
    "crlf": (b"n02\r\nn01\r\n", None),
    "old mac": (b"n02\rn01", None),
    "trailing spaces": (b"n02  \n\tn01 \n\n", None),
    "joined files with a bom each": ("\ufeffn02\n\ufeffn01".encode(), "invisible characters"),
    "no-break spaces": ("n02\u00a0\nn01".encode(), None),
    "in its own order": (b"# in this order\nn02\nn01\n", ["n02", "n01"]),
    "duplicates": (b"n01\nn02\nn01\n", "'n01' is listed twice"),
    "empty": (b"\xef\xbb\xbf\n", "it is empty"),
    "utf-16 without a mark": ("n02\nn01\n".encode("utf-16-le"), "invisible characters"),
    "utf-32": ("n02\nn01\n".encode("utf-32"), "not a readable text file"),
    "a photo": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not a readable text file"),
    "a zero-width space": ("n01\u200b\nn02".encode(), "invisible characters"),
    "a missing file": (None, "No such file"),
}


@pytest.mark.parametrize("kind", CLASS_FILES)
def test_class_files_are_read_in_any_spelling_or_refused(tmp_path, kind):
    path, (data, refusal) = tmp_path / "classes.txt", CLASS_FILES[kind]
    if data is not None:
        path.write_bytes(data)
    if isinstance(refusal, str):
        with pytest.raises(UsageError, match=f"--classes {path}: .*{refusal}"):
            folders.read_class_list(path)
    else:
        assert folders.read_class_list(path) == (refusal or ["n01", "n02"])


def test_a_list_of_many_classes_is_read_in_seconds(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(names := [f"n{number:08}" for number in range(200_000)]))
    assert folders.read_class_list(tmp_path / "list.txt") == names
