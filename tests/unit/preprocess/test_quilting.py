"""Texture synthesis by quilting: how the patches are used, and where blocks are cut and closed."""

import itertools

import numpy as np
import pytest
import quilting
from helpers import write_photo
from PIL import Image
from preprocessing import largest_verbatim_square, mean_steps

SIZE = 224


def smooth(tmp_path, seed=1):
    write_photo(tmp_path / "photo.png", size=(192, 96), seed=seed)
    pixels = np.asarray(Image.open(tmp_path / "photo.png"))
    return np.stack([pixels[:, :96], pixels[:, 96:]])


def flat_and_detailed():
    """One patch is flat but for some noise, the other half flat, half stripes: where quilting drifts and gets lost."""
    patches = np.full((2, 96, 96, 3), 120) + np.random.default_rng(0).integers(-2, 3, (2, 96, 96, 3))
    patches[1, :48] += (100 * (np.arange(96) // 5 % 2))[:, None]
    return patches.astype(np.uint8)


@pytest.fixture(params=["noise", "smooth", "flat and detailed", "one colour"])
def patches(request, tmp_path):
    return {
        "noise": np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8),
        "smooth": smooth(tmp_path),
        "flat and detailed": flat_and_detailed(),
        "one colour": np.full((2, 96, 96, 3), 77, np.uint8),
    }[request.param]


def test_both_patches_and_all_their_regions_are_used(patches):
    sources = quilting.lay_blocks(patches, SIZE, np.random.default_rng(0))
    assert sources.shape == (SIZE, SIZE)
    assert 0.35 <= np.mean(sources < 96 * 96) <= 0.65
    assert len(np.unique(sources)) >= 0.6 * 2 * 96 * 96
    assert largest_verbatim_square(sources, 96) <= 48


def test_blocks_continue_what_is_there():
    """On a patch of stripes the quilted texture is stripes: blocks are chosen to fit, the alternative is chance."""
    stripes = np.broadcast_to((200 * (np.arange(96) // 6 % 2))[:, None], (2, 96, 96, 3)).astype(np.uint8)
    texture = stripes.reshape(-1, 3)[quilting.lay_blocks(stripes, SIZE, np.random.default_rng(0))]
    assert np.abs(np.diff(texture.astype(int), axis=0)).mean() < 2  # along the stripes; 100 a step if by chance


def test_same_generator_same_texture_and_another_another(patches):
    one, again, other = (quilting.quilt(patches, SIZE, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (SIZE, SIZE, 3) and one.dtype == np.uint8
    assert np.array_equal(one, again)
    assert patches.std() == 0 or not np.array_equal(one, other)


@pytest.mark.parametrize(
    "size, shape", [(100, (3, 50, 71, 3)), (20, (2, 8, 8, 3)), (63, (2, 25, 25, 3)), (150, (2, 130, 130, 3))]
)
def test_patches_of_any_size_and_number_are_used_evenly(size, shape):
    patches = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels, blocks = shape[1] * shape[2], quilting.blocks_for(min(shape[1:3]))
    sources = quilting.lay_blocks(patches, size, np.random.default_rng(0), blocks)
    assert sources.shape == (size, size) and sources.min() >= 0 and sources.max() < shape[0] * pixels
    shares = np.bincount(sources.ravel() // pixels, minlength=shape[0]) / size**2
    assert 0.5 / shape[0] <= shares.min() and shares.max() <= 1.5 / shape[0]
    assert len(np.unique(sources)) >= min(0.5 * shape[0] * pixels, 0.3 * size * size)
    assert quilting.quilt(patches, size, np.random.default_rng(0), blocks).shape == (size, size, 3)


def test_patches_smaller_than_a_block_are_refused():
    with pytest.raises(ValueError, match="39×96 px are smaller than a block"):
        quilting.quilt(np.zeros((2, 96, 39, 3), np.uint8), SIZE, np.random.default_rng(0))


def test_the_cut_is_the_cheapest_of_all():
    difference = np.random.default_rng(0).random((3, 5, 4)).astype(np.float32)
    cuts = quilting.before_cut(difference).sum(axis=2)  # N×length: the column of the cut
    for strip, cut in zip(difference, cuts):
        paths = [path for path in itertools.product(range(4), repeat=5) if all(abs(np.diff(path)) <= 1)]
        cheapest = min(sum(strip[row, column] for row, column in enumerate(path)) for path in paths)
        assert sum(strip[row, column] for row, column in enumerate(cut)) == pytest.approx(cheapest, abs=1e-5)
        assert all(abs(np.diff(cut)) <= 1)


def test_the_correction_solves_its_equation():
    """Against a dense solve of the least squares problem: |∇e − m|² + |e|²/REACH² least, m only across cuts."""
    rng = np.random.default_rng(0)
    patches = (100 + rng.integers(0, 30, (2, 40, 40, 3)) + np.array([0, 60])[:, None, None, None]).astype(np.uint8)
    size = 9
    sources = np.arange(size)[:, None] * 40 + np.arange(size) + 41  # of the first patch …
    sources[:, 5:] += 1600 - 3  # … and, right of a cut, of the second
    pixels = patches.reshape(-1, 3).astype(float)
    at = np.arange(size * size).reshape(size, size)
    rows, wanted = [np.eye(size * size) / quilting.Blocks().reach], [np.zeros((size * size, 3))]
    for near, far, stride in ((at[:-1], at[1:], 40), (at[:, :-1], at[:, 1:], 1)):
        for a, b in zip(near.ravel(), far.ravel()):
            row = np.zeros((1, size * size))
            row[0, b], row[0, a] = 1, -1
            here, there = sources.ravel()[[a, b]]
            step = (pixels[here + stride] - pixels[here] + pixels[there] - pixels[there - stride]) / 2
            rows.append(row)
            wanted.append((step - (pixels[there] - pixels[here]))[None] * (there - here != stride))
    correction = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]
    assert np.abs(correction).max() > 10
    expected = np.clip(pixels[sources] + correction.reshape(size, size, 3), 0, 255)
    assert np.abs(quilting.close_cuts(patches, sources) - expected).max() <= 0.51


def test_steps_across_cuts_are_as_those_within(tmp_path):
    patches = smooth(tmp_path, seed=3)
    sources = quilting.lay_blocks(patches, SIZE, np.random.default_rng(0))
    across, within = mean_steps(patches.reshape(-1, 3)[sources], sources, 96)
    assert across > 1.5 * within
    across, within = mean_steps(quilting.close_cuts(patches, sources), sources, 96)
    assert across < 1.1 * within
