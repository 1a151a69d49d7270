"""Ranks that were started with different options, data or checkpoints: one line on each node, before training."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, PRETRAIN, PROBE, REPOSITORY, SMALL, SMALL_PROBE, run_script, write_photo

from moco import distributed
from moco.data.folders import LabelList, PathList
from moco.errors import UsageError
from moco.processes import launch


@pytest.fixture
def compared(monkeypatch):
    """check_agreement of two ranks, given the facts of each; returns the message of the first."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def run(*ranks):
        sent = []
        monkeypatch.setattr(distributed, "gather_lists", lambda items: sent.extend(items) or items)
        for rank in ranks:
            launch.check_agreement(*rank)
        monkeypatch.setattr(distributed, "gather_lists", lambda items: sent)
        try:
            launch.check_agreement(*ranks[0])
        except UsageError as error:
            return str(error)
        return ""

    return run


def facts(**values):
    return {}, {name: lambda value=value: value for name, value in values.items()}


def test_equal_ranks_agree(compared):
    same = {"--lr": 0.03}, {"the training set": lambda: "7 files (ab)"}
    assert compared(same, same) == ""


def test_a_difference_is_named_with_values_ranks_and_hosts(compared, monkeypatch):
    monkeypatch.setattr(launch.socket, "gethostname", lambda: "n1")
    message = compared(({"--lr": 0.03, "--alpha": 2}, {}), ({"--lr": 0.06, "--alpha": 2}, {}))
    assert "--lr is 0.03 on rank 0 (n1), but 0.06 on rank 1 (n1);" in message and "alpha" not in message


def test_several_differences_are_all_named(compared):
    message = compared(facts(images="7", epoch="3"), facts(images="8", epoch="4"))
    assert "images is 7" in message and "epoch is 3" in message


def test_another_version_of_the_code_is_a_difference(compared, monkeypatch):
    versions = itertools.cycle("ab")
    monkeypatch.setattr(launch, "code_version", lambda: next(versions))
    assert "the code is version a on rank 0" in compared(facts(), facts())


def test_facts_of_a_single_process_are_not_computed():
    launch.check_agreement({}, {"never": lambda: 1 / 0})


def test_what_may_differ_between_nodes_is_not_compared():
    args = SimpleNamespace(data="/a", rank=1, dist_url="tcp://a:1", workers=3, sets=["A=/a"], lr=0.1, moco_k=8)
    assert launch.shared_options(args) == {"--lr": 0.1, "--moco-k": 8}


@pytest.mark.parametrize(
    "one, other",
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long)),
        ({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0 + 1e-7)}),
        ({"a": 1}, {"b": 1}),
        ([1, [2]], [[1], 2]),
        (["a", "b"], ["b", "a"]),
        (PathList.of("/x/", ["a", "b"]), PathList.of("/x/", ["a", "c"])),
        (LabelList([0, 1]), LabelList([1, 0])),
    ],
)
def test_digests_of_different_values_differ(one, other):
    assert launch.digest(one) != launch.digest(other) and launch.digest(one) == launch.digest(one)


def test_digests_do_not_depend_on_the_folder_or_the_layout():
    names = ["n01/a.png", "n01/\udcff.png"]
    assert launch.digest(PathList.of("/x/", names)) == launch.digest(PathList.of("/scratch/", names))
    weights = torch.from_numpy(np.arange(48.0).reshape(2, 3, 2, 4))
    assert launch.digest(weights) == launch.digest(weights.to(memory_format=torch.channels_last))
    assert launch.digest(torch.ones(3, dtype=torch.bfloat16)) and launch.digest(torch.zeros(0))


# Real runs


def start_two(script, *options):
    """(exit code, stderr) of two processes of one run, the i-th with options[i]."""
    port = launch.free_port()
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, REPOSITORY / script, *map(str, own)],
            env={**ENVIRONMENT, **variables, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank, own in enumerate(options)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        (["--lr", 0.06], "--lr is 0.03 on rank 0"),
        (["-b", 4], "the batch of a process is 8 on rank 0"),
        (["--precision", "bf16"], "--precision is fp32 on rank 0"),
        (["--seed", 2], "--seed is 1 on rank 0"),
    ],
)
def test_ranks_with_other_options_are_refused(shared_data, tmp_path, change, message):
    options = [*SMALL, "--ckpt_path", tmp_path, shared_data]
    for code, error in start_two(PRETRAIN, options, [*options, *change]):
        assert code == 2 and message in error and error.count("\n") == 1, error
    assert not list(tmp_path.glob("*.pth.tar"))


@pytest.mark.slow
def test_ranks_with_other_files_or_checkpoints_are_refused(data, tmp_path):
    write_photo(data / "train" / "n01" / "more.png")
    (tmp_path / "other").symlink_to(data)
    options = [*SMALL, "--epochs", 2, "--ckpt_path", tmp_path / "run"]
    run_script(PRETRAIN, *options, "--epochs", 1, data)
    resumed, fresh = [*options, "--resume", "auto", data], [*options, "--ckpt_path", tmp_path / "new", data]
    for code, error in start_two(PRETRAIN, resumed, fresh):
        assert code == 2 and "the checkpoint of --resume is epoch 1, step 0" in error and "none on rank 1" in error
    probe = [*SMALL_PROBE, "--epochs", 1, "--ckpt_path", tmp_path / "probe", data]
    run_script(PRETRAIN, *options, "--epochs", 1, "--seed", 5, "--ckpt_path", tmp_path / "new", data)
    backbones = [["--pretrained", tmp_path / name / "checkpoint_0000.pth.tar", *probe] for name in ("run", "new")]
    for code, error in start_two(PROBE, *backbones):
        assert code == 2 and "the backbone is" in error, error
