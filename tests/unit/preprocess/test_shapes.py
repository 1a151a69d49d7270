"""The generated data set, as a user gets it: the script is run on its own, and the files are looked at."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import shapes
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "preprocess" / "shapes.py"
SHAPES = ["arrow", "crescent", "disc", "heart", "hourglass", "plus", "ring", "square", "star", "triangle"]
CORRUPTIONS = [
    "brightness",
    "contrast",
    "defocus_blur",
    "elastic_transform",
    "fog",
    "frost",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "shot_noise",
    "snow",
    "zoom_blur",
]
# 18 images a class in each test set: twice the nine foreign textures; enough val images for every corruption.
SIZES = ["--train", "20", "--test", "180", "--cell", "10"]
SMALL = ["--train", "10", "--test", "10", "--cell", "10"]


def run(out, *options, workers=2):
    command = [sys.executable, SCRIPT, "--out", out, "--workers", workers, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pixels(path):
    return np.asarray(Image.open(path)).astype(float)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "data"
    result = run(out, *SIZES)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "data"
    assert run(out, *SMALL, workers=2).returncode == 0
    return contents(out)


def test_the_number_of_workers_does_not_change_a_byte(small, tmp_path):
    assert run(tmp_path / "data", *SMALL, workers=1).returncode == 0
    assert contents(tmp_path / "data") == small


def test_another_seed_gives_other_images_under_the_same_names(small, tmp_path):
    assert run(tmp_path / "data", *SMALL, "--seed", "1").returncode == 0
    other = contents(tmp_path / "data")
    assert other.keys() == small.keys()
    assert not any(other[name] == small[name] for name in small)


@pytest.mark.parametrize(
    "folder, count", [("train", 2), ("val", 18), ("sketch", 18), ("stylized/val", 18), ("rendition", 18)]
)
def test_every_set_has_ten_equal_classes_of_64_px_images(data, folder, count):
    assert names(data / folder) == SHAPES
    for shape in SHAPES:
        files = list((data / folder / shape).iterdir())
        assert len(files) == count
        assert all(file.suffix == ".png" and pixels(file).shape == (64, 64, 3) for file in files)


def test_the_tree_holds_the_sets_and_nothing_else(data):
    assert names(data) == ["corruption", "rendition", "shapes.json", "sketch", "stylized", "train", "val"]
    assert json.loads((data / "shapes.json").read_text()) == {
        "version": shapes.VERSION,
        "seed": 0,
        "train": 20,
        "test": 180,
        "cell": 10,
    }


def test_no_image_appears_twice(data):
    images = [image for name, image in contents(data).items() if name.endswith(".png")]
    assert len(set(images)) == len(images)


def test_stylized_files_name_the_other_classes_equally_often(data):
    for shape in SHAPES:
        owners = Counter(name.split("-")[0] for name in names(data / "stylized" / "val" / shape))
        assert owners == {other: 2 for other in SHAPES if other != shape}


def test_every_corruption_has_five_severities_of_56_px_images(data):
    assert names(data / "corruption") == CORRUPTIONS
    for corruption in CORRUPTIONS:
        assert names(data / "corruption" / corruption) == ["1", "2", "3", "4", "5"]
        for severity in range(1, 6):
            cell = data / "corruption" / corruption / str(severity)
            assert names(cell) == SHAPES
            for shape in SHAPES:
                (file,) = (cell / shape).iterdir()
                assert pixels(file).shape == (56, 56, 3)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruptions_grow_with_severity(data, corruption):
    changes = []
    for severity in range(1, 6):
        files = (data / "corruption" / corruption / str(severity)).glob("*/*.png")
        changes.append(
            np.mean(
                [
                    np.abs(pixels(file) - pixels(data / "val" / file.parent.name / file.name)[4:60, 4:60])
                    for file in files
                ]
            )
        )
    assert changes[0] > 1
    assert all(milder < harder for milder, harder in pairwise(changes)), changes


def test_images_are_not_blank_at_the_highest_severity(data):
    for file in (data / "corruption").glob("*/5/*/*.png"):
        assert pixels(file).std() > 2, file


def test_sketches_are_dark_lines_on_white_shaded_inside(data):
    for file in (data / "sketch").glob("*/*.png"):
        image = pixels(file)
        assert (image == 255).all(axis=2).mean() > 0.3, file
        assert 0 < (image < 100).all(axis=2).mean() < 0.3, file
        assert (image == image[..., :1]).all(), file


def scenes(split, count=120):
    return [shapes.scene_of(3, split, label, number)[0] for label in range(10) for number in range(count)]


def test_half_of_the_photos_have_their_own_texture():
    own = np.mean([scene.texture == shapes.OWN[scene.shape] for scene in scenes("train")])
    assert own == pytest.approx(shapes.RHO + (1 - shapes.RHO) / 10, abs=0.06)
    counts = Counter(scene.texture for scene in scenes("train"))
    assert counts.keys() == shapes.TEXTURES.keys() and max(counts.values()) < 2 * min(counts.values())


def test_stylized_photos_never_have_their_own_texture():
    assert all(scene.texture != shapes.OWN[scene.shape] for scene in scenes("stylized", 18))


def test_what_is_not_the_class_is_drawn_for_each_photo():
    """Colour, texture period and strength, contour and light say nothing about the class: equal means in all."""
    drawn = scenes("val")
    for name, tolerance in (
        ("fill", 0.08),
        ("ground", 0.08),
        ("period", 0.6),
        ("angle", 0.3),
        ("hollow", 0.13),
        ("slope", 0.04),
    ):
        by_class = {}
        for scene in drawn:
            by_class.setdefault(scene.shape, []).append(np.mean(getattr(scene, name)))
        means = [np.mean(values) for values in by_class.values()]
        assert len(means) == 10 and max(means) - min(means) < 2 * tolerance, name
    assert np.mean([scene.hollow for scene in drawn]) == pytest.approx(shapes.HOLLOW, abs=0.05)


def test_object_and_ground_differ_in_their_grey_level():
    colours = [shapes.draw_colours(np.random.default_rng(number)) for number in range(200)]
    assert all(colour.min() >= -0.1 and colour.max() <= 1.1 for pair in colours for colour in pair)
    assert np.mean([abs(fill.mean() - ground.mean()) > 0.1 for fill, ground in colours]) > 0.9


def test_hollow_photos_have_a_contour_that_can_be_seen():
    hollow = [
        (scene, rng)
        for number in range(60)
        for scene, rng in [shapes.scene_of(3, "train", number % 10, number)]
        if scene.hollow
    ]
    assert hollow
    for scene, rng in hollow:
        contour = shapes.shrink(shapes.draw(scene.contours, scene.line))[..., 0] == 1
        image = shapes.paint_photo(rng, scene)
        assert abs(image[contour].mean() - image[~contour].mean()) > 0.04


def test_a_second_run_leaves_a_complete_data_set_alone(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    result = run(data, *SIZES)
    assert result.returncode == 0
    assert "already there" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_killed_run_is_completed_by_the_next_one(small, tmp_path):
    out = tmp_path / "data"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--out", out, "--workers", "1", *SMALL],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(out.rglob("*.png"))) < 20:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(out.rglob("*.png")) and not (out / "shapes.json").exists()
    assert run(out, *SMALL).returncode == 0
    assert contents(out) == small


def test_the_preview_is_an_image(data, tmp_path):
    assert run(data, *SIZES, "--preview", tmp_path / "sheet.png").returncode == 0
    assert pixels(tmp_path / "sheet.png").min() < 50


@pytest.mark.parametrize(
    "options",
    [
        ("--train", "15"),
        ("--train", "0"),
        ("--test", "-10"),
        ("--cell", "4"),
        ("--cell", "ten"),
        ("--workers", "0"),
        ("--seed", "-1"),
        ("--preview", "sheet.txt"),
    ],
)
def test_bad_arguments_end_in_one_line_and_write_nothing(tmp_path, options):
    result = run(tmp_path / "out", *options)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and options[0] in result.stderr and options[1] in result.stderr
    assert names(tmp_path) == []


def test_a_folder_with_something_else_is_refused_and_left_alone(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out, options in (tmp_path, SIZES), (tmp_path / "notes.txt", SIZES), (data, ["--seed", "1", *SIZES]):
        before = contents(out)
        result = run(out, *options)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1 and str(out) in result.stderr
        assert contents(out) == before
    assert (tmp_path / "notes.txt").read_text() == "mine"
