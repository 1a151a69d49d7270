import datetime

import pytest
import torch
import torch.distributed as dist
from helpers import TORCHRUN_RANK

from moco.distributed import DistContext
from moco.errors import UsageError
from moco.processes import launch


def launched(ctx, *args):
    return ctx, args


def test_plain_launch_is_this_process_alone():
    ctx, args = launch.launch(launched, (1, 2))
    assert args == (1, 2) and ctx.world_size == 1 and not dist.is_initialized()


def test_a_rank_takes_its_own_gpu_and_hosts_talk_over_gloo(monkeypatch):
    calls = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: calls.update(backend=backend, **more))
    monkeypatch.setattr(launch, "connect", lambda ctx, *where: calls.update(where=where) or "the store")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.update(ended=True))
    ctx = DistContext(3, 4, 1, 2, torch.device("cuda", 1))
    assert launch._join_and_run(ctx, "env://", "nccl", launched, (5,)) == (ctx, (5,))
    assert calls == {
        "device": ctx.device,
        "backend": "cpu:gloo,cuda:nccl",
        "world_size": 4,
        "rank": 3,
        "where": ("env://", ""),
        "store": "the store",
        "timeout": datetime.timedelta(seconds=launch.COLLECTIVE_SECONDS),
        "ended": True,
    }


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "usable_gpus", lambda: 4)
    for name, value in {**TORCHRUN_RANK, "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="this machine has 4 GPUs"):
        launch.resolve_world_size()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"world_size": 2, "rank": 2, "dist_url": "tcp://127.0.0.1:1"}, "--rank 2"),
        ({"world_size": 2}, "--rank -1"),
        ({"world_size": 2, "rank": 0}, "--dist-url"),
        ({"world_size": 2, "rank": 0, "dist_url": "tcp://localhost:nowhere"}, "tcp://10.0.0.1:10001"),
        ({"world_size": 0}, "--world-size 0"),
        ({"rank": 1}, "--rank 1"),
        ({"backend": "smoke"}, "--dist-backend smoke"),
        ({"gpu": 99}, "--gpu 99"),
    ],
)
def test_launch_options_that_contradict_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        launch.launch(launched, (), **options)


def test_world_size_counts_the_processes_of_all_nodes(monkeypatch):
    several = {"multiprocessing": True, "world_size": 3, "rank": 1, "dist_url": "tcp://10.0.0.1:1"}
    monkeypatch.setattr(launch, "usable_gpus", lambda: 8)
    assert launch.resolve_world_size(**several) == (8, 24)
    assert launch.resolve_world_size(multiprocessing=True) == (8, 8)
    assert launch.resolve_world_size() == (1, 1)
    monkeypatch.setattr(launch, "usable_gpus", lambda: 0)
    assert launch.resolve_world_size(**several) == (1, 3)
