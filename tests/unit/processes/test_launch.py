import argparse
import fnmatch
import socket
import types

import pytest
import torch
import torch.distributed as dist
from helpers import TORCHRUN_RANK

from moco import distributed
from moco.distributed import DistContext
from moco.errors import RunError, UsageError
from moco.processes import launch

pytestmark = pytest.mark.usefixtures("no_launcher")
SEVERAL = {"multiprocessing_distributed": True, "world_size": 3, "rank": 1, "dist_url": "tcp://10.0.0.1:1"}
SLURM = {  # one of two tasks, on two nodes
    "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "n[1-2]", "MASTER_ADDR": "n1",
}  # fmt: skip
OPERATOR = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"}


def arguments(**options):
    return argparse.Namespace(**options)


def gpus(monkeypatch, count):
    monkeypatch.setattr(launch, "usable_gpus", lambda: count)


# Processes


def test_plain_launch_is_this_process_alone():
    called = []
    launch.launch(lambda *given: called.append(given), arguments(lr=1), "inputs", {"never compared": 1})
    ((ctx, args, inputs),) = called
    assert args.lr == 1 and inputs == "inputs" and ctx.world_size == 1 and not dist.is_initialized()


def test_world_size_counts_the_processes_of_all_nodes(monkeypatch):
    gpus(monkeypatch, 8)
    assert launch.resolve_world_size(arguments(**SEVERAL)) == (8, 24)
    assert launch.resolve_world_size(arguments(multiprocessing_distributed=True)) == (8, 8)
    assert launch.resolve_world_size(arguments()) == (1, 1)
    gpus(monkeypatch, 0)
    assert launch.resolve_world_size(arguments(**SEVERAL)) == (1, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"world_size": 2, "rank": 2, "dist_url": "tcp://127.0.0.1:1"}, "--rank 2"),
        ({"world_size": 2}, "--world-size 2 --rank -1"),
        ({"world_size": -2, "rank": 0}, "--world-size -2"),
        ({"world_size": 2, "rank": 0}, "--dist-url"),
        ({"world_size": 2, "rank": 0, "dist_url": "tcp://localhost:nowhere"}, "tcp://10.0.0.1:10001"),
        ({"world_size": 0}, "--world-size 0"),
        ({"rank": 1}, "--rank 1"),
        ({"gpu": 99}, "--gpu 99"),
        ({"dist_url": "env://"}, "WORLD_SIZE=nothing"),
    ],
)
def test_launch_options_that_contradict_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        launch.launch(print, arguments(**options), None, {})


def test_env_url_takes_the_address_from_the_environment(under):
    under({"MASTER_ADDR": "fd00::1", "MASTER_PORT": "29500"})
    args = arguments(dist_url="env://", world_size=2, rank=1)
    assert launch.resolve_world_size(args) == (1, 2)
    assert launch._resolve(args)[0].dist_url == "tcp://[fd00::1]:29500"


@pytest.mark.parametrize("variables", [SLURM, OPERATOR])
@pytest.mark.parametrize(
    "options",
    [
        {"multiprocessing_distributed": True},
        {"multiprocessing_distributed": True, "world_size": 1, "rank": 0},
        {"world_size": 1},
        {"world_size": 2, "rank": 0, "dist_url": "tcp://10.0.0.1:1"},
    ],
)
def test_options_that_make_each_task_a_run_are_refused(under, variables, options):
    under(variables)
    with pytest.raises(UsageError, match="contradicts"):
        launch.resolve_world_size(arguments(**options))


def test_one_task_per_node_may_start_the_nodes_processes(under, monkeypatch):
    gpus(monkeypatch, 8)
    under(SLURM)
    assert launch.resolve_world_size(arguments(**{**SEVERAL, "world_size": 2})) == (8, 16)
    under(OPERATOR)
    assert launch.resolve_world_size(arguments(multiprocessing_distributed=True, dist_url="env://")) == (8, 16)


