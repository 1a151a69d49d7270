import random

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from helpers import write_photo
from PIL import Image
from torchvision.transforms import v2

from moco.data import datasets, folders, images
from moco.data.images import BadImage, open_rgb, read_rgb


def test_crops_follow_from_the_seed_alone(data):
    paths, labels, *_ = folders.list_images(data / "train")
    views = datasets.RetryDataset(datasets.TwoCrops(paths, 32), labels)
    torch.manual_seed(1)
    first, unreadable = views[3, 42]
    state = torch.get_rng_state()
    again, _ = views[3, 42]
    assert unreadable == []
    assert first.shape == (2, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())  # and leave the process's randomness alone
    assert not torch.equal(first, views[3, 43][0]) and not torch.equal(first[0], first[1])


def test_crops_equal_torchvisions_random_resized_crop(tmp_path):
    write_photo(tmp_path / "photo.png", size=(90, 70))
    views, _ = datasets.RetryDataset(datasets.TwoCrops([tmp_path / "photo.png"], 32), [0])[0, 5]
    photo = images.read_rgb(tmp_path / "photo.png")
    torch.default_generator.manual_seed(5)
    crop = transforms.RandomResizedCrop(32, scale=(0.2, 1.0), antialias=True)
    boxes = [crop.get_params(photo, crop.scale, crop.ratio) for _ in range(2)]
    for view, box in zip(views, boxes):
        exact = transforms.functional.resized_crop(photo.float(), *box, [32, 32], antialias=True)
        torch.testing.assert_close(view.float(), exact, atol=1, rtol=0)  # levels of 255


def test_texture_is_cropped_at_the_querys_relative_place(tmp_path):
    rows, columns = np.indices((120, 160))
    photo = Image.fromarray(np.dstack([columns * 1.6, rows * 1.6, 0 * rows + 99]).astype(np.uint8))
    photo.save(tmp_path / "photo.png")
    photo.resize((320, 240), Image.BICUBIC).save(tmp_path / "texture.png")
    views = datasets.RetryDataset(datasets.TwoCrops([tmp_path / "photo.png"], 32, [tmp_path / "texture.png"]), [0])
    for seed in range(20):
        query, key, texture = views[0, seed][0].int()
        assert (query - texture).abs().max() <= 6
    assert (query - key).abs().max() > 20


@pytest.mark.parametrize("size", [1, 64, 224])
def test_crops_of_square_textures_have_the_area_and_aspect_of_those_of_photos(size):
    for seed in range(300):
        torch.manual_seed(seed)
        box = transforms.RandomResizedCrop.get_params(torch.empty(3, 375, 500), (0.2, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = datasets.texture_box(box, (375, 500), (size, size))
        assert 0 <= top <= size - height and 0 <= left <= size - width
        assert size == 1 or width / height == pytest.approx(box[3] / box[2], rel=0.08)
        share, wanted = height * width / size**2, box[2] * box[3] / (375 * 500)
        assert share == pytest.approx(wanted, rel=0.06) or size in (height, width) and share <= wanted or size == 1


def test_crops_equal_torchvisions_to_the_bit(tmp_path):
    write_photo(tmp_path / "a.JPEG", size=(130, 90))
    photo = read_rgb(tmp_path / "a.JPEG")
    for seed in range(30):
        torch.manual_seed(seed)
        box = transforms.RandomResizedCrop.get_params(photo, (0.2, 1.0), (3 / 4, 4 / 3))
        crop = v2.functional.resized_crop(photo, *box, [32, 32], antialias=True)
        assert torch.equal(datasets.TwoCrops([], 32)._crop(photo, *box), crop)


def test_tiny_and_huge_images_give_crops(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "tiny.JPEG")
    Image.new("L", (10_000, 9_500), 77).save(tmp_path / "huge.JPEG")  # more than PIL warns of
    for name, level in (("tiny", 10), ("huge", 77)):
        views, unreadable = datasets.RetryDataset(datasets.TwoCrops([tmp_path / f"{name}.JPEG"], 32), [0])[0, 1]
        assert views.shape == (2, 3, 32, 32) and (views[:, 0].int() - level).abs().max() < 4 and not unreadable
    assert datasets.eval_transform(32)(tmp_path / "tiny.JPEG").shape == (3, 32, 32)


def test_an_unreadable_image_is_replaced_by_one_of_its_class(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(path)
    paths[2].write_bytes(b"broken")
    dataset = datasets.RetryDataset(datasets.ImageList(paths, [0, 1] * 6, images.read_rgb), [0, 1] * 6)
    seen = set()
    for seed in range(40):
        (image, label), unreadable = dataset[2, seed]
        (again, _), _ = dataset[2, seed]
        assert torch.equal(image, again) and label == 0
        assert unreadable == [(str(paths[2]), unreadable[0][1])]
        seen.add(image[0, 0, 0].item() // 20)
    assert seen == {0, 4, 6, 8, 10}  # of class 0, all but the broken one
    assert dataset[3, 0][1] == []


class Numbers(torch.utils.data.Dataset):
    """Item i is i; those of `bad` cannot be read."""

    def __init__(self, count, bad):
        self.count, self.bad, self.tried = count, bad, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.tried.append(index)
        if index in self.bad:
            raise BadImage(f"{index}.png", "bad")
        return index


def test_ten_others_of_the_class_are_tried_each_once():
    labels = [0] * 5 + [1] * 3 + [2] * 30
    random.Random(0).shuffle(labels)
    for index, label in enumerate(labels):
        for _ in range(2):
            numbers = Numbers(38, range(38))
            others = min(10, labels.count(label) - 1)
            with pytest.raises(
                BadImage, match=rf"^{index}.png \(bad\), and {others} others of its class cannot be read"
            ):
                datasets.RetryDataset(numbers, labels)[index, index]
            assert numbers.tried[0] == index and len(numbers.tried) == len(set(numbers.tried)) == 1 + others
            assert {labels[tried] for tried in numbers.tried} == {label}


def test_the_transforms_are_torchvisions_presets(tmp_path):
    write_photo(tmp_path / "photo.JPEG", size=(400, 300))
    crops = [datasets.train_transform(16)(tmp_path / "photo.JPEG") for _ in range(2)]
    assert crops[0].shape == (3, 16, 16) and crops[0].dtype == torch.uint8 and not torch.equal(*crops)
    image, label = datasets.ImageList([tmp_path / "photo.JPEG"], [7], datasets.eval_transform(224))[0]
    preset = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    assert torch.equal(image, preset(Image.open(tmp_path / "photo.JPEG"))) and label == 7


def test_narrow_images_are_resized_or_refused(tmp_path):
    Image.new("L", (2000, 2), 70).save(tmp_path / "long.png")
    pixels = datasets.eval_transform(32)(str(tmp_path / "long.png"))
    assert pixels.shape == (3, 32, 32) and (pixels == 70).all()
    Image.new("L", (3, 40000)).save(tmp_path / "narrow.png")
    for read in open_rgb, read_rgb:
        with pytest.raises(BadImage, match="narrow.png: .*3x40000 px: too narrow .* to 256 px; replace this file"):
            datasets.eval_transform(224, read)(str(tmp_path / "narrow.png"))
