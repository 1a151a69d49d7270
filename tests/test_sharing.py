"""One process of a node lists the files; the others map its list."""

import os

import numpy as np
import pytest
import torch.distributed as dist
from helpers import FAULTS, PRETRAIN, PROBE, SMALL, SMALL_PROBE, TORCHRUN, TORCHRUN_RANK, run_script

from moco.data.folders import LabelList, PathList, TrainingImages
from moco.errors import UsageError
from moco.processes import sharing
from moco.processes.launch import free_port


@pytest.fixture
def as_rank(monkeypatch):
    """Call with a local rank of two under torchrun, whose store this process has."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    two = {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**TORCHRUN_RANK, **two, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    yield lambda rank: monkeypatch.setenv("LOCAL_RANK", str(rank))
    del store


def never():
    raise AssertionError("called")


def listed():
    photos = PathList.of("/data/", ["a/1.png", "b/\udcff.png"])
    return TrainingImages(photos, None, LabelList([0, 1]), ["a", "b"])


def test_the_second_process_of_a_node_maps_the_list_of_the_first(as_rank):
    as_rank(0)
    assert sharing.once_per_node("images", listed) == listed()
    as_rank(1)
    mapped = sharing.once_per_node("images", never)
    assert mapped == listed()
    for array in (mapped.photos._names, np.asarray(mapped.labels)):
        assert not array.flags.owndata and not array.flags.writeable


@pytest.mark.parametrize("trouble", ["no memory file", "it ended", "no answer"])
def test_what_cannot_be_shared_is_made_by_each(as_rank, monkeypatch, trouble):
    if trouble == "no memory file":
        monkeypatch.setattr(sharing.os, "memfd_create", lambda name: os.open("/nowhere/x", os.O_RDWR))
    if trouble == "it ended":
        monkeypatch.setattr(sharing.os, "getpid", lambda: 2**22 + 1)  # above the largest id
    monkeypatch.setattr(sharing, "LISTING_SECONDS", 0.1)
    as_rank(0)
    if trouble != "no answer":
        sharing.once_per_node("images", listed)
    as_rank(1)
    assert sharing.once_per_node("images", lambda: "mine") == "mine"


def test_an_error_of_the_first_process_is_found_by_all(as_rank):
    def refuse():
        raise UsageError("no such directory")

    for rank in (0, 1):
        as_rank(rank)
        with pytest.raises(UsageError):
            sharing.once_per_node("images", refuse)


def test_without_torchruns_store_each_process_lists(monkeypatch):
    for name, value in {**TORCHRUN_RANK, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert sharing.once_per_node("images", lambda: "mine") == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("script, options", [(PRETRAIN, [*SMALL, "--knn"]), (PROBE, SMALL_PROBE)])
def test_two_ranks_list_once(data, tmp_path, script, options):
    launcher = [*TORCHRUN, "--nproc-per-node=2", FAULTS, "report listings"]
    run = run_script(script, *options, "--epochs", 1, "--ckpt_path", tmp_path / "run", data, launcher=launcher)
    assert run.stdout.count(f"listed {data / 'train'}") == run.stdout.count(f"listed {data / 'val'}") == 1
