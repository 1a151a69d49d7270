"""What a long list of files costs: in time, in pickled bytes, in Python objects, and with bad images in it."""

import gc
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, write_photo

from moco.data import datasets, folders, images, loader
from moco.data.folders import LabelList, PathList
from moco.data.images import BadImage
from moco.distributed import DistContext
from tests.benchmarks import start_up


def write_links(root, classes, files, photo=None, suffix=".JPEG"):
    """A folder of class folders, whose images are all the same file."""
    if photo is None:
        photo = root / "photo.JPEG"
        write_photo(photo, size=(40, 32))
    for label in range(classes):
        name = f"n{1440764 + 7 * label:08d}"
        (root / "train" / name).mkdir(parents=True)
        for i in range(files):
            os.link(photo, root / "train" / name / f"{name}_{13 * i}{suffix}")
    return root


# Sequences


def test_paths_act_as_a_sequence_of_str():
    names = ["a/1.png", "a/ä.png", "b/\udcff.png", "c/d/x.png"]
    paths, plain = PathList("/data/", names_of(names)), ["/data/" + name for name in names]
    assert paths == plain and plain == paths and list(paths) == plain and len(paths) == 4
    assert [paths[i] for i in range(-4, 4)] == plain + plain
    assert paths[np.int64(2)] == plain[2] and paths[1:3] == plain[1:3] and paths[::-1] == plain[::-1]
    assert plain[3] in paths and paths.index(plain[1]) == 1 and list(reversed(paths)) == plain[::-1]
    assert paths != plain[:3] and paths != [*plain[:3], "x"] and paths.names() == names
    assert paths.take([2, 0]) == [plain[2], plain[0]] and paths.take([]) == [] and not paths.take([])
    assert pickle.loads(pickle.dumps(paths)) == paths == PathList.of("/data/", names)
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"index {index} of a sequence of 4"):
            paths[index]
    assert "PathList(4: '/data/a/1.png'" in repr(paths)


def names_of(names):
    return b"".join(os.fsencode(name) + b"\0" for name in names)


def test_labels_act_as_a_sequence_of_int():
    labels = LabelList([3, 1, 1, 2])
    assert labels == [3, 1, 1, 2] and labels[-1] == 2 and type(labels[0]) is int and labels.index(2) == 3
    assert labels[1:3] == [1, 1] and sorted(set(labels)) == [1, 2, 3] and pickle.loads(pickle.dumps(labels)) == labels
    assert np.asarray(labels).dtype == np.int32 and torch.tensor(labels).tolist() == [3, 1, 1, 2]


# The list of files


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
    assert paths == listed_as_before(tmp_path / "train") and classes == ["a", "a-b", "b"]
    assert labels == [0] * 5 + [1, 2]
    for folder in (".", "./", "../train/."):
        monkeypatch.chdir(tmp_path / "train")
        assert [os.path.realpath(path) for path in folders.list_images(folder).paths] == paths
    assert folders.list_images(".").paths[-1] == "b/2.png"


def test_a_job_is_pickled_in_a_name_and_4_bytes_per_file(tmp_path):
    """A file of ImageNet has a name of 20 bytes below a class of 9: 1.28 million are under 60 MB."""
    folder = folders.list_images(write_links(tmp_path, classes=5, files=200) / "train")
    name = len(folder.paths.names()[-1])
    assert len(pickle.dumps(folder)) < 1000 * (name + 1 + 4) + 1000


def test_a_list_of_files_holds_no_object_per_file(tmp_path):
    root = write_links(tmp_path, classes=3, files=300)
    dataset = datasets.RetryDataset(datasets.TwoCrops([], 8), [])  # imports, caches
    sampler = loader.GlobalBatchSampler(900, 9, 0, DistContext())
    blocks = allocated_blocks()
    data = folders.list_training_images(str(root))
    dataset = datasets.RetryDataset(datasets.TwoCrops(data.photos, 8), data.labels)
    batches = iter(sampler)
    next(batches)
    assert len(dataset) == 900 and allocated_blocks() - blocks < 300


def allocated_blocks():
    gc.collect()
    return sys.getallocatedblocks()


