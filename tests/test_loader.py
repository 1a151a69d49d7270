import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from conftest import write_folder, write_photo
from PIL import Image

from moco import distributed, datasets, images, loader
from moco.errors import UsageError


def test_photos_are_listed_by_sorted_class_and_name(data):
    paths, labels, classes = datasets.list_images(data / "train")
    assert classes == ["n01", "n02"] and labels == [0] * 8 + [1] * 8
    assert paths == sorted(paths) and len(paths) == 16


def test_links_to_class_folders_are_followed(data, tmp_path):
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "n02").symlink_to(data / "train" / "n02", target_is_directory=True)
    paths, labels, classes = datasets.list_images(tmp_path / "subset")
    assert classes == ["n02"] and len(paths) == 8


def test_empty_class_folders_are_named(data):
    (data / "train" / "n03").mkdir()
    with pytest.raises(UsageError, match="1: n03"):
        datasets.list_images(data / "train")


@pytest.mark.parametrize("missing", ["root", "split"])
def test_missing_directories_are_named(data, missing):
    with pytest.raises(UsageError, match="no such directory" if missing == "root" else "no test/ folder"):
        datasets.split_path(data / "nowhere" if missing == "root" else data, "train" if missing == "root" else "test")


def write_pairs(tmp_path):
    write_folder(tmp_path / "x", train=4)
    write_folder(tmp_path / "x-texture", train=4, suffix=".png")
    return tmp_path / "x-texture"


def test_photo_and_texture_are_paired_by_relative_path_whatever_their_suffix(tmp_path):
    data = write_pairs(tmp_path)
    photos, textures, labels, classes, unpaired = datasets.list_texture_pairs(f"{data}/")
    assert labels == [0] * 4 + [1] * 4
    assert len(photos) == 8 and classes == ["n01", "n02"] and unpaired == ""
    for photo, texture in zip(photos, textures):
        assert texture == photo.replace("/x/", "/x-texture/").replace(".JPEG", ".png")


def test_a_parent_folder_whose_name_ends_in_texture_is_left_alone(tmp_path):
    data = write_pairs(tmp_path / "my-texture")
    photos, *_ = datasets.list_texture_pairs(data)
    assert photos[0].startswith(str(tmp_path / "my-texture" / "x" / "train"))


def test_textures_without_their_photo_are_all_counted_and_five_are_named(tmp_path):
    data = write_pairs(tmp_path)
    for i in range(4):
        (data.with_name("x") / "train" / "n02" / f"n02_{i}.JPEG").unlink()
    write_photo(data.with_name("x") / "train" / "n02" / "other.JPEG")
    for name in "abc":
        write_photo(data / "train" / "n01" / f"{name}.png")
    with pytest.raises(UsageError) as error:
        datasets.list_texture_pairs(data)
    assert "7: " in str(error.value) and "and 2 more" in str(error.value) and str(error.value).count(".png") == 5


def test_photos_without_a_texture_are_left_out_counted_and_five_are_named(tmp_path):
    data = write_pairs(tmp_path)
    for label in (1, 2):
        for i in range(3):
            (data / "train" / f"n0{label}" / f"n0{label}_{i}.png").unlink()
    photos, textures, labels, _, unpaired = datasets.list_texture_pairs(data)
    assert labels == [0, 1]
    assert [Path(path).stem for path in photos] == [Path(path).stem for path in textures] == ["n01_3", "n02_3"]
    assert unpaired.startswith("6: ") and unpaired.endswith("and 1 more") and unpaired.count(".JPEG") == 5


def test_texture_needs_its_name_and_its_sibling(data, tmp_path):
    with pytest.raises(UsageError, match="ends in -texture"):
        datasets.list_texture_pairs(data)
    write_folder(tmp_path / "y-texture")
    with pytest.raises(UsageError, match="no such directory"):
        datasets.list_texture_pairs(tmp_path / "y-texture")


