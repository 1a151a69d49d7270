"""Scores on miniatures of known content: a model that reads its decision off the picture."""

import pytest
import torch
from helpers import GrayLevels, paint, write_photo
from PIL import Image
from reports import counted
from torchvision import transforms
from torchvision.datasets import ImageFolder

from moco import augment
from moco.augment import MEAN, STD
from moco.distributed import DistContext
from moco.encoders import build_encoder
from moco.evaluation import scores, testsets

WNIDS = ["n01", "n02", "n03", "n04"]


def score(folder, model, suite="val"):
    """The result of the suite's only test set."""
    test_sets = testsets.list_test_sets({suite: str(folder)}, WNIDS)
    ((_, (result,)),) = scores.score(test_sets, [model], WNIDS, 28, 3, 0, DistContext())
    return result


def test_classes_are_matched_by_name_never_by_folder_order(tmp_path):
    for decision in (2, 2, 0):  # n03 is folder 2 here, output 2 of the head
        paint(tmp_path / "n03" / f"{len(list(tmp_path.rglob('*.png')))}.png", decision)
    paint(tmp_path / "n00" / "a.png", 0)  # extra classes, before and after
    paint(tmp_path / "n99" / "a.png", 3)
    paint(tmp_path / "n04" / "a.png", 3)
    result = score(tmp_path, GrayLevels())
    assert result["n"] == 4 and result["top1"] == 75.0
    assert result["classes"] == {"n03": {"n": 3, "correct": 2}, "n04": {"n": 1, "correct": 1}}


def test_shared_classes_leave_out_decisions_for_absent_ones(tmp_path):
    paint(tmp_path / "n02" / "a.png", 0)  # first choice n01 is absent, second n02 is right
    paint(tmp_path / "n02" / "b.png", 1)
    paint(tmp_path / "n04" / "a.png", 1)  # wrong either way
    paint(tmp_path / "n04" / "b.png", 2)  # first choice n03 absent, second n04 right
    result = score(tmp_path, GrayLevels())
    assert result["top1"] == 25.0 and counted(result, "correct among shared") == 3


def test_outputs_beyond_the_class_list_count_as_wrong(tmp_path):
    paint(tmp_path / "n01" / "a.png", 7)
    paint(tmp_path / "n01" / "b.png", 0)
    result = score(tmp_path, GrayLevels(outputs=10))
    assert result["top1"] == 50.0 and counted(result, "correct among shared") == 2


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_images_whose_outputs_are_not_finite_are_counted(tmp_path, broken):
    for i in range(3):
        paint(tmp_path / "n01" / f"{i}.png", i)

    class Broken(GrayLevels):
        def forward(self, images):
            logits = super().forward(images)
            logits[logits[:, 1] == 1, 3] = broken  # of the image of level 1 only
            return logits

    result = score(tmp_path, Broken())
    assert (result["not_finite"], result["top1"]) == (1, 100 / 3)


def test_masks_tell_each_image(tmp_path):
    for i, decision in enumerate((0, 1, 0, 0, 2, 0, 0, 0, 0, 3)):
        paint(tmp_path / "n01" / f"{i}.png", decision)
    result = score(tmp_path, GrayLevels())
    assert scores.unpack(result["masks"]["correct"], 10).tolist() == [1, 0, 1, 1, 0, 1, 1, 1, 1, 0]
    for text in "AAAA", "A", "é":
        with pytest.raises(ValueError):
            scores.unpack(text, 10)


def test_scores_equal_a_plain_loop_over_imagefolder(tmp_path):
    for i in range(12):
        write_photo(tmp_path / WNIDS[i % 4] / f"{i}.JPEG", size=(90 + i, 70), seed=i)
    torch.manual_seed(0)
    model = build_encoder("resnet10", 4).eval()
    preset = transforms.Compose(
        [transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    with torch.no_grad():
        decisions = [(model(image[None]).argmax().item(), label) for image, label in ImageFolder(tmp_path, preset)]
    result = score(tmp_path, model)
    assert result["top1"] == 100 * sum(guess == label for guess, label in decisions) / 12
    for label, wnid in enumerate(WNIDS):
        assert result["classes"][wnid]["correct"] == sum(g == y == label for g, y in decisions)


# What is done to the images


class Watch(torch.nn.Module):
    """Keeps the images it is given; always decides for the first class."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen += list(images)
        return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), len(WNIDS)).float()


def paint_rim(path, side):
    """A white picture with a black rim of a quarter of the side: a crop cuts it off, a mere resize does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (side, side))
    image.paste((255, 255, 255), (side // 4, side // 4, side - side // 4, side - side // 4))
    image.save(path)


@pytest.mark.parametrize(
    "suite, side, preprocessing, dark",
    [
        ("corruption", 28, "CenterCrop(28)", 0.75),  # as published
        ("corruption", 64, "Resize(32), CenterCrop(28)", 0.67),  # the protocol of photos, not the centre alone: 0
        ("corruption", 16, "Resize(28), CenterCrop(28)", 0.75),  # no black padding: that would be 0.92
        ("stylized", 28, "CenterCrop(28)", 0.75),
        ("stylized", 64, "Resize(32), CenterCrop(28)", 0.67),
        ("sketch", 28, "Resize(32), CenterCrop(28)", 0.67),
    ],
)
def test_preprocessing_follows_from_the_images_size(tmp_path, suite, side, preprocessing, dark):
    paint_rim(tmp_path / ("fog/1/n01" if suite == "corruption" else "n01") / "a.png", side)
    model = Watch()
    result = score(tmp_path, model, suite=suite)
    assert result["preprocessing"] == preprocessing
    black_or_white = augment.denormalize(model.seen[0][None]).round()
    assert 1 - black_or_white.mean().item() == pytest.approx(dark, abs=0.03)


def test_sizes_may_differ_within_a_set_and_are_counted(tmp_path):
    for name, side in (("a", 28), ("b", 28), ("c", 64), ("d", 16)):
        paint_rim(tmp_path / "fog" / "1" / "n01" / f"{name}.png", side)
    result = score(tmp_path, Watch(), suite="corruption")
    assert result["preprocessing"] == (
        "CenterCrop(28) of 2 images; Resize(32), CenterCrop(28) of 1 images; Resize(28), CenterCrop(28) of 1 images"
    )
