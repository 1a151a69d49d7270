import numpy as np
import pytest
import torch

from moco.negatives import NEGATIVES, patch_negatives

SIZE = 40


def labelled_pixels(n=1, size=SIZE):
    """Images whose every pixel is unlike every other: channel 0 tells its row, channel 1 its column, 2 its image."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([torch.stack([rows, columns, torch.full_like(rows, i)]) for i in range(n)])


def tiles(negative, side):
    for top in range(0, SIZE, side):
        for left in range(0, SIZE, side):
            yield negative[:, top : top + side, left : left + side]


@pytest.mark.parametrize("side", [1, 7, 8, 13, 20, 39, 40])
def test_every_tile_is_an_exact_window_of_its_own_image(side):
    negatives = patch_negatives(labelled_pixels(3), side, side, np.random.default_rng(0), count=2)
    assert negatives.shape == (3, 2, 3, SIZE, SIZE)
    for i in range(3):
        for negative in negatives[i]:
            assert (negative[2] == i).all()
            for tile in tiles(negative, side):
                top, left = tile[0, 0, 0], tile[1, 0, 0]
                assert 0 <= top <= SIZE - side and 0 <= left <= SIZE - side
                assert (tile[0] == top + torch.arange(tile.shape[1]).view(-1, 1)).all()
                assert (tile[1] == left + torch.arange(tile.shape[2])).all()


def patch_size_of(negative):
    """The patch side, read off the picture: where the row number stops growing by one along each column."""
    breaks = (negative[0].diff(dim=0) != 1).any(dim=1).nonzero()
    return breaks[0].item() + 1 if len(breaks) else SIZE


def test_patch_sizes_of_every_negative_are_uniform_with_both_ends():
    negatives = patch_negatives(labelled_pixels(500), 5, 8, np.random.default_rng(1), count=4)
    sizes = torch.tensor([patch_size_of(negative) for negative in negatives.flatten(0, 1)])
    assert sizes.min() == 5 and sizes.max() == 8
    assert sizes.bincount()[5:].div(2000).tolist() == pytest.approx([0.25] * 4, abs=0.04)


def test_positions_are_uniform_up_to_the_last_one():
    side = 20
    negatives = patch_negatives(labelled_pixels(), side, side, np.random.default_rng(3), count=2000)[0]
    corners = torch.cat([torch.stack([tile[:2, 0, 0] for tile in tiles(negative, side)]) for negative in negatives])
    for axis in range(2):
        counts = corners[:, axis].bincount(minlength=SIZE - side + 1)
        assert len(counts) == SIZE - side + 1
        assert counts.float().div(len(corners)).tolist() == pytest.approx([1 / 21] * 21, abs=0.012)
    correlation = torch.corrcoef(corners.T.float())[0, 1]
    assert abs(correlation) < 0.05  # rows and columns are drawn apart


def test_a_patch_as_large_as_the_image_gives_the_image():
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(patch_negatives(images, 16, 16, np.random.default_rng(0))[:, 0], images)


@pytest.mark.parametrize("shape, low, high, told", [
    ((1, 3, 40, 40), 0, 16, "patch sizes 0..16 do not fit"), ((1, 3, 40, 40), 20, 10, "patch sizes 20..10 do not fit"),
    ((1, 3, 40, 40), 16, 41, "patch sizes 16..41 do not fit"), ((1, 3, 40, 39), 4, 8, "a batch of square images"),
    ((3, 32, 32), 4, 8, r"got the shape \(3, 32, 32\); .* images.unsqueeze\(0\)"),
    ((), 4, 8, r"got the shape \(\)")])  # fmt: skip
def test_sizes_that_do_not_fit_and_images_that_are_no_batch_of_square_ones_are_refused(shape, low, high, told):
    with pytest.raises(ValueError, match=told):
        patch_negatives(torch.zeros(shape), low, high, np.random.default_rng(0))


def test_a_generator_of_pytorch_draws_them_too():
    one, same, other = (patch_negatives(labelled_pixels(), 4, 8, torch.Generator().manual_seed(i)) for i in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


OPTIONS = {"patch_ratio": (4, 12), "num_nonsem": 2, "image_size": SIZE}


def test_every_kind_makes_negatives_of_the_query_or_of_its_texture():
    query, texture = torch.rand(3, 3, SIZE, SIZE), torch.rand(3, 3, SIZE, SIZE)
    made = NEGATIVES["patch"].make(query, None, np.random.default_rng(5), OPTIONS)
    assert torch.equal(made, patch_negatives(query, 4, 12, np.random.default_rng(5), count=2))
    made = NEGATIVES["texture"].make(query, texture, np.random.default_rng(5), OPTIONS)
    assert torch.equal(made, texture.unsqueeze(1)) and NEGATIVES["texture"].needs_texture


@pytest.mark.parametrize("kind, options, told", [
    ("patch", {}, ""), ("patch", {"patch_ratio": (12, 4)}, "--patch-ratio 12 4: needs LO <= HI <= 40"),
    ("patch", {"patch_ratio": (4, 41)}, "--patch-ratio 4 41"), ("texture", {"num_nonsem": 1}, ""),
    ("texture", {}, "--num-nonsem 2: there is one texture per photo")])  # fmt: skip
def test_options_that_do_not_suit_a_kind_are_refused(kind, options, told):
    refused = NEGATIVES[kind].refusal(OPTIONS | options)
    assert refused.startswith(told) and bool(refused) == bool(told)
