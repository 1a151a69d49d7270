import numpy as np
import pytest
import torch
from PIL import Image

from moco import augment, views


def views_of(crops, robust, num_nonsem, seed):
    rng = np.random.default_rng(seed)
    return views.training_views(crops, rng, recipe=augment.V2, robust=robust, num_nonsem=num_nonsem, patch_ratio=(4, 8))


def test_patch_negatives_come_from_the_augmented_query():
    torch.manual_seed(4)
    crops = torch.randint(256, (4, 2, 3, 32, 32), dtype=torch.uint8)
    query, key, negatives = views_of(crops, "patch", 2, seed=4)
    assert negatives.shape == (4, 2, 3, 32, 32)
    for i in range(4):
        of_query = {tuple(pixel) for pixel in query[i].flatten(1).T.tolist()}
        for negative in negatives[i]:
            assert {tuple(pixel) for pixel in negative.flatten(1).T.tolist()} <= of_query


def test_a_texture_negative_has_the_parameters_of_its_query():
    torch.manual_seed(5)
    crops = torch.randint(256, (16, 3, 3, 32, 32), dtype=torch.uint8)
    crops[:, 2] = crops[:, 0]  # then the same draws give the same picture
    query, key, negatives = views_of(crops, "texture", 1, seed=5)
    torch.testing.assert_close(negatives[:, 0], query)


def test_query_and_key_are_augmented_independently():
    torch.manual_seed(6)
    crops = torch.randint(256, (8, 1, 3, 32, 32), dtype=torch.uint8).expand(-1, 2, -1, -1, -1)
    query, key, negatives = views_of(crops, "none", 0, seed=6)
    assert negatives.shape == (8, 0, 3, 32, 32)
    assert (query - key).abs().flatten(1).amax(1).gt(0.1).all()


@pytest.mark.parametrize("size, side", [(56, 224), (64, 192), (224, 224), (300, 300)])
def test_small_crops_are_enlarged_in_a_picture(tmp_path, size, side):
    left, right = torch.zeros(2, 3, size, size), torch.zeros(2, 3, size, size)
    left[1, 0], right[0, 1] = 1, 1  # red in the second row, green in the first
    views.save_grid(tmp_path / "grid.png", {"query": left, "key": right})
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    gap, label = views.GAP, views.LABEL_HEIGHT
    assert sheet.shape == (label + 2 * (side + gap), gap + 2 * (side + gap), 3)
    for row, column, color in ((0, 0, 0), (1, 0, (255, 0, 0)), (0, 1, (0, 255, 0)), (1, 1, 0)):
        top, start = label + row * (side + gap), gap + column * (side + gap)
        tile = sheet[top : top + side, start : start + side]
        assert (tile == color).all()
        assert (sheet[top + side : top + side + gap] == 255).all()
    assert (sheet[:label] < 128).any()  # the labels


def test_a_picture_of_views_has_a_column_per_view(tmp_path):
    images = torch.zeros(3, 3, 224, 224)
    views.save_views(tmp_path / "one.png", images, images, images.unsqueeze(1))
    views.save_views(tmp_path / "two.png", images, images, torch.stack([images, images], dim=1), title="patch")
    views.save_views(tmp_path / "none.png", images, images, images.unsqueeze(1)[:, :0])
    widths = [Image.open(tmp_path / f"{name}.png").width for name in ("none", "one", "two")]
    assert widths == [views.GAP + columns * (224 + views.GAP) for columns in (2, 3, 4)]
    gray = np.asarray(Image.open(tmp_path / "one.png"))[views.LABEL_HEIGHT + 50, views.GAP + 50]
    assert gray.tolist() == pytest.approx([255 * mean for mean in augment.MEAN], abs=1)  # normalisation is undone
