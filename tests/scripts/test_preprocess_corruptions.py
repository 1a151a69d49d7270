"""preprocess/corruptions.py, run as people run it, with a stand-in for the library of corruptions."""

import json
from pathlib import Path

import corruptions
import numpy as np
import pytest
from helpers import run_script, write_photo
from PIL import Image
from preprocessing import CORRUPT, refusal, tree

from moco.data import datasets
from moco.evaluation import testsets

STAND_IN = f"""
import numpy as np

OWN_SEED = {corruptions.OWN_SEED}

def corrupt(image, severity, corruption_name, seed=None):
    assert (corruption_name in OWN_SEED) == (seed is not None)
    rng = np.random if seed is None else np.random.RandomState(seed)
    return np.uint8(image // 2 + rng.randint(0, 100) + severity)
"""


@pytest.fixture
def photos(tmp_path):
    """Three photos of two classes, one of them in a subfolder."""
    for number, name in enumerate(("cat/a.png", "cat/sub/b.JPEG", "dog/c.jpg")):
        write_photo(tmp_path / "own" / "val" / name, size=(90 + number, 70), seed=number)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "imagecorruptions.py").write_text(STAND_IN)
    return tmp_path / "own"


@pytest.fixture
def run(photos):
    """A function that runs the script."""
    library = {"PYTHONPATH": str(photos.parent / "library")}  # read by a new process only, hence the launcher

    def run(val, out, *options, check=True):
        command = [CORRUPT, "--val", val, "--out", out, "--size", 32, "--workers", 2, *options]
        return run_script(*command, launcher=["-u"], env=library, check=check)

    return run


def test_the_tree_is_that_of_imagenet_c(photos, tmp_path, run):
    out = tmp_path / "c"
    assert run(photos, out, "--size", 40).stdout.endswith("wrote the corruptions of 3 photos, 40 px\n")
    assert len(tree(out)) == 19 * 5 * 3 + 1
    test_sets = testsets.list_test_sets({"corruption": str(out)}, ["cat", "dog"])
    assert len(test_sets) == 95 and {tuple(each.labels) for each in test_sets} == {(0, 0, 1)}
    made_with = {"val": str(photos / "val"), "size": 40, "seed": 0, "quality": 85}
    assert json.loads((out / "corruptions.json").read_text()).items() >= made_with.items()

    image = datasets.eval_transform(40)(photos / "val" / "cat" / "a.png").permute(1, 2, 0).numpy()
    np.random.seed(corruptions.seed_of(0, "cat/a.png", "fog", 3))
    expected = tmp_path / "expected.JPEG"
    Image.fromarray(np.uint8(image // 2 + np.random.randint(0, 100) + 3)).save(expected, quality=85)
    assert (out / "fog/3/cat/a.JPEG").read_bytes() == expected.read_bytes()


def test_the_same_seed_gives_the_same_files(photos, tmp_path, run):
    def made(name, *options):
        run(photos, tmp_path / name, *options)
        return {path: data for path, data in tree(tmp_path / name).items() if path.endswith(".JPEG")}

    one, two, other = made("one", "--workers", 1), made("two"), made("other", "--seed", 1)
    (photos / "val" / "cat" / "a.png").unlink()  # the others are a function of their own path
    assert one == two and made("fewer").items() < one.items()
    assert len(set(one.values()) & set(other.values())) < len(one) / 2


def test_a_second_run_makes_only_what_is_missing(photos, tmp_path, run):
    run(photos, tmp_path / "c", "--limit", 1)
    whole = tree(tmp_path / "c")
    assert {Path(name).name for name in whole} == {"a.JPEG", "c.JPEG", "corruptions.json"}
    kept, gone = tmp_path / "c/fog/3/cat/a.JPEG", tmp_path / "c/snow/1/dog/c.JPEG"
    kept.write_bytes(b"kept")
    gone.unlink()
    assert run(photos, tmp_path / "c").stdout.startswith("3 photos, 1 of them done; 2 processes")
    assert kept.read_bytes() == b"kept" and gone.read_bytes() == whole["snow/1/dog/c.JPEG"]


def test_broken_and_small_photos_are_told(photos, tmp_path, run):
    (photos / "val" / "dog" / "c.jpg").write_bytes(b"no image")
    (photos / "val" / "cat" / "d.avif").touch()
    result = run(photos, tmp_path / "c", "--size", 64, check=False)
    assert result.returncode == 1 and len(tree(tmp_path / "c")) == 95 * 2 + 1
    assert f"{photos / 'val'}: left out, as these formats are not read: 1 .avif\n" in result.stdout
    assert "of 2 photos, 64 px; 2 photos below 73 px were enlarged first" in result.stdout
    assert "1 broken images were left out" in result.stderr and "dog/c.jpg: Unidentified" in result.stderr


def test_bad_input_is_refused(photos, tmp_path, run):
    run(photos, tmp_path / "c", "--limit", 1)
    write_photo(tmp_path / "others" / "cat" / "a.png")
    for val, out, options, message in (
        (photos, tmp_path / "d", ("--size", 28), "images of 32 px or more; use --size 32, and train and test with"),
        (photos, tmp_path / "d", ("--seed", -1), "'-1' is not an integer from 0"),
        (photos, photos / "val" / "cat" / "a.png" / "c", (), "where it would be a class"),
        (photos, tmp_path / "others" / "cat" / "a.png" / "c", (), "cannot be created or locked"),
        (photos, tmp_path / "c", ("--size", 64), 'holds images made with {"val":'),
        (tmp_path / "others", tmp_path / "c", (), "others"),
    ):
        assert message in refusal(run(val, out, *options, check=False))
    assert not (tmp_path / "d").exists()