def write_scattered_pairs(tmp_path):
    """Photos and textures whose order differs: a-b sorts before a, once a name follows."""
    for root, suffix in (("x", ".JPEG"), ("x-texture", ".png")):
        for name in ("a/1", "a/2", "a-b/1", "a/sub/1", "b/1"):
            path = tmp_path / root / "train" / (name + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (tmp_path / "x/train/b/only.JPEG").touch()
    return tmp_path / "x-texture"


def test_pairs_keep_their_labels_whatever_their_order(tmp_path):
    data = folders.list_texture_pairs(str(write_scattered_pairs(tmp_path)))
    stems = [os.path.relpath(path, tmp_path / "x" / "train")[: -len(".JPEG")] for path in data.photos]
    assert stems == ["a-b/1", "a/1", "a/2", "a/sub/1", "b/1"] and data.labels == [1, 0, 0, 0, 2]
    assert [path.replace("-texture", "").replace(".png", ".JPEG") for path in data.textures] == data.photos
    assert data.unmatched == f"1: {tmp_path}/x/train/b/only.JPEG"


@pytest.mark.slow
def test_imagenets_list_costs_a_worker_no_memory():
    """1.28 million files, read by one of 8 ranks with 4 workers; the default start method is Python 3.14's."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))  # where a file may have a million links
    try:
        start_up.write_links(root, files=1_281_167, classes=1000)
        found = start_up.measured(REPOSITORY, "--measure", root, "forkserver")
    finally:
        shutil.rmtree(root)
    memory = [value for name, value in found.items() if "private memory" in name]  # at the first batch, and the last
    assert len(memory) == 2 and max(memory) < 60 and memory[1] - memory[0] < 5, found
    assert sum(value for name, value in found.items() if name.endswith(", s")) < 8, found
    assert found["pickled list, MB"] < 60


# Bad images


class Numbers(torch.utils.data.Dataset):
    """Item i is i; those of `bad` cannot be read."""

    def __init__(self, count, bad):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImage(f"{index}.png", "bad")
        return index


@pytest.mark.parametrize("kind", ["sorted", "shuffled", "a list"])
def test_replacements_are_others_of_the_class_each_once(kind):
    labels = [0] * 5 + [1] * 3 + [2] * 30
    if kind != "sorted":
        random.Random(0).shuffle(labels)
    dataset = datasets.RetryDataset(Numbers(38, range(38)), labels if kind == "a list" else LabelList(labels))
    for index, label in enumerate(labels):
        first, *others = dataset._candidates(index, seed=index)
        assert first == index not in others and len(others) == len(set(others)) == min(10, labels.count(label) - 1)
        assert {labels[other] for other in others} == {label}
        assert [first, *others] == list(dataset._candidates(index, seed=index))


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("classes", [1, 1000])
def test_a_replacement_among_a_million_is_chosen_at_once(classes):
    labels = LabelList(np.repeat(np.arange(classes), 1_000_000 // classes))
    dataset = datasets.RetryDataset(Numbers(1_000_000, range(0, 1_000_000, 100)), labels)
    dataset[0, 0]
    assert seconds(lambda: [dataset[index, index] for index in range(0, 50_000, 100)]) / 500 < 0.005  # 0.0001


@pytest.mark.parametrize("kind", ["damaged", "missing"])
def test_many_bad_files_do_not_cost_a_wait_each(tmp_path, monkeypatch, kind):
    """Ten bad files a second: half a percent of the time is waited."""
    clock, waited = [0.0], []

    def sleep(duration):
        waited.append(duration)
        clock[0] += duration

    # Not in the module `time` itself: other threads use it.
    monkeypatch.setattr(images, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(images, "_started", 0.0)
    monkeypatch.setattr(images, "_vain_waits", 0)
    path = tmp_path / "x.JPEG"
    if kind == "damaged":
        path.write_bytes(b"broken")
    for _ in range(2000):
        with pytest.raises(BadImage):
            images.read_rgb(path)
        clock[0] += 0.1
    assert 0.9 < sum(waited) < 0.2 + 0.005 * clock[0] and set(waited) == {images.RETRY_SECONDS}


def test_data_known_to_be_damaged_are_not_decoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RETRY_SECONDS", 0)
    opened, original = [], images.Image.open
    monkeypatch.setattr(images.Image, "open", lambda file: opened.append(1) or original(file))
    (tmp_path / "x.JPEG").write_bytes(b"broken")
    with pytest.raises(BadImage, match="x.JPEG: UnidentifiedImageError"):
        images.read_rgb(tmp_path / "x.JPEG")
    assert len(opened) == 1


def test_a_file_that_is_completed_meanwhile_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x.JPEG"
    write_photo(path, size=(40, 32))
    whole = path.read_bytes()
    monkeypatch.setattr(images, "_vain_waits", 0)
    repair = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: path.write_bytes(whole))
    monkeypatch.setattr(images, "time", repair)
    for _ in range(20):  # waiting that helps is not limited
        path.write_bytes(whole[:200])
        assert images.read_rgb(path).shape == (3, 32, 40)
