"""preprocess/shapes.py, run as people run it."""

import json
from collections import Counter

import pytest
import shapes
from helpers import run_script
from PIL import Image
from preprocessing import SHAPES, refusal, tree

SIZES = ("--train", 20, "--test", 10, "--cell", 10)


def run(out, *options, **settings):
    return run_script(SHAPES, "--out", out, *SIZES, "--workers", 2, *options, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "data"
    run(out)
    return out


def test_the_tree_holds_the_sets_and_nothing_else(data):
    counts = {f"{folder}/{shape}": 1 for folder in shapes.SETS.values() for shape in shapes.SHAPES}
    counts |= {f"train/{shape}": 2 for shape in shapes.SHAPES}
    for corruption in shapes.CORRUPTIONS:
        counts |= {f"corruption/{corruption}/{level}/{shape}": 1 for level in range(1, 6) for shape in shapes.SHAPES}
    files = Counter(name.rpartition("/")[0] for name in tree(data))
    assert files.pop("") == 1 and files == counts
    settings = {"version": shapes.VERSION, "seed": 0, "train": 20, "test": 10, "cell": 10}
    assert json.loads((data / "shapes.json").read_text()) == settings


def test_files_depend_on_the_seed_and_not_on_workers(data, tmp_path):
    run(tmp_path / "one", "--workers", 1)
    assert tree(tmp_path / "one") == tree(data)
    run(tmp_path / "other", "--seed", 1)
    one, other = tree(data), tree(tmp_path / "other")
    assert one.keys() == other.keys() and not any(one[name] == other[name] for name in one)


def test_a_second_run_leaves_a_complete_data_set_alone(data, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.png")}
    result = run(data, "--preview", tmp_path / "sheet.png")
    assert "already there" in result.stdout and Image.open(tmp_path / "sheet.png").height > 500
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.png")} == before


@pytest.mark.parametrize(
    "option, value",
    [("--train", 15), ("--test", -10), ("--cell", 4), ("--cell", "ten"), ("--workers", 0), ("--seed", -1)],
)
def test_bad_arguments_end_in_one_line_and_write_nothing(tmp_path, option, value):
    line = refusal(run(tmp_path / "out", option, value, check=False))
    assert option in line and str(value) in line and not (tmp_path / "out").exists()


def test_a_folder_of_another_seed_is_refused_and_left_alone(data):
    before = tree(data)
    told = '"seed": 0, "train": 20, "test": 10, "cell": 10}, not {'
    assert told in refusal(run(data, "--seed", 1, check=False)) and tree(data) == before
