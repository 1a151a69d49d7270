import torchvision_folders
from PIL import Image
from preprocessing import tree


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
