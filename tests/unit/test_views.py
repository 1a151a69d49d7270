import numpy as np
import torch

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
