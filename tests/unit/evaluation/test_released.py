import io
import sys
import types
from pathlib import Path

import pytest
import torch

from moco.errors import UsageError
from moco.evaluation import paper, released


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "non-semantic-negatives"


def test_all_rows_of_the_table_are_listed():
    assert len(released.drive_ids()) == 27 and len(set(released.drive_ids().values())) == 27
    listing = released.listing()
    assert "released:patch-k16384-a2-run1" in listing and released.drive_ids()["mocov2-k8192-run3"] in listing
    assert {name.rsplit("-run", 1)[0] for name in released.drive_ids()} == set(paper.paper_rows())


def test_other_paths_are_left_as_they_are():
    assert released.local_path("ckpts/a.pth.tar") == "ckpts/a.pth.tar" and released.local_path("") == ""


def test_without_gdown_the_link_and_the_place_are_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UsageError) as error:
        released.local_path("released:patch-k16384-a2-run1")
    assert released.drive_ids()["patch-k16384-a2-run1"] in str(error.value)
    assert str(cache / "patch-k16384-a2-run1.pth.tar") in str(error.value)
    with pytest.raises(UsageError, match="no such checkpoint; there are mocov2-k16384-run1"):
        released.local_path("released:patch")


def test_a_download_is_kept(cache, monkeypatch):
    asked, content = [], io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(1)}}, content)
    content = content.getvalue()

    def download(id, output):
        asked.append(id)
        with open(output, "wb") as file:
            file.write(content)
        return output

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))
    for _ in range(2):
        path = released.local_path("released:texture-k16384-a2-run2")
    assert asked == [released.drive_ids()["texture-k16384-a2-run2"]]
    assert path == str(cache / "texture-k16384-a2-run2.pth.tar") and Path(path).read_bytes() == content


def test_a_failed_download_leaves_nothing_and_says_what_to_do(cache, monkeypatch):
    def download(id, output):
        raise OSError("quota exceeded")

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))
    with pytest.raises(UsageError, match="quota exceeded.*drive.google.com"):
        released.local_path("released:mocov2-k8192-run1")
    assert not list(cache.glob("*.tar"))
