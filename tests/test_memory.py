import re
from pathlib import Path

import pytest
import torch
from helpers import FORKSERVER

from moco import memory
from moco.builder import MoCo
from moco.encoders import build_encoder
from moco.errors import UsageError


def build(arch="resnet10", dim=8, K=100):
    return MoCo(lambda num_classes: build_encoder(arch, num_classes), dim=dim, K=K)


def parts(batch=4, size=32, itemsize=4, **model):
    with torch.device("meta"):
        return memory.estimate(build(**model), torch.empty(batch, 3, size, size), 3, itemsize)


def test_the_estimate_counts_what_backward_needs():
    one = parts()
    weights = 4 * sum(weight.numel() for weight in build().encoder_q.parameters())
    assert one["weights, gradients, momenta, key encoder"] == 4 * weights
    assert one["queue"] == 2 * 4 * 8 * 100
    # The first convolution's output and the pooled one's input are 16×16×32 floats an image; there are more.
    assert one["activations"] > 4 * 2 * 4 * 32 * 16 * 16
    assert parts(batch=8)["activations"] == pytest.approx(2 * one["activations"], rel=0.05)
    assert parts(itemsize=2)["activations"] == one["activations"] // 2
    assert parts(size=64)["activations"] == pytest.approx(4 * one["activations"], rel=0.1)


def check(build, batch, size):
    return memory.check_memory(memory.required(build, "some", batch, size, 3, 4), torch.device("cpu"), processes=1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"K": 10**10}, "queue 640 GB"),
        ({"K": 2**31, "dim": 2**31}, "cannot be built"),
        ({"size": 1, "batch": 1}, "1 images of 1 px"),
        ({"arch": "resnet18", "size": 32, "batch": 1}, "1 images of 32 px"),
        ({"size": 10**6}, "would need"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    size, batch = settings.pop("size", 32), settings.pop("batch", 4)
    with pytest.raises(UsageError, match=message):
        check(lambda: build(**settings), batch, size)


def test_what_fits_is_a_short_line():
    message = check(build, 4, 32)
    assert re.fullmatch(r"\S+ GB of \S+ GB per process, estimated", message)


def resident():
    """Memory of this process, MB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024


def send_what_stays(connection, keep):
    if keep:
        memory.keep_freed_memory(torch.device("cpu"))
    before = resident()
    x = torch.ones(100 * 2**18)
    del x
    connection.send(resident() - before)


@pytest.mark.skipif(not hasattr(memory.ctypes.CDLL(None), "mallopt"), reason="for glibc only")
def test_a_cpu_process_keeps_freed_memory():
    stays = {}
    for keep in (True, False):
        here, there = FORKSERVER.Pipe()
        process = FORKSERVER.Process(target=send_what_stays, args=(there, keep))
        process.start()
        stays[keep] = here.recv()
        process.join()
    assert stays[True] > 90 > 10 > stays[False]  # MB, of 100 allocated and freed
