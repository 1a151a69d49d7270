import argparse
import contextlib
import json
import os
from pathlib import Path

import common
import pytest
from helpers import write_photo

from moco.errors import UsageError, one_line


def test_a_folder_is_claimed_once_for_some_settings(tmp_path):
    for name in (".lock", "lost+found", f"made.json.{'0' * 16}.partial"):  # left by the system, or by a killed run
        (tmp_path / name).touch()
    for _ in range(2):
        common.claim("--out", tmp_path, "made.json", {"seed": 0})
        assert json.loads((tmp_path / "made.json").read_text()) == {"seed": 0}
    with pytest.raises(UsageError, match=r'--out .* holds images made with {"seed": 0}, not {"seed": 1}'):
        common.claim("--out", tmp_path, "made.json", {"seed": 1})


def test_the_way_out_of_a_folder_without_a_mark_works_as_printed(tmp_path):
    write_photo(tmp_path / "train" / "n01" / "a.png")
    settings = {"photos": "/a  folder of\nDvořák's", "seed": 0}
    with pytest.raises(UsageError, match="holds files but no made.json.*name a new folder or") as refusal:
        common.claim("--out", tmp_path, "made.json", settings)
    (tmp_path / "made.json").write_text(one_line(str(refusal.value)).split("made.json: ")[1])
    common.claim("--out", tmp_path, "made.json", settings)
    with pytest.raises(UsageError, match="cannot be written to"):
        common.claim("--out", tmp_path / "made.json", "made.json", settings)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("theirs", [{"seed": 0}, {"seed": 1}])
def test_of_runs_that_start_at_once_the_first_one_marks_the_folder(tmp_path, monkeypatch, theirs, listed):
    """Another run's mark appears just before, or just after, this run lists the folder."""
    mark, list_names = tmp_path / "made.json", os.listdir

    def listdir(folder):
        names = list_names(folder)
        mark.write_text(json.dumps(theirs))
        return list_names(folder) if listed else names

    monkeypatch.setattr(os, "listdir", listdir)
    differ = pytest.raises(UsageError, match='made with {"seed": 1}')
    with contextlib.nullcontext() if theirs == {"seed": 0} else differ:
        common.claim("--out", tmp_path, mark.name, {"seed": 0})
    assert json.loads(mark.read_text()) == theirs and list_names(tmp_path) == [mark.name]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda source, target: os.stat("/dev/null/not-a-folder"))  # raises OSError
    for _ in range(2):
        common.claim("--out", tmp_path / "new" / "folder", "made.json", {"seed": 0})
    assert json.loads((tmp_path / "new" / "folder" / "made.json").read_text()) == {"seed": 0}


def test_photos_that_differ_in_the_suffix_only_are_refused(tmp_path):
    for name in ("n01/a.jpg", "n02/a.jpg"):
        write_photo(tmp_path / name)
    assert common.list_photos(tmp_path, None) == ["n01/a.jpg", "n02/a.jpg"]
    write_photo(tmp_path / "n01" / "a.png")
    with pytest.raises(UsageError, match="1 photos have the name of another"):
        common.list_photos(tmp_path, None)


def test_a_picture_is_a_png():
    assert common.png_path("a.png") == Path("a.png")
    with pytest.raises(argparse.ArgumentTypeError, match="a.jpg does not end in .png; try a.png"):
        common.png_path("a.jpg")
