"""Released checkpoints: their names, links and files."""

import pytest
import torch

from moco.errors import UsageError
from moco.evaluation import paper, released

NAME = "released:patch-k16384-a2-run1"


def test_all_rows_of_the_table_are_listed():
    assert len(released.links()) == 27 and len(set(released.links().values())) == 27
    assert {name.rsplit("-run", 1)[0] for name in released.links()} == set(paper.rows())


def test_other_paths_are_left_as_they_are():
    assert released.local_path("ckpts/a.pth.tar") == "ckpts/a.pth.tar" and released.local_path("") == ""
    with pytest.raises(UsageError, match="no such checkpoint; there are mocov2-k16384-run1"):
        released.local_path("released:patch")


def test_a_released_checkpoint_is_taken_from_the_cache_else_its_link_and_place_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "non-semantic-negatives" / "patch-k16384-a2-run1.pth.tar"
    with pytest.raises(UsageError) as error:
        released.local_path(NAME)
    assert f"download {released.links()['patch-k16384-a2-run1']} and save it as {cached}" in str(error.value)
    cached.parent.mkdir()
    cached.touch()
    assert released.local_path(NAME) == str(cached)
