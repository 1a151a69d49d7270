import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
import torchvision.transforms.functional as TF

from moco import augment

SIZE = 48


@pytest.fixture
def images():
    return torch.randint(256, (12, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def sequence(plan, i):
    """The colour operations of image i in order: [(name, factor or shift)]; [] if it is not jittered."""
    blends = [
        ("contrast" if contrast else "saturation" if saturation else "brightness", before, after)
        for contrast, saturation, before, after in zip(
            *(values[i].tolist() for values in (plan.contrast, plan.saturation, plan.before, plan.after))
        )
    ]
    operations = [(name, before) for name, before, _ in blends if before != 1]
    operations += [("hue", plan.hue_shift[i].item())] if plan.jittered[i] else []
    return operations + [(name, after) for name, _, after in blends if after != 1]


def slow(recipe, plan, images):
    """The same recipe, image by image, through torchvision's functional operations."""
    results = []
    for i, x in enumerate(images.float() / 255):
        if recipe.gray_first and plan.gray[i]:
            x = TF.rgb_to_grayscale(x, 3)
        for name, parameter in sequence(plan, i):
            x = getattr(TF, f"adjust_{name}")(x, parameter)
        if not recipe.gray_first and plan.gray[i]:
            x = TF.rgb_to_grayscale(x, 3)
        if plan.sigma[i] > 0:
            x = TF.gaussian_blur(x, 2 * math.ceil(4 * recipe.blur_sigma[1]) + 1, plan.sigma[i].item())
        if plan.flip[i]:
            x = TF.hflip(x)
        results.append(TF.normalize(x, augment.MEAN, augment.STD))
    return torch.stack(results)


@pytest.mark.parametrize("recipe", [augment.V1, augment.V2], ids=["v1", "v2"])
def test_recipes_equal_torchvision_image_by_image(recipe, images):
    plan = augment.draw(recipe, len(images), np.random.default_rng(1))
    torch.testing.assert_close(augment.apply(recipe, plan, images), slow(recipe, plan, images), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.03, 0.1, 0.5])
def test_hue_equals_torchvision(images, shift):
    x = images.float() / 255
    x[0] = 0.5  # gray: no hue
    x[1, 1:] = 0  # pure red of every brightness
    torch.testing.assert_close(
        augment.shift_hue(x, torch.full((12,), shift)), TF.adjust_hue(x, shift), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [20, 48, 224])
def test_blur_equals_torchvision(sigma, size):
    x = torch.rand(2, 3, size, size)
    blurred = augment.gaussian_blur(x, torch.full((2,), sigma), 2.0)
    torch.testing.assert_close(blurred, TF.gaussian_blur(x, 17, sigma), atol=1e-5, rtol=0)


def test_images_that_are_not_blurred_stay_exactly_as_they_are():
    x = torch.rand(2, 3, 32, 32)
    blurred = augment.gaussian_blur(x, torch.tensor([0.0, 1.0]), 2.0)
    assert torch.equal(blurred[0], x[0]) and not torch.allclose(blurred[1], x[1], atol=1e-3)


def test_images_without_jitter_stay_exactly_as_they_are(images):
    plan = augment.draw(augment.V2._replace(jitter_p=0), len(images), np.random.default_rng(1))
    x = images.float() / 255
    assert torch.equal(augment.color_jitter(x, plan, augment.Plan(*map(torch.from_numpy, plan))), x)


def test_draws_have_torchvisions_distribution():
    n, recipe = 40000, augment.V2
    plan = augment.Plan(*map(torch.from_numpy, augment.draw(recipe, n, np.random.default_rng(2))))
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    reference = [
        transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(4000)
    ]
    quantiles = torch.linspace(0.02, 0.98, 9)
    factors, jittered = plan.before * plan.after, plan.jittered.view(-1, 1)
    for j, chosen in enumerate((~plan.contrast & ~plan.saturation, plan.contrast, plan.saturation)):
        theirs = torch.tensor([parameters[1 + j] for parameters in reference])
        ours = factors[chosen & jittered]
        torch.testing.assert_close(ours.quantile(quantiles), theirs.quantile(quantiles), atol=0.03, rtol=0)
    theirs = torch.tensor([parameters[4] for parameters in reference])
    torch.testing.assert_close(plan.hue_shift.quantile(quantiles), theirs.quantile(quantiles), atol=0.01, rtol=0)

    for share, p in ((plan.jittered, 0.8), (plan.gray, 0.2), (plan.flip, 0.5), (plan.sigma > 0, 0.5)):
        assert share.float().mean().item() == pytest.approx(p, abs=0.015)
    sigma = plan.sigma[plan.sigma > 0]
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() <= 2.0
    assert sigma.mean().item() == pytest.approx(1.05, abs=0.02)


def test_all_24_orders_of_colour_operations_are_equally_likely():
    n = 24000
    plan = augment.draw(augment.V1, n, np.random.default_rng(3))  # all are jittered
    orders = Counter(tuple(name for name, _ in sequence(plan, i)) for i in range(n))
    assert len(orders) == 24
    assert all(abs(count - n / 24) < 6 * (n / 24) ** 0.5 for count in orders.values())


def test_draws_are_independent_of_one_another():
    plan = augment.draw(augment.V2, 20000, np.random.default_rng(4))
    names = [dict(sequence(plan, i)) for i in np.flatnonzero(plan.jittered)]
    colours = [[each.get(name, 1) for each in names] for name in ("brightness", "contrast", "saturation", "hue")]
    others = [plan.gray, plan.sigma, plan.flip]
    for table in (np.stack([*colours, *(values[plan.jittered] for values in others)]), [plan.jittered, *others]):
        correlation = np.corrcoef(table) - np.eye(len(table))
        assert np.abs(correlation).max() < 0.04


def test_denormalize_is_the_inverse_of_normalize():
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(augment.denormalize(augment.normalize(x)), x)
    torch.testing.assert_close(augment.normalize(x), TF.normalize(x, augment.MEAN, augment.STD))


def test_a_batch_in_one_piece_equals_image_by_image(images, monkeypatch):
    """A GPU works on the whole batch, a CPU on single images."""
    plan = augment.draw(augment.V2, len(images), np.random.default_rng(5))
    one_by_one = augment.apply(augment.V2, plan, images)
    monkeypatch.setattr(augment, "chunks", lambda images: [slice(None)])
    torch.testing.assert_close(augment.apply(augment.V2, plan, images), one_by_one, atol=2e-5, rtol=0)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_it_equals_the_eager_one(images):
    for seed in range(2):
        plan = augment.draw(augment.V2, len(images), np.random.default_rng(seed))
        eager, compiled = (augment.apply(augment.V2, plan, images, compile) for compile in (False, True))
        torch.testing.assert_close(compiled, eager, atol=2e-5, rtol=0)
