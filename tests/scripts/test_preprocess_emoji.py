"""preprocess/emoji.py on packages in miniature: none of a test subject's pictures is trained on."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from helpers import REPOSITORY, run_script
from PIL import Image
from preprocessing import refusal, tree

pytest.importorskip("resvg_py")
import emoji  # noqa: E402

CLASSES = {"animal-bird": (0x1F400, 20), "sky & weather": (0x1F500, 12), "money": (0x1F4B0, 4)}  # first, how many
CODES = {f"{first + place:x}": name for name, (first, count) in CLASSES.items() for place in range(count)}
JOINED = ("1f468-200d-1f403", "1f469-200d-1f403", "1f403-200d-2640-fe0f")  # of one subject
TONED = "1f403-1f3fd"
NOTHING = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>'
SVG = NOTHING.replace("/>", '><rect width="5" height="3" fill="red"/></svg>')
EMPTY = "1f410"  # OpenMoji's picture in colour of this test subject


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def draw(path, code="1f400"):
    """A bar on a transparent ground, whose colour tells the subject."""
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[10:20, 5:35] = int(code[-2:], 16), int(code[:4], 16) % 256, 90, 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_package(folder, where, codes):
    """One artist's package, with pictures `where` emoji.ARTISTS says."""
    write(folder / "package.json", {"version": "1.0"})
    for code in codes if where != "icons.json" else ():
        if where.endswith(".svg"):
            write(folder / where.replace("*", code.upper()), NOTHING if (code, where[:5]) == (EMPTY, "color") else SVG)
        else:
            draw(folder / where.replace("*", code), code)
    if where == "icons.json":
        names = {code: f"it-{code}" for code in codes} | {"1f402": "other"}
        icons = {name: {"body": '<circle r="4" cx="5" cy="5"/>'} for name in names.values()}
        aliases = {"it-1f402": {"parent": "other"}}
        write(folder / "icons.json", {"icons": icons, "aliases": aliases, "width": 9, "height": 9})
        write(folder / "chars.json", {} if folder.name == "emojione-v1" else names)  # it lists no code points


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    root = tmp_path_factory.mktemp("packages")
    modules, codes = root / "node_modules", [*CODES, *JOINED, TONED, "1f1e6"]
    subjects = [{"unified": code.upper(), "category": "Nature", "subcategory": name} for code, name in CODES.items()]
    subjects[3]["skin_variations"] = {"1F3FD": {"unified": TONED.upper()}}
    subjects += [{"unified": code.upper(), "category": "People", "subcategory": "animal-bird"} for code in JOINED]
    subjects += [{"unified": "1F1E6", "category": "Flags", "subcategory": "animal-bird"}]
    write(modules / emoji.NOTO / "emoji.json", subjects)
    named = [{"annotation": f"It: {code}", "hexcode": code.upper()} for code in codes]
    write(modules / "openmoji" / "data" / "openmoji.json", named)
    for _, package, where in emoji.ARTISTS.values():
        write_package(modules / package, where, codes)
    for row in csv.DictReader((REPOSITORY / "preprocess/emoji_folders.csv").read_text().splitlines()):
        (root / "usr/share" / row["folder"]).mkdir(parents=True, exist_ok=True)
    stamps, clips = root / "usr/share/tuxpaint/stamps", root / "usr/share/openclipart/png"
    for name in "animals/birds/hawk", "animals/birds/cartoon/duck", "space/moon/full":
        draw(stamps / f"{name}.png")
    for name in "tools/hammer", "animals/birds/old/owl", "animals/birds/old_owl":  # tools are no class here
        draw(clips / f"{name}.png")
    return root


def run(packages, out, *options, **settings):
    return run_script("preprocess/emoji.py", "--packages", packages, "--out", out, "--workers", 2, *options, **settings)