def test_more_processes_than_gpus_are_refused(under, monkeypatch):
    gpus(monkeypatch, 2)
    under({**SLURM, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"})
    with pytest.raises(UsageError, match="srun: 4 processes for 2 GPUs"):
        launch.resolve_world_size(arguments())
    gpus(monkeypatch, 1)  # each task sees its own
    assert launch.resolve_world_size(arguments()) == (4, 4)
    under({**TORCHRUN_RANK, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"})
    with pytest.raises(UsageError, match="torchrun: 2 processes for 1 GPU"):
        launch.resolve_world_size(arguments())


# The process group


def test_a_rank_takes_its_own_gpu_and_hosts_talk_over_gloo(monkeypatch):
    calls, ctx = {}, DistContext(3, 4, 1, 2, torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: calls.update(backend=backend, **more))
    monkeypatch.setattr(dist, "rendezvous", lambda url, **more: iter([(url, 3, 4)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: (prefix, store))
    backend = types.SimpleNamespace(_set_default_timeout=lambda limit: calls.update(nccl=limit))
    world = types.SimpleNamespace(_get_backend=lambda device: backend)
    monkeypatch.setattr(dist, "group", types.SimpleNamespace(WORLD=world))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.update(ended=True))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    launch._join_and_run(ctx, "env://", "nccl", lambda *given: calls.update(given=given), "args", "inputs", {})
    limits = [calls.pop(name).total_seconds() for name in ("timeout", "nccl")]
    assert limits == [launch.COLLECTIVE_SECONDS, 2 * launch.COLLECTIVE_SECONDS] and calls.pop("ended")
    assert calls.pop("store") == ("attempt 2", "env://")  # which may hold keys of the attempts before
    assert calls == {
        "device": ctx.device, "backend": "cpu:gloo,cuda:nccl", "world_size": 4, "rank": 3,
        "given": (ctx, "args", "inputs"),
    }  # fmt: skip


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RunError, match=f"rank 0 of 2 could not join the others at {url} .*a free port of it"):
            launch._meet(DistContext(0, 2), url)


def compared(monkeypatch, *ranks):
    """The message of check_agreement for ranks with these values, '' if they agree."""
    everyone = [(f"n{rank}", {name: str(value) for name, value in own.items()}) for rank, own in enumerate(ranks)]
    monkeypatch.setattr(distributed, "gather_lists", lambda items: everyone)
    try:
        launch.check_agreement(ranks[0])
    except UsageError as error:
        return str(error)
    return ""


def test_equal_ranks_agree_and_a_difference_names_values_ranks_and_hosts(monkeypatch):
    one, other = {"--alpha": 2, "--lr": 0.03}, {"--alpha": 2, "--lr": 0.06}
    assert compared(monkeypatch, one, one, one) == ""
    assert "--lr is 0.03 on rank 0 (n0), but 0.06 on rank 2 (n2); start all" in compared(monkeypatch, one, one, other)
    long = [f"n{number:08}" for number in range(1000)]
    message = compared(monkeypatch, {"the class list": long}, {"the class list": [*long[:-1], "other"]})
    assert "'n00000999'" in message and "'other'" in message and len(message) < 400


# GPUs


@pytest.mark.parametrize(
    "present, accelerator, named",
    [("nvidia0", None, "NVIDIA"), ("kfd", None, "AMD"), ("", "xpu", "xpu"), ("", "mps", "mps"), ("", None, "")],
)
def test_a_run_on_the_cpu_beside_gpus_says_so(monkeypatch, capsys, present, accelerator, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))
    monkeypatch.setattr(launch.Path, "glob", lambda self, pattern: [present] * fnmatch.fnmatch(present, pattern))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    launch.say_why_on_cpu()
    err = capsys.readouterr().err
    said = err.count(f"on the CPU, not on a GPU ({named})"), err.count("DEVICES is 7\n"), err.count("\n")
    assert said == 3 * (bool(named),)


@pytest.mark.parametrize("available, usable", [(False, 0), (True, 1)])  # a driver too old; 8 GPUs by NVML, one MIG part
def test_gpus_that_pytorch_cannot_use_are_refused(monkeypatch, available, usable):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: usable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with pytest.raises(UsageError, match=f"can use {usable} of the 8 GPUs .* CUDA_VISIBLE_DEVICES .* to use the CPU"):
        launch.usable_gpus()


WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of PyTorch 2.14 for CUDA 13


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (WHEEL, (7, 0), False), (WHEEL, (7, 5), True), (WHEEL, (8, 9), True), (WHEEL, (9, 0), True),
        (WHEEL, (10, 3), True), (WHEEL, (11, 0), False), (WHEEL, (12, 1), True), (WHEEL, (13, 0), False),
        ([*WHEEL, "compute_120"], (13, 0), True), (["sm_90", "compute_90"], (8, 6), False), (["gfx90a"], (9, 0), True),
    ],
)  # fmt: skip
def test_kernels_of_an_architecture_run_on_later_gpus_of_its_generation(archs, capability, runs):
    assert launch.has_kernels(archs, capability) == runs


def test_a_gpu_without_kernels_is_refused_with_the_wheel_that_has_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: WHEEL)
    launch.check_devices([torch.device("cpu")], "bf16")
    with pytest.raises(UsageError, match="Tesla V100 is sm_70, .* has kernels for sm_75 sm_80 .*; .* install .*/cu126"):
        launch.check_devices([torch.device("cuda", 0)], "fp32")


def test_a_precision_that_a_gpu_is_too_old_for_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((8, 0), (7, 5))[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: WHEEL)
    good, old, cpu = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    with pytest.raises(UsageError, match="--precision bf16: Card 1"):
        launch.check_devices([good, old], "bf16")
    launch.check_devices([good, cpu], "bf16")
    launch.check_devices([old], "fp16")
