"""The generated images: functions of (seed, set, class, number)."""

from collections import Counter

import numpy as np
import pytest
import shapes


def drawn(split, numbers, seed=0):
    """{path: uint8 image} of these numbers of every class."""
    return {
        path: image
        for label in range(10)
        for number in numbers
        for path, image in shapes.images(seed, split, label, number).items()
    }


@pytest.mark.parametrize("split, folder", shapes.SETS.items())
def test_every_set_has_ten_classes_of_64_px_images(split, folder):
    made = drawn(split, range(2))
    assert {path.rpartition("/")[0] for path in made} == {f"{folder}/{shape}" for shape in shapes.SHAPES}
    assert len(made) == 20 and len({image.tobytes() for image in made.values()}) == 20
    assert {(image.shape, image.dtype) for image in made.values()} == {((64, 64, 3), np.dtype("uint8"))}


def test_stylized_files_name_the_other_classes_equally_often():
    for label, shape in enumerate(shapes.SHAPES):
        paths = [path for number in range(18) for path in shapes.images(0, "stylized", label, number)]
        owners = Counter(path.split("/")[-1].split("-")[0] for path in paths)
        assert owners == {other: 2 for other in shapes.SHAPES if other != shape}


def test_corrupted_images_are_val_images_at_five_severities():
    made = shapes.images(0, "fog", 2, 4)
    assert list(made) == [f"corruption/fog/{severity}/triangle/0004.png" for severity in range(1, 6)]
    (photo,) = shapes.images(0, "val", 2, 4).values()
    changes = [np.abs(image - photo[4:60, 4:60].astype(float)).mean() for image in made.values()]
    assert changes[0] > 1 and changes == sorted(changes)


def test_sketches_are_dark_lines_on_white_shaded_inside():
    for path, image in drawn("sketch", range(3)).items():
        assert (image == 255).all(axis=2).mean() > 0.3, path
        assert 0 < (image < 100).all(axis=2).mean() < 0.3, path
        assert (image == image[..., :1]).all(), path


def scenes(split, count=120):
    return [shapes.scene_of(3, split, label, number)[0] for label in range(10) for number in range(count)]


def test_half_of_the_photos_have_their_own_texture():
    own = np.mean([scene.texture == shapes.OWN[scene.shape] for scene in scenes("train")])
    assert own == pytest.approx(shapes.RHO + (1 - shapes.RHO) / 10, abs=0.06)
    counts = Counter(scene.texture for scene in scenes("train"))
    assert counts.keys() == shapes.TEXTURES.keys() and max(counts.values()) < 2 * min(counts.values())
    assert all(scene.texture != shapes.OWN[scene.shape] for scene in scenes("stylized", 18))


@pytest.mark.parametrize(
    "name, tolerance",
    [("fill", 0.08), ("ground", 0.08), ("period", 0.6), ("angle", 0.3), ("hollow", 0.13), ("slope", 0.04)],
)
def test_what_is_not_the_class_is_drawn_for_each_photo(name, tolerance):
    """Colour, texture period, contour and light say nothing about the class: equal means in all."""
    by_class = {}
    for scene in scenes("val"):
        by_class.setdefault(scene.shape, []).append(np.mean(getattr(scene, name)))
    means = [np.mean(values) for values in by_class.values()]
    assert len(means) == 10 and max(means) - min(means) < 2 * tolerance
