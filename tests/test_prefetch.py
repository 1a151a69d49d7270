"""Prefetching on a simulated GPU: streams, and what runs on which; and none of it elsewhere."""

import contextlib

import pytest
import torch

from moco.data import loader
from moco.processes import launch


class Stream:
    made = 0

    def __init__(self, device):
        Stream.made += 1
        self.device, self.waited = device, 0

    def wait_stream(self, other):
        self.waited += 1


class Prepared:
    """A tensor that notes which streams use it."""

    def __init__(self, stream):
        self.made_on, self.used_on = stream, []

    def record_stream(self, stream):
        self.used_on.append(stream)


@pytest.fixture
def gpu(monkeypatch):
    """{what happens: on which stream}"""
    current = {"stream": "training"}

    @contextlib.contextmanager
    def on(stream):
        before, current["stream"] = current["stream"], stream
        yield
        current["stream"] = before

    training = Stream("cuda")
    Stream.made = 0
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    loader._side_stream.cache_clear()
    yield current, training
    loader._side_stream.cache_clear()


def test_all_epochs_share_one_side_stream_per_device(gpu):
    current, training = gpu
    for device in (torch.device("cuda", 0), torch.device("cuda", 0), torch.device("cuda", 1)):
        for _ in range(3):
            batches = loader.prefetch([("a", []), ("b", [])], lambda *_: [Prepared(current["stream"])], device)
            for (tensor,), _ in batches:
                assert tensor.made_on is loader._side_stream(device) and tensor.used_on == [training]
                assert current["stream"] == "training"  # while the step runs
    assert Stream.made == 2 and training.waited == 18  # before each step


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_without_cuda_no_stream_is_touched(monkeypatch, device):
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, None)
    batches = loader.prefetch([("a", [])], lambda batch, step: (batch, step), torch.device(device))
    assert list(batches) == [(("a", 0), [])]


def test_the_gpu_of_a_single_process_becomes_the_current_one(monkeypatch):
    """Else it would have a context on GPU 0, too."""
    chosen = []
    monkeypatch.setattr(launch, "usable_gpus", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ctx = launch.launch(lambda ctx: ctx, (), gpu=3)
    assert ctx.device == torch.device("cuda", 3) and chosen == [ctx.device]