def test_crops_follow_from_the_seed_alone(data):
    paths, labels, _ = datasets.list_images(data / "train")
    views = loader.RetryDataset(labels, loader.TwoCrops(paths, 32))
    torch.manual_seed(1)
    first, faults = views[3, 42]
    state = torch.get_rng_state()
    again, _ = views[3, 42]
    assert faults == []
    assert first.shape == (2, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())                  # and leave the process's randomness alone
    assert not torch.equal(first, views[3, 43][0]) and not torch.equal(first[0], first[1])


def test_crops_equal_torchvisions_random_resized_crop(tmp_path):
    write_photo(tmp_path / "photo.png", size=(90, 70))
    views, _ = loader.RetryDataset([0], loader.TwoCrops([tmp_path / "photo.png"], 32))[0, 5]
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
    photo = np.stack([np.broadcast_to(ramp, (120, 160)), np.broadcast_to(ramp[:120, None], (120, 160)),
                      np.full((120, 160), 99)], axis=2).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(photo).resize((224, 224), Image.BICUBIC).save(tmp_path / "texture.png")
    views = loader.RetryDataset([0], loader.TwoCrops([tmp_path / "photo.png"], 32, [tmp_path / "texture.png"]))
    for seed in range(20):
        query, key, texture = views[0, seed][0].int()
        assert (query - texture).abs().max() <= 6
    assert (query - key).abs().max() > 20


def test_relative_box_stays_inside():
    assert loader._rescale((0, 0, 375, 500), (375, 500), (224, 224)) == (0, 0, 224, 224)
    for box in ((374, 499, 1, 1), (100, 200, 275, 300)):
        top, left, height, width = loader._rescale(box, (375, 500), (224, 224))
        assert min(top, left) >= 0 and min(height, width) >= 1 and top + height <= 224 and left + width <= 224


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there may be cores
def test_number_of_workers_does_not_change_the_batches(data):
    paths, labels, _ = datasets.list_images(data / "train")
    views = loader.RetryDataset(labels, loader.TwoCrops(paths, 16))
    batches = loader.GlobalBatchSampler(16, 4, seed=0, ctx=distributed.DistContext())
    alone, *others = (list(loader.train_loader(views, batches, workers, torch.device("cpu"))) for workers in (0, 1, 4))
    assert len(alone) == 4
    assert all(torch.equal(a, b) for other in others for (a, _), (b, _) in zip(alone, other, strict=True))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match="10 training images do not fill one batch of 16"):
        loader.GlobalBatchSampler(10, 8, seed=0, ctx=distributed.DistContext(world_size=2))


def test_evaluation_sees_every_image_once_over_all_processes(data):
    paths, labels, _ = datasets.list_images(data / "train")
    dataset = loader.StrictDataset(paths[:13], range(13), loader.eval_transform(16))
    seen = []
    for rank in range(4):
        batches = loader.eval_loader(dataset, 3, 0, distributed.DistContext(rank, 4))
        seen += [label.item() for _, part in batches for label in part]
    assert sorted(seen) == list(range(13))


class Reader(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, os.getpid()


def test_loading_processes_of_a_test_set_stay_for_all_passes_and_all_sets():
    """New ones, forked while a thread of the last pass is ending, can hang in CPython."""
    batches = loader.eval_loader([Reader(), Reader()], 4, 1, distributed.DistContext())
    readers = {reader for _ in range(3) for _, readers in batches for reader in readers.tolist()}
    assert len(readers) == 1 and os.getpid() not in readers
    assert [indices.tolist() for indices, _ in batches] == [[0, 1, 2, 3], [4, 5]] * 2  # no batch of two sets


def test_evaluation_view_is_torchvisions_preset(tmp_path):
    write_photo(tmp_path / "photo.JPEG", size=(400, 300))
    image, label = loader.StrictDataset([tmp_path / "photo.JPEG"], [7], loader.eval_transform(224))[0]
    preset = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    assert torch.equal(image, preset(Image.open(tmp_path / "photo.JPEG"))) and label == 7
