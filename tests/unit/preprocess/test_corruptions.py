import itertools
import sys
from types import SimpleNamespace

import corruptions
import numpy as np
import pytest
from helpers import write_photo
from PIL import Image

from moco.data import datasets
from moco.errors import UsageError
from moco.evaluation import testsets


@pytest.mark.parametrize("size", [(41, 200), (300, 40), (46, 47), (37, 37)])
def test_the_crop_is_that_of_the_evaluation(size, tmp_path):
    write_photo(tmp_path / "a.png", size=size)
    image, enlarged = corruptions.crop(tmp_path / "a.png", 40)
    expected = datasets.eval_transform(40)(tmp_path / "a.png").permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(image), expected) and enlarged == (min(size) < 46)


def test_the_corruptions_are_those_of_the_evaluation():
    assert set(corruptions.CORRUPTIONS) == {name for group in testsets.CORRUPTIONS.values() for name in group}


def test_each_image_has_a_seed_of_its_own():
    photos = ("a/ü.JPEG", "a/\udcff.JPEG")  # names need not be UTF-8
    images = itertools.product((0, 1), photos, corruptions.CORRUPTIONS, corruptions.SEVERITIES)
    seeds = {corruptions.seed_of(*image) for image in images}
    assert len(seeds) == 2 * 2 * 19 * 5 and all(0 <= seed < 2**32 for seed in seeds)


def test_random_numbers_of_no_use_are_drawn_again(monkeypatch):
    drawn = []

    def spatter(image, severity, corruption_name):
        drawn.append(np.random.randint(1000))
        return np.uint8(image * (np.float64(0) / (len(drawn) > 2)))

    library = SimpleNamespace(corrupt=spatter)
    monkeypatch.setitem(sys.modules, "imagecorruptions", library)
    image = Image.new("RGB", (32, 32), "white")
    assert corruptions.corrupt(image, "spatter", 1, 2**32 - 1).shape == (32, 32, 3)
    assert len(set(drawn)) == 3
    library.corrupt = lambda *_, **__: np.float64(0) / np.zeros(())
    with pytest.raises(ValueError, match="spatter at severity 1"):
        corruptions.corrupt(image, "spatter", 1, 0)


def test_without_the_library_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UsageError, match="pip install imagecorruptions-imaug$"):
        corruptions.library()


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 224])
def test_every_corruption_works_at_small_sizes(size, tmp_path):
    pytest.importorskip("imagecorruptions")
    write_photo(tmp_path / "a.png", size=(300, 300))
    image, _ = corruptions.crop(tmp_path / "a.png", size)
    for name in corruptions.CORRUPTIONS:
        for severity in range(1, 6):
            corrupted = corruptions.corrupt(image, name, severity, 0)
            assert corrupted.shape == (size, size, 3) and corrupted.dtype == np.uint8 and corrupted.std() > 1
            assert np.array_equal(corrupted, corruptions.corrupt(image, name, severity, 0)), name
    for seed in range(600):  # 1 in 60 draws of spatter at 32 px has no drop, and would be a black image
        assert corruptions.corrupt(image, "spatter", 1, seed).mean() > 0.8 * np.asarray(image).mean()