@pytest.fixture(scope="module")
def data(packages, tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "data"
    told = run(packages, out, "--preview", out.parent / "sheet.png").stderr
    assert told.count("left out: ") == 1 and f"color/svg/{EMPTY.upper()}.svg: nothing is drawn" in told
    assert Image.open(out.parent / "sheet.png").size == (24 * 64, 8 * 64)
    return out


def subjects(data, *folders):
    """The code points of the pictures in these folders."""
    names = "|".join(sorted(emoji.ARTISTS, key=len, reverse=True))
    return {re.sub(f"^({names})-", "", path.stem) for folder in folders for path in (data / folder).rglob("*.png")}


def test_no_picture_of_a_test_subject_is_trained_on(data):
    trained, tested = subjects(data, "unlabeled", "train"), subjects(data, "val", "rendition", "sketch", "silhouette")
    assert {emoji.fold(code) for code in trained} == {1, 2, 3} and {emoji.fold(code) for code in tested} == {0}
    assert len({emoji.fold(code) for code in ("1f403", TONED, *map(emoji.normal, JOINED))}) == 1
    assert trained | tested <= {*CODES, TONED, *map(emoji.normal, JOINED)}  # no flag
    assert subjects(data, "train") | subjects(data, "val") == {code for code, name in CODES.items() if name != "money"}


def test_each_set_has_its_artists_and_the_classes_with_twelve_subjects(data):
    for name in "train", "val", "rendition", "sketch", "silhouette", "corruption/fog/5":
        assert {path.name for path in (data / name).iterdir()} == {"animal-bird", "sky-weather"}
    tested = {code for code in CODES if emoji.fold(code) == 0}
    for artist in emoji.ARTISTS:
        drawn = {path.stem for path in (data / "artists" / artist / "val" / "all").iterdir()}
        assert drawn == tested - {EMPTY} if artist == "openmoji" else drawn == tested
    noto = list((data / "val").rglob("noto-*.png"))
    assert len(list((data / "corruption").rglob("*.png"))) == 75 * len(noto) > 0
    assert {
        path.relative_to(data).as_posix() for kind in ("photo", "clipart") for path in (data / kind).glob("*/*")
    } == {
        "photo/animal-bird/tuxpaint-stamps-animals-birds-hawk.png",
        "photo/sky-weather/tuxpaint-stamps-space-moon-full.png",
        "clipart/animal-bird/openclipart-png-animals-birds-old-owl.png",
        "clipart/animal-bird/openclipart-png-animals-birds-old_owl.png",
    }


def test_pictures_are_cut_to_what_is_drawn_on_white(data):
    for path in next((data / "val").rglob("noto-*.png")), next((data / "sketch").rglob("*.png")):
        pixels = np.asarray(Image.open(path)).astype(int)
        drawn = np.argwhere((pixels != 255).any(2))
        (top, left), (bottom, right) = drawn.min(0), drawn.max(0)
        assert pixels.shape == (64, 64, 3) and (left, right) == (3, 60) and abs((top + bottom) / 2 - 31.5) <= 0.5


def test_tuning_data_leave_the_test_subjects_out(packages, tmp_path):
    run(packages, tmp_path, "--tune")
    found = {emoji.fold(code) for code in subjects(tmp_path, "unlabeled", "train", "val", "sketch")}
    assert found == {1, 2, 3} and {emoji.fold(code) for code in subjects(tmp_path, "val", "artists")} == {1}


def test_a_folder_holds_one_data_set(packages, data, tmp_path):
    before, other, new = tree(data), tmp_path / "packages", tmp_path / "new"
    assert "already there" in run(packages, data).stdout
    assert "holds images made with" in refusal(run(packages, data, "--tune", check=False))
    shutil.copytree(packages, other)
    shutil.rmtree(other / "usr")
    assert "cannot be read (No such file" in refusal(run(other, data, check=False))
    shutil.copytree(packages / "usr", other / "usr")
    assert tree(data) == before
    shutil.rmtree(other / "node_modules" / "openmoji" / "black")
    assert "openmoji holds no black/svg/*.svg" in refusal(run(other, new, check=False))
    shutil.rmtree(other / "node_modules" / emoji.NOTO)
    assert "package.json cannot be read" in refusal(run(other, new, check=False)) and not new.exists()
