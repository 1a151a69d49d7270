"""preprocess/corruptions.py: with a stand-in for the library that tells what it was given, and with the library."""

import json
import sys
from pathlib import Path

import corruptions
import files
import numpy as np
import pool
import pytest
import torch
from helpers import write_photo
from PIL import Image
from torchvision import transforms

from moco.augment import MEAN, STD
from moco.data import datasets
from moco.distributed import DistContext
from moco.encoders import build_encoder
from moco.evaluation import scores, testsets

SCRIPT = "preprocess/corruptions.py"
STAND_IN = f"""
import numpy as np

NAMES = {corruptions.CORRUPTIONS}
OWN_SEED = {corruptions.OWN_SEED}

def get_corruption_names(subset):
    return list(NAMES)

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
    return tmp_path / "own"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "imagecorruptions.py").write_text(STAND_IN)
    monkeypatch.delitem(sys.modules, "imagecorruptions", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    yield
    sys.modules.pop("imagecorruptions", None)


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, options)])
    return corruptions.main()


def refusal(monkeypatch, capsys, *options):
    """The line with which the script refuses its options."""
    with pytest.raises((SystemExit, files.UsageError)) as stop:
        run(monkeypatch, *options)
    if stop.type is SystemExit:
        assert stop.value.code == 2
        return capsys.readouterr().err
    return str(stop.value)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.JPEG")}


def test_the_tree_is_that_of_imagenet_c(photos, stand_in, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--val", photos, "--out", tmp_path / "c", "--size", 32, "--workers", 2) == 0
    made = contents(tmp_path / "c")
    names = {str(Path(name).relative_to(*Path(name).parts[:1])) for name in made}
    assert {name.split("/")[0] for name in made} == {name for group in testsets.CORRUPTIONS.values() for name in group}
    assert names == {f"{s}/{name}.JPEG" for s in range(1, 6) for name in ("cat/a", "cat/sub/b", "dog/c")}
    assert len(made) == 19 * 5 * 3
    assert "wrote the corruptions of 3 photos, 32 px" in capsys.readouterr().out
    test_sets = testsets.list_test_sets({"corruption": str(tmp_path / "c")}, ["cat", "dog"])
    assert len(test_sets) == 95 and {tuple(each.labels) for each in test_sets} == {(0, 0, 1)}
    assert testsets.unknown_corruptions(str(tmp_path / "c")) == []


def test_images_are_the_val_crop_corrupted_and_saved_as_jpeg(photos, stand_in, tmp_path, monkeypatch):
    run(monkeypatch, "--val", photos / "val", "--out", tmp_path / "c", "--size", 40, "--workers", 1)
    image = datasets.eval_transform(40)(photos / "val" / "cat" / "a.png").permute(1, 2, 0).numpy()
    np.random.seed(corruptions.seed_of(0, "cat/a.png", "fog", 3))
    expected = tmp_path / "expected.JPEG"
    Image.fromarray(np.uint8(image // 2 + np.random.randint(0, 100) + 3)).save(expected, quality=85)
    assert (tmp_path / "c/fog/3/cat/a.JPEG").read_bytes() == expected.read_bytes()


def test_the_same_seed_gives_the_same_files(photos, stand_in, tmp_path, monkeypatch):
    for name, options in {"one": ["--workers", 1], "two": ["--workers", 2], "other": ["--seed", 1]}.items():
        run(monkeypatch, "--val", photos, "--out", tmp_path / name, "--size", 32, *options)
    (photos / "val" / "cat" / "a.png").unlink()  # the others are a function of their own path
    run(monkeypatch, "--val", photos, "--out", tmp_path / "fewer", "--size", 32)
    one, two, other, fewer = (contents(tmp_path / name) for name in ("one", "two", "other", "fewer"))
    assert one == two and fewer.items() < one.items()
    assert len(set(one.values()) & set(other.values())) < len(one) / 2


def test_a_second_run_makes_only_what_is_missing(photos, stand_in, tmp_path, monkeypatch, capsys):
    command = ["--val", photos, "--out", tmp_path / "c", "--size", 32, "--workers", 1]
    run(monkeypatch, *command, "--limit", 1)
    whole = contents(tmp_path / "c")
    assert {Path(name).name for name in whole} == {"a.JPEG", "c.JPEG"}
    kept, gone = tmp_path / "c/fog/3/cat/a.JPEG", tmp_path / "c/snow/1/dog/c.JPEG"
    kept.write_bytes(b"kept")
    gone.unlink()
    capsys.readouterr()
    run(monkeypatch, *command)
    assert capsys.readouterr().out.startswith("3 photos, 1 of them done; 95 images each")
    assert kept.read_bytes() == b"kept" and gone.read_bytes() == whole["snow/1/dog/c.JPEG"]
    assert len(contents(tmp_path / "c")) == 95 * 3


def test_a_broken_photo_is_listed_and_left_out(photos, stand_in, tmp_path, monkeypatch, capsys):
    (photos / "val" / "dog" / "c.jpg").write_bytes(b"no image")
    assert run(monkeypatch, "--val", photos, "--out", tmp_path / "c", "--size", 32, "--workers", 1) == 1
    assert len(contents(tmp_path / "c")) == 95 * 2
    out, err = capsys.readouterr()
    assert "of 2 photos" in out and "1 broken images were left out" in err and "dog/c.jpg: Unidentified" in err


@pytest.mark.parametrize("size", [(41, 200), (300, 40), (46, 47), (37, 37)])
def test_the_crop_is_that_of_the_evaluation(size, tmp_path):
    write_photo(tmp_path / "a.png", size=size)
    image, enlarged = corruptions.crop(tmp_path / "a.png", 40)
    expected = datasets.eval_transform(40)(tmp_path / "a.png").permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(image), expected) and enlarged == (min(size) < 46)


def test_random_numbers_of_no_use_are_drawn_again(stand_in):
    library, drawn = corruptions.library(), []

    def spatter(image, severity, corruption_name):
        drawn.append(np.random.randint(1000))
        return np.uint8(image * (np.float64(0) / (len(drawn) > 2)))

    library.corrupt = spatter
    image = Image.new("RGB", (32, 32), "white")
    assert corruptions.corrupt(image, "spatter", 1, 2**32 - 1).shape == (32, 32, 3)
    assert len(set(drawn)) == 3
    library.corrupt = lambda *_, **__: np.float64(0) / np.zeros(())
    with pytest.raises(ValueError, match="spatter at severity 1"):
        corruptions.corrupt(image, "spatter", 1, 0)


def test_small_photos_are_enlarged_and_counted(photos, stand_in, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--val", photos, "--out", tmp_path / "c", "--size", 64, "--workers", 1)
    assert "; 3 photos below 73 px were enlarged first" in capsys.readouterr().out
    assert Image.open(tmp_path / "c/fog/3/cat/a.JPEG").size == (64, 64)


def test_what_cannot_be_right_is_refused(photos, stand_in, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--val", photos, "--out", tmp_path / "c", "--size", 32, "--workers", 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    write_photo(tmp_path / "others" / "cat" / "a.png")
    for options, message in (
        ([photos, tmp_path / "d", "--size", 28], "images of 32 px or more; use --size 32, and train and test with"),
        ([tmp_path / "nowhere", tmp_path / "d"], "no such folder"),
        ([photos, photos / "val" / "c"], "where it would be a class"),
        ([photos, tmp_path / "d", "--seed", -1], "try --seed 0"),
        ([photos, tmp_path / "c", "--size", 64], 'holds images made with {"val":'),
        ([tmp_path / "others", tmp_path / "c", "--size", 32], "others"),
        ([photos, photos / "val" / "cat" / "a.png" / "c"], "where it would be a class"),
        ([photos, tmp_path / "notes" / "a.txt" / "c"], "cannot be used"),
        ([photos, tmp_path / "c", "--size", 32, "--seed", 1], '"seed": 0'),
        ([photos, tmp_path / "notes"], "holds something else"),
    ):
        val, out, *more = options
        assert message in refusal(monkeypatch, capsys, "--val", val, "--out", out, *more)
    write_photo(photos / "val" / "cat" / "a.jpg")
    line = refusal(monkeypatch, capsys, "--val", photos, "--out", tmp_path / "d")
    assert "1 photos differ from another in the suffix only" in line
    assert not (tmp_path / "d").exists()


def test_without_the_library_a_line_says_how_to_get_it(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    line = refusal(monkeypatch, capsys, "--val", photos, "--out", tmp_path / "c")
    assert line.endswith("pip install imagecorruptions-imaug") and "\n" not in line
    assert not (tmp_path / "c").exists()


def test_few_jobs_are_shared_by_all_workers():
    assert len(set(pool.in_processes(_identity, [0.5] * 2, 2, "job"))) == 2


def _identity(seconds):
    import os
    import time

    time.sleep(seconds)
    return os.getpid()


def test_the_files_say_how_they_were_made(photos, stand_in, tmp_path, monkeypatch):
    run(monkeypatch, "--val", photos, "--out", tmp_path / "c", "--size", 32, "--workers", 1)
    made = json.loads((tmp_path / "c" / "corruptions.json").read_text())
    assert made.pop("val") == str((photos / "val").resolve())
    assert made == {"size": 32, "seed": 0, "quality": 85, "imagecorruptions-imaug": corruptions.version()}


# With the library


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


@pytest.mark.slow
def test_spatter_without_a_drop_is_no_black_image(tmp_path):
    pytest.importorskip("imagecorruptions")
    write_photo(tmp_path / "a.png", size=(300, 300))
    image, _ = corruptions.crop(tmp_path / "a.png", 32)
    for seed in range(600):  # 1 in 60 has none
        assert corruptions.corrupt(image, "spatter", 1, seed).mean() > 0.8 * np.asarray(image).mean()


@pytest.mark.slow
def test_figures_equal_a_loop_over_the_library(photos, tmp_path, monkeypatch):
    library = pytest.importorskip("imagecorruptions")
    run(monkeypatch, "--val", photos, "--out", tmp_path / "c", "--size", 48, "--workers", 2)
    torch.manual_seed(0)
    model = build_encoder("resnet10", 2).eval()
    preset = transforms.Compose([transforms.Resize(55), transforms.CenterCrop(48)])
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    names = {"cat/a.png": 0, "cat/sub/b.JPEG": 0, "dog/c.jpg": 1}
    expected, file = {}, tmp_path / "one.JPEG"
    for name in library.get_corruption_names("all"):
        for severity in range(1, 6):
            hits = 0
            for photo, label in names.items():
                image = np.asarray(preset(Image.open(photos / "val" / photo).convert("RGB")))
                seed = corruptions.seed_of(0, photo, name, severity)
                np.random.seed(seed)
                own = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
                Image.fromarray(library.corrupt(image, severity, name, **own)).save(file, quality=85)
                with torch.no_grad():
                    hits += model(finish(Image.open(file))[None]).argmax().item() == label
            expected[f"corruption/{name}/{severity}"] = 100 * hits / 3
    test_sets = testsets.list_test_sets({"corruption": str(tmp_path / "c")}, ["cat", "dog"])
    scored = scores.score(test_sets, [model], ["cat", "dog"], 48, 8, 0, DistContext())
    assert {test_set.key: result["top1"] for test_set, (result,) in scored} == expected
    assert 0 < sum(expected.values()) / 95 < 100
