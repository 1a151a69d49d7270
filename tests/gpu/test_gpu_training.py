"""Training on the GPU: its memory, its syncs, several ranks, and runs of the script that are stopped and resumed."""

import contextlib
import itertools
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import (
    EVALUATE,
    PRETRAIN,
    PROBE,
    TORCHRUN,
    completed,
    log,
    run_ranks,
    run_script,
    same,
    started,
    wait_for,
    weights,
)
from oracle import GOLDEN, golden_model, golden_steps

from moco import augment, distributed
from moco.builder import MoCo
from moco.data import loader
from moco.distributed import DistContext
from moco.encoders import build_encoder
from moco.errors import PeerError
from moco.processes.exits import translate_error
from moco.training import metrics
from moco.views import training_views

pytestmark = pytest.mark.gpu
SPAWN = ("--multiprocessing-distributed", "--world-size", 1, "--rank", 0)
METHOD = ("--mlp", "--aug-plus", "--moco-t", 0.2, "--alpha", 2)


class Training:
    """A model, and the script's loop over synthetic crops in pinned memory."""

    def __init__(self, device, arch="resnet18", batch_size=16, size=64, K=4096):
        self.device, self.batch_size, self.size = device, batch_size, size
        torch.manual_seed(0)
        self.model = MoCo(lambda num_classes: build_encoder(arch, num_classes), K=K, T=0.2, mlp=True, alpha=2.0)
        self.model.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.03, 0.9, weight_decay=1e-4, fused=True)
        self.means = metrics.RunningMeans()

    def epoch(self, steps):
        shape = (self.batch_size, 2, 3, self.size, self.size)
        crops = torch.randint(256, shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        options = {"recipe": augment.V2, "robust": "patch", "num_nonsem": 1, "patch_ratio": (8, 20)}

        def prepare(batch, step):
            batch = batch.to(self.device, non_blocking=True)
            return training_views(batch, np.random.default_rng(step), **options)

        for views, _ in loader.prefetch(itertools.repeat((crops, []), steps), prepare, self.device):
            logits, labels = self.model(*views)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.means.add({"loss": loss, **self.model.similarities})


@contextlib.contextmanager
def syncs_refused(device):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_steps_never_sync(device):
    training = Training(device)
    training.epoch(steps=2)  # cuDNN chooses its algorithms
    with syncs_refused(device):
        training.epoch(steps=3)
    assert training.means.compute()["loss"] > 0


@pytest.mark.cuda_only
def test_a_sync_would_be_refused(device):
    with pytest.raises(RuntimeError, match="synchroniz"), syncs_refused(device):
        torch.ones(3, device=device).sum().item()


@pytest.mark.cuda_only
def test_reserved_memory_is_flat_from_the_second_epoch_on(device):
    training, reserved = Training(device, batch_size=64, size=224), []
    for _ in range(6):
        training.epoch(steps=4)
        torch.cuda.synchronize(device)
        reserved.append(torch.cuda.memory_reserved(device))
    print(f"reserved after each epoch, MB: {[round(size / 1e6) for size in reserved]}")
    assert max(reserved[1:]) <= 1.1 * min(reserved[1:])


# Two ranks: each on its own GPU if there are two, else both on one

CASE = {**GOLDEN[0]["case"], "arch": "resnet10", "K": 20, "size": 32, "steps": 3}


def steps(ctx, training=False):
    """Weights, queue and losses after three steps of a global batch of 8."""
    model = golden_model(CASE).train(training).to(ctx.device, memory_format=torch.channels_last)
    distributed.seed_shuffles(0)
    losses = golden_steps(CASE | {"batch": 8 // ctx.world_size}, model, ctx=ctx)["loss"]
    weights = torch.cat([weight.detach().flatten() for weight in model.encoder_q.parameters()]).cpu()
    return {"losses": torch.tensor(losses), "queue": model.queue.cpu(), "weights": weights}


def steps_in_train_mode(ctx):
    return steps(ctx, training=True)


def shuffled(ctx):
    rows = torch.arange(ctx.rank * 6, ctx.rank * 6 + 6, device=ctx.device).float().view(6, 1)
    order = distributed.draw_shuffle(len(rows))
    some = distributed.exchange_rows(rows, order)
    return {"rows": rows.cpu(), "shuffled": some.cpu(), "back": distributed.exchange_rows(some, order.argsort()).cpu()}


@pytest.fixture(scope="module")
def ranks(device, tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), steps, steps_in_train_mode, shuffled, kind=device.type)


def test_unshuffle_undoes_shuffle(ranks):
    everything = torch.cat([rank["shuffled"] for rank in ranks["shuffled"]])
    assert everything.sort(dim=0).values.flatten().tolist() == list(range(12))
    for rank in ranks["shuffled"]:
        assert torch.equal(rank["back"], rank["rows"]) and not torch.equal(rank["shuffled"], rank["rows"])


def test_two_ranks_equal_one(device, ranks):
    """With BatchNorm in eval mode, where sharing a batch must not matter."""
    alone, two = steps(DistContext(device=device)), ranks["steps"]
    torch.testing.assert_close((two[0]["losses"] + two[1]["losses"]) / 2, alone["losses"], atol=1e-6, rtol=0)
    for rank in two:
        torch.testing.assert_close(rank["queue"], alone["queue"], atol=1e-6, rtol=0)
        torch.testing.assert_close(rank["weights"], alone["weights"], atol=1e-6, rtol=1e-6)


def test_two_ranks_keep_equal_weights(ranks):
    one, other = ranks["steps_in_train_mode"]
    assert torch.equal(one["weights"], other["weights"]) and torch.equal(one["queue"], other["queue"])


def killed(ctx):
    """Rank 1 is killed after some steps; rank 0 writes when it has noticed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from the parent, which notices, too
    try:
        for step in range(1000):
            steps(ctx)
            distributed.all_reduce_max(0)  # the heartbeat of Run.after_step
            if ctx.rank == 1 and step == 1:
                Path("killed").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
    except RuntimeError as error:
        if isinstance(translate_error(error), PeerError):
            Path("noticed").write_text(str(time.time()))
        raise


def test_a_killed_rank_is_noticed_within_30_s(device, tmp_path):
    with pytest.raises(mp.ProcessExitedException):
        run_ranks(2, tmp_path, killed, kind=device.type)
    deadline = time.monotonic() + 30
    while not (tmp_path / "noticed").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert float((tmp_path / "noticed").read_text()) - float((tmp_path / "killed").read_text()) < 30


# The script, at ImageNet's sizes


def test_a_signal_saves_and_ends_the_run(photos, sizes, environment, tmp_path):
    options = [*sizes, *METHOD, "--print-freq", 1, "--epochs", 1000, "--ckpt_path", tmp_path, photos]
    process = started(PRETRAIN, *options, env=environment)
    wait_for(process, "epoch 1 ")
    process.send_signal(signal.SIGTERM)
    result = completed(process)
    assert result.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in result.stdout, result.stderr
    assert (tmp_path / "checkpoint_latest.pth.tar").exists()


LAUNCHES = {"alone": ((), ()), "torchrun": ((*TORCHRUN, "--nproc-per-node=1"), ()), "spawned": ((), SPAWN)}


def test_every_launcher_trains_alike_and_its_backbone_is_probed_and_tested(photos, sizes, environment, tmp_path):
    """Pre-training alone, under torchrun and with one process per GPU; then a probe in bf16, and the table."""
    states = []
    for name, (launcher, more) in LAUNCHES.items():
        options = [*sizes, *METHOD, "--seed", 1, "--epochs", 1, *more, "--ckpt_path", tmp_path / name, photos]
        run_script(PRETRAIN, *options, launcher=launcher, env=environment)
        states.append(weights(tmp_path / name / "checkpoint_0000.pth.tar"))
    assert same(states[0], states[1]) and same(states[0], states[2])
    folder, pretrained = tmp_path / "alone", tmp_path / "alone" / "checkpoint_0000.pth.tar"
    probe = ["--pretrained", pretrained, "--lr", 0.1, 1, "--epochs", 2, "-b", 16, "-j", 4, "--precision", "bf16"]
    run_script(PROBE, *probe, "--ckpt_path", folder, photos, env=environment)
    row, report = f"patch={folder / 'model_best_0000.pth.tar'}", tmp_path / "report.json"
    table = run_script(EVALUATE, "--pretrained", row, "--val", photos, "--json", report, "-j", 4, env=environment)
    assert "| patch |" in table.stdout and json.loads(report.read_text())["cells"]["val"]["n"] == 16


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_equals_an_uninterrupted_one(photos, sizes, environment, tmp_path, precision):
    def run(folder, epochs, *more):
        options = [*sizes, *METHOD, "--seed", 1, "--precision", precision, "--knn", "--epochs", epochs, *more]
        run_script(PRETRAIN, *options, "--ckpt_path", tmp_path / folder, photos, env=environment)

    run("whole", 2)
    run("parts", 1)
    run("parts", 2, "--resume", "auto")
    one, other = (tmp_path / folder / "checkpoint_0001.pth.tar" for folder in ("whole", "parts"))
    assert same(weights(one), weights(other))
    assert log(tmp_path / "whole")[-1] == log(tmp_path / "parts")[-1]
    assert all(value.device.type == "cpu" for value in torch.load(one)["state_dict"].values())
