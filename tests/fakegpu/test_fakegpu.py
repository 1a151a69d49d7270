"""The scripts on fake GPUs: memory, contexts, syncs and copies are those of real ones (README.md)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PRETRAIN, PROBE, completed, started, wait_for, write_folder

HERE = Path(__file__).resolve().parent
LIBRARIES = "libcudart.so.13 libcublas.so.13 libcublasLt.so.13 libcudnn.so.9 libnccl.so.2 libcuda.so.1"
NETWORK = ("-a", "resnet18", "--image-size", 32, "-j", 1, "--print-freq", 1000)
METHOD = ("--patch-ratio", 4, 12, "--moco-k", 64, "--mlp", "--aug-plus")
IMAGES, EPOCHS = 48, 12
RANKS = ("--multiprocessing-distributed", "-j", 0)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("gcc", "g++", "nm"))), reason="there is no C++ compiler to build the fake GPU with"
    ),
]


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """The folder of the fake libraries."""
    folder = tmp_path_factory.mktemp("fake")
    build = subprocess.run(
        [sys.executable, "-B", HERE / "build.py", folder], capture_output=True, text=True, timeout=120
    )
    if "not a torch for CUDA 13" in build.stderr:
        pytest.skip(build.stderr.strip())
    assert build.returncode == 0, build.stderr
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data set of 48 training and 8 validation images."""
    return write_folder(tmp_path_factory.mktemp("files") / "data", classes="abcd", train=IMAGES // 4, val=2)


class OnFakeGpus:
    """A run of a script on fake GPUs: `result` as of run_script, and `reports` of its processes."""

    def __init__(self, fake, folder, script, *options, gpus=1, gigabytes=80, code=0, during=lambda process: None):
        report = Path(folder, "report.jsonl")
        environment = {
            "LD_LIBRARY_PATH": f"{fake}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "LD_PRELOAD": LIBRARIES,
            "PYTHONPATH": str(HERE / "python"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCH_CUDNN_V8_API_DISABLED": "1",  # the older interface is the one that is faked
            "TRITON_LIBCUDA_PATH": str(fake),  # else Triton asks the machine for a driver
            "FAKEGPU_COUNT": str(gpus),
            "FAKEGPU_GB": str(gigabytes),
            "FAKEGPU_REPORT": str(report),
        }
        process = started(script, *options, env=environment)
        during(process)
        self.result = completed(process)
        assert self.result.returncode == code, self.result.stderr
        self.reports = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        report.unlink(missing_ok=True)

    @property
    def trained(self):
        """The report of the process that trained, or of rank 0."""
        return next(report for report in self.reports if report["reserved_gb_at_each_pass"])

    def contexts(self):
        return sorted(report["contexts"] for report in self.reports)

    def counts(self, kind):
        """{place: how often} of all processes."""
        found = {}
        for report in self.reports:
            for place in report["places"]:
                if place["kind"] == kind:
                    where = f"{place['what']} at {' < '.join(place['stack'][:3])}"
                    found[where] = found.get(where, 0) + place["count"]
            if kind == "sync":
                found["cudaFree"] = found.get("cudaFree", 0) + report["frees"]
        return found


def more_often(many, few, kind):
    """Counts that the further steps of the first run have added.

    DDP times its first ten steps and then every hundredth; how many of a probe's epochs are the best so far, and are
    saved, is chance where figures are whatever the memory held.
    """
    many, few = many.counts(kind), few.counts(kind)
    added = {
        place: count - few.get(place, 0)
        for place, count in many.items()
        if not re.search(r"(distributed|checkpoint)\.py", place)
    }
    return {place: count for place, count in added.items() if count > 0}


@pytest.fixture(scope="module")
def pretraining(fake, files, tmp_path_factory):
    """Runs of twelve epochs with 6 and with 12 steps each, and with kNN after each; the folder of the first."""
    folders = [tmp_path_factory.mktemp(f"batch{batch}") for batch in (8, 4)]
    runs = [
        OnFakeGpus(
            fake, folder, PRETRAIN, *NETWORK, *METHOD, "--batch-size", batch, "--epochs", EPOCHS, "--knn",
            "--knn-freq", 1, "--ckpt_path", folder, files,
        )
        for folder, batch in zip(folders, (8, 4))
    ]  # fmt: skip
    return *runs, folders[0]


@pytest.fixture(scope="module")
def probes(fake, files, pretraining, tmp_path_factory):
    """The probe of that pre-training, likewise."""
    *_, pretrained = pretraining
    folders = [tmp_path_factory.mktemp(f"probe{batch}") for batch in (8, 4)]
    return [
        OnFakeGpus(
            fake, folder, PROBE, *NETWORK, "--batch-size", batch, "--epochs", EPOCHS, "--lr", 1, 10, "--pretrained",
            pretrained / f"checkpoint_{EPOCHS - 1:04d}.pth.tar", "--ckpt_path", folder, files,
        )
        for folder, batch in zip(folders, (8, 4))
    ]  # fmt: skip


@pytest.mark.parametrize("kind, passes", [("pretraining", 3), ("probes", 2)])  # of loaders, per epoch
def test_memory_after_twelve_epochs_is_that_after_two(request, kind, passes):
    run = request.getfixturevalue(kind)[0].trained
    reserved = run["reserved_gb_at_each_pass"]
    assert len(reserved) == passes * EPOCHS
    assert 0 < sum(run["final_reserved_gb"].values()) == reserved[2 * passes]
    assert run["streams"] == 1


@pytest.mark.parametrize("kind", ["pretraining", "probes"])
def test_a_step_syncs_at_reports_only_and_copies_from_pinned_memory(request, kind):
    few, many, *_ = request.getfixturevalue(kind)
    assert len(few.counts("sync")) > 5  # reports, saving, evaluation: they are counted
    assert more_often(many, few, "sync") == {}
    pageable = sum(more_often(many, few, "h2d").values())
    assert pageable / (EPOCHS * (IMAGES // 4 - IMAGES // 8)) <= 2
    assert pageable == 0  # which is better than was asked for
    assert many.trained["h2d_pinned"] > few.trained["h2d_pinned"]


def test_an_eager_step_needs_no_c_compiler(pretraining, probes):
    assert [run.trained["run_time_kernels"] for run in (*pretraining[:2], *probes)] == [{}] * 4


def test_a_checkpoint_with_contiguous_momenta_is_resumed(fake, files, pretraining, tmp_path):
    *_, folder = pretraining
    saved = torch.load(folder / "checkpoint_latest.pth.tar")  # on the CPU, without map_location
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    assert not all(momentum.is_contiguous() for momentum in momenta)
    for state in saved["optimizer"]["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    torch.save(saved, tmp_path / "published.pth.tar")
    resume = ("--resume", tmp_path / "published.pth.tar", "--epochs", EPOCHS + 1, "--ckpt_path", tmp_path / "run")
    run = OnFakeGpus(fake, tmp_path, PRETRAIN, *NETWORK, *METHOD, "--batch-size", 8, *resume, files)
    assert f"starting at epoch {EPOCHS} " in run.result.stdout


def test_a_process_uses_its_own_gpu_only(fake, files, tmp_path):
    options = (*NETWORK, *METHOD, "--batch-size", 8, "--epochs", 1, "--ckpt_path")
    single = OnFakeGpus(fake, tmp_path, PRETRAIN, *options, tmp_path / "1", "--gpu", 1, files, gpus=2)
    assert single.contexts() == [[1]]


def test_two_ranks_use_their_own_gpus_and_sync_at_reports_only(fake, files, tmp_path):
    options = (*NETWORK, *METHOD, *RANKS, "--epochs", 2, "--knn", "--knn-freq", 1, "--ckpt_path")
    few, many = (
        OnFakeGpus(fake, tmp_path, PRETRAIN, *options, tmp_path / str(batch), "--batch-size", batch, files, gpus=2)
        for batch in (16, 8)
    )
    assert few.contexts() == many.contexts() == [[], [0], [1]]  # the first is the launcher
    assert more_often(many, few, "sync") == {}
    assert sum(more_often(many, few, "h2d").values()) == 0


def test_a_signal_to_two_ranks_saves(fake, files, tmp_path):
    def stop(process):
        wait_for(process, "epoch 1 ")
        process.send_signal(signal.SIGTERM)

    options = (*NETWORK, *METHOD, *RANKS, "--batch-size", 8, "--epochs", 400, "--ckpt_path", tmp_path, files)
    run = OnFakeGpus(fake, tmp_path, PRETRAIN, *options, gpus=2, code=128 + signal.SIGTERM, during=stop)
    assert "stopped by SIGTERM" in run.result.stdout and (tmp_path / "checkpoint_latest.pth.tar").exists()


def test_a_gpu_without_enough_memory_ends_the_run_with_what_helps(fake, files, tmp_path):
    options = (*NETWORK, *METHOD, "--batch-size", 8, "--epochs", 1, "--ckpt_path", tmp_path, files)
    run = OnFakeGpus(fake, tmp_path, PRETRAIN, *options, gigabytes=0.6, code=1)
    *of_pytorch, line = run.result.stderr.splitlines()
    assert line.startswith(f"{PRETRAIN}: error: out of memory (CUDA out of memory. ") and "use a smaller batch" in line
    assert all("CUDACachingAllocator" in warning for warning in of_pytorch)
