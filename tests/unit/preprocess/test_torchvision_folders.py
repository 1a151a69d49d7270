import sys

import pytest
import torchvision.datasets
import torchvision_folders
from PIL import Image
from preprocessing import tree

from moco.errors import UsageError


class Part:
    """A part of STL-10; torchvision checks the real files' sums, which a miniature cannot have."""

    classes = ("airplane", "monkey/ape bird")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Image.new("L", (96, 96), 10 * index), (0, 1, -1)[index]


def test_images_without_a_label_are_one_class(tmp_path):
    torchvision_folders.write_images(Part(), tmp_path)
    assert sorted(tree(tmp_path)) == ["airplane/000000.png", "all/000002.png", "monkey_ape_bird/000001.png"]


def test_stl10_keeps_its_unlabelled_images_apart():
    assert torchvision_folders.parts_of("stl10").keys() == {"train", "val", "unlabeled/train"}
    assert torchvision_folders.parts_of("cifar10").keys() == {"train", "val"}


def test_a_folder_holds_one_data_set(tmp_path, monkeypatch):
    def run(name):
        monkeypatch.setattr(torchvision.datasets, name.upper(), lambda root, **part: Part())
        monkeypatch.setattr(sys, "argv", f"script --dataset {name} --root raw --out {tmp_path}/out".split())
        torchvision_folders.main()

    run("cifar10")
    (tmp_path / "out" / "train" / "all" / "000002.png").unlink()  # as if interrupted
    run("cifar10")
    made = tree(tmp_path / "out")
    assert len(made) == 2 * 3 + 1
    with pytest.raises(UsageError, match='images made with {"dataset": "cifar10"}.*; name a new folder'):
        run("cifar100")
    assert tree(tmp_path / "out") == made
