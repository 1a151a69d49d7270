"""Images and features of the wrong shape, as one's own loop may pass them."""

import numpy as np
import pytest
import torch
from helpers import unit

from moco.builder import MoCo, contrastive_logits
from moco.encoders import ResNet10
from moco.negatives import patch_negatives


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 2, 3, 32, 32), (32, 32), ()])
def test_patch_negatives_want_a_batch_of_images(shape):
    with pytest.raises(ValueError) as refusal:
        patch_negatives(torch.zeros(shape), 4, 8, np.random.default_rng(0))
    assert f"got the shape {shape}" in str(refusal.value) and "images.unsqueeze(0)" in str(refusal.value)


SHAPES = {"q": (4, 8), "k": (4, 8), "t": (4, 2, 8), "queue": (8, 16)}


@pytest.mark.parametrize(
    "name, shape",
    [
        ("q", (4, 1, 8)),
        ("q", (8,)),
        ("q", (3, 8)),
        ("k", (1, 8)),  # would broadcast
        ("k", (8,)),
        ("t", (4, 8)),  # would broadcast to every pair of images
        ("t", (1, 2, 8)),
        ("t", (4, 2, 9)),
        ("queue", (16, 8)),
        ("queue", (8,)),
    ],
)
def test_logits_are_refused_for_features_of_other_shapes(name, shape):
    features = {key: unit(*size) for key, size in (SHAPES | {name: shape}).items()}
    with pytest.raises(ValueError) as refusal:
        contrastive_logits(*features.values(), 0.2, 2.0)
    assert f"{name} {shape}" in str(refusal.value) and "q (N, C), k (N, C), t (N, n, C)" in str(refusal.value)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_logits_take_any_number_of_negatives(count):
    features = {key: unit(*size) for key, size in SHAPES.items()}
    assert contrastive_logits(*(features | {"t": unit(4, count, 8)}).values(), 0.2, 2.0).shape == (4, 1 + 16 + count)


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 32, 32), (3, 32, 32), (1, 3, 32, 32)],
        [(2, 3, 32, 32), (2, 3, 32, 32), (2, 3, 32, 32)],
        [(2, 3, 32, 32), (3, 3, 32, 32), (2, 1, 3, 32, 32)],
        [(2, 3, 32, 32), (2, 3, 32, 32), (1, 1, 3, 32, 32)],
    ],
)
def test_the_model_is_not_given_images_of_other_shapes(shapes):
    with torch.device("meta"):
        model = MoCo(ResNet10, dim=8, K=16)
        images = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match="im_q.*im_k.*im_t") as refusal:
        model(*images)
    assert ", ".join(map(str, shapes)) in str(refusal.value)
