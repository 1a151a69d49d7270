"""Released checkpoints: their names, and what a download leaves behind."""

import io
import sys
import types
from pathlib import Path

import pytest
import torch

from moco.errors import UsageError
from moco.evaluation import paper, released

NAME = "released:patch-k16384-a2-run1"


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """A drive that serves or raises drive.data, and counts the downloads; drive.cached is where the file is kept."""

    def download(url, output):
        state.downloads.append(url)
        if isinstance(state.data, Exception):
            raise state.data
        return Path(output).write_bytes(state.data) and output

    folder = tmp_path / "non-semantic-negatives"
    state = types.SimpleNamespace(downloads=[], data=checkpoint(), folder=folder, cached=folder / f"{NAME[9:]}.pth.tar")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))
    return state


def checkpoint():
    content = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(1)}}, content)
    return content.getvalue()


def test_all_rows_of_the_table_are_listed():
    assert len(released.links()) == 27 and len(set(released.links().values())) == 27
    assert {name.rsplit("-run", 1)[0] for name in released.links()} == set(paper.rows())


def test_other_paths_are_left_as_they_are():
    assert released.local_path("ckpts/a.pth.tar") == "ckpts/a.pth.tar" and released.local_path("") == ""
    with pytest.raises(UsageError, match="no such checkpoint; there are mocov2-k16384-run1"):
        released.local_path("released:patch")


def test_without_gdown_the_link_and_the_place_are_named(drive, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UsageError, match="pip install gdown") as error:
        released.local_path(NAME)
    assert released.links()["patch-k16384-a2-run1"] in str(error.value) and str(drive.cached) in str(error.value)


def test_a_download_is_kept(drive):
    for _ in range(2):
        assert released.local_path(NAME) == str(drive.cached) and drive.cached.read_bytes() == checkpoint()
    assert drive.downloads == [released.links()["patch-k16384-a2-run1"]]
    assert list(drive.folder.iterdir()) == [drive.cached]


BAD = {
    "quota exceeded": OSError("quota exceeded"),
    "no file": b"",
    "not a checkpoint": b"<!DOCTYPE html>",
    "damaged, truncated": checkpoint()[:-300],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(drive, reason):
    drive.data = BAD[reason]
    with pytest.raises(UsageError, match=f"{NAME}: .*{reason}.*drive.google.com"):
        released.local_path(NAME)
    assert not list(drive.folder.iterdir())
