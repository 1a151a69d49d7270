from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from helpers import write_folder, write_photo
from PIL import Image

from moco.data import datasets, folders, images
from moco.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(images, "RETRY_SECONDS", 0)


def test_photos_are_listed_by_sorted_class_and_name(data):
    paths, labels, classes = folders.list_images(data / "train")
    assert classes == ["n01", "n02"] and labels == [0] * 8 + [1] * 8
    assert paths == sorted(paths) and len(paths) == 16


def test_links_to_class_folders_are_followed(data, tmp_path):
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "n02").symlink_to(data / "train" / "n02", target_is_directory=True)
    paths, labels, classes = folders.list_images(tmp_path / "subset")
    assert classes == ["n02"] and len(paths) == 8


def test_empty_class_folders_are_named(data):
    (data / "train" / "n03").mkdir()
    with pytest.raises(UsageError, match="1: n03"):
        folders.list_images(data / "train")


@pytest.mark.parametrize("missing", ["root", "split"])
def test_missing_directories_are_named(data, missing):
    with pytest.raises(UsageError, match="no such directory" if missing == "root" else "no test/ folder"):
        folders.split_path(data / "nowhere" if missing == "root" else data, "train" if missing == "root" else "test")


def write_pairs(tmp_path):
    write_folder(tmp_path / "x", train=4)
    write_folder(tmp_path / "x-texture", train=4, suffix=".png")
    return tmp_path / "x-texture"


def test_photo_and_texture_are_paired_by_relative_path(tmp_path):
    data = write_pairs(tmp_path)
    photos, textures, labels, classes, unmatched = folders.list_texture_pairs(f"{data}/")
    assert labels == [0] * 4 + [1] * 4
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
    assert labels == [0, 1]
    assert [Path(path).stem for path in photos] == [Path(path).stem for path in textures] == ["n01_3", "n02_3"]
    assert unmatched.startswith("6: ") and unmatched.endswith("and 1 more") and unmatched.count(".JPEG") == 5


def test_texture_needs_its_name_and_its_sibling(data, tmp_path):
    with pytest.raises(UsageError, match="ends in -texture"):
        folders.list_texture_pairs(data)
    write_folder(tmp_path / "y-texture")
    with pytest.raises(UsageError, match="no such directory"):
        folders.list_texture_pairs(tmp_path / "y-texture")


def test_crops_follow_from_the_seed_alone(data):
    paths, labels, _ = folders.list_images(data / "train")
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
    """A texture that is the photo at another size gives the query's crop."""
    ramp = np.linspace(0, 255, 160)
    photo = np.stack(
        [np.broadcast_to(ramp, (120, 160)), np.broadcast_to(ramp[:120, None], (120, 160)), np.full((120, 160), 99)],
        axis=2,
    ).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(photo).resize((224, 224), Image.BICUBIC).save(tmp_path / "texture.png")
    views = datasets.RetryDataset(datasets.TwoCrops([tmp_path / "photo.png"], 32, [tmp_path / "texture.png"]), [0])
    for seed in range(20):
        query, key, texture = views[0, seed][0].int()
        assert (query - texture).abs().max() <= 6
    assert (query - key).abs().max() > 20


def test_relative_box_stays_inside():
    assert datasets._rescale((0, 0, 375, 500), (375, 500), (224, 224)) == (0, 0, 224, 224)
    for box in ((374, 499, 1, 1), (100, 200, 275, 300)):
        top, left, height, width = datasets._rescale(box, (375, 500), (224, 224))
        assert min(top, left) >= 0 and min(height, width) >= 1 and top + height <= 224 and left + width <= 224


def views_of(path):
    return datasets.RetryDataset(datasets.TwoCrops([path], 32), [0])[0, 1]


def test_tiny_and_huge_images_give_crops(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "tiny.JPEG")
    Image.new("L", (10_000, 9_500), 77).save(tmp_path / "huge.JPEG")  # more than PIL warns of
    for name, level in (("tiny", 10), ("huge", 77)):
        views, unreadable = views_of(tmp_path / f"{name}.JPEG")
        assert views.shape == (2, 3, 32, 32) and (views[:, 0].int() - level).abs().max() < 4 and not unreadable
    assert datasets.eval_transform(32)(tmp_path / "tiny.JPEG").shape == (3, 32, 32)


def photos_with_unreadable(tmp_path, count=12, broken=(2,)):
    paths = [tmp_path / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(path)
        if i in broken:
            path.write_bytes(b"broken")
    return paths


def test_an_unreadable_image_is_replaced_by_one_of_its_class(tmp_path):
    paths = photos_with_unreadable(tmp_path, broken=(2,))
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


def test_a_class_that_cannot_be_read_at_all_ends_the_run(tmp_path):
    paths = photos_with_unreadable(tmp_path, broken=range(12))
    dataset = datasets.RetryDataset(datasets.ImageList(paths, [0] * 12, images.read_rgb), [0] * 12)
    with pytest.raises(RunError, match="2.png .*, and 10 others of its class cannot be read"):
        dataset[2, 0]


def test_a_test_set_must_be_read_whole(tmp_path):
    paths = photos_with_unreadable(tmp_path)
    labelled = datasets.StrictDataset(datasets.ImageList(paths, range(12), images.read_rgb))
    assert labelled[3][1] == 3
    with pytest.raises(RunError, match="2.png: UnidentifiedImageError.*counts every image"):
        labelled[2]


def test_the_evaluation_transform_is_torchvisions_preset(tmp_path):
    write_photo(tmp_path / "photo.JPEG", size=(400, 300))
    image, label = datasets.StrictDataset(
        datasets.ImageList([tmp_path / "photo.JPEG"], [7], datasets.eval_transform(224))
    )[0]
    preset = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    assert torch.equal(image, preset(Image.open(tmp_path / "photo.JPEG"))) and label == 7


def test_the_training_transform_crops_and_flips(tmp_path):
    write_photo(tmp_path / "photo.png", size=(80, 60))
    transform = datasets.train_transform(16)
    torch.manual_seed(0)
    crops = [transform(tmp_path / "photo.png") for _ in range(3)]
    assert all(crop.shape == (3, 16, 16) and crop.dtype == torch.uint8 for crop in crops)
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(crops[1], crops[2])


def test_the_center_crop_transform_never_resizes(tmp_path):
    write_photo(tmp_path / "photo.png", size=(40, 32))
    crop = datasets.center_crop_transform(16)(tmp_path / "photo.png")
    assert torch.equal(crop, images.read_rgb(tmp_path / "photo.png")[:, 8:24, 12:28])
