"""A resumed run does not keep the checkpoint in memory: not the state that was read, nor the copy sent to each rank."""

import importlib.util
import inspect
import sys

import pytest
import torch
from helpers import PRETRAIN, PROBE, REPOSITORY, SMALL, SMALL_PROBE, run_script, write_folder

from moco.distributed import DistContext
from moco.processes import launch
from moco.training import checkpoint

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A data set, and the folder of a finished pre-training and probe on it."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_folder(folder / "data")
    run_script(PRETRAIN, *SMALL, "-j", 0, "--epochs", 1, "--ckpt_path", folder, data)
    linear = ("--pretrained", folder / "checkpoint_0000.pth.tar", "--ckpt_path", folder)
    run_script(PROBE, *SMALL_PROBE, "-j", 0, "--epochs", 1, *linear, data)
    return data, folder, linear


@pytest.mark.parametrize("script", [PRETRAIN, PROBE])
def test_what_was_read_is_dropped_before_the_training(finished, monkeypatch, script):
    data, folder, linear = finished
    settings = [*SMALL, "--ckpt_path", folder] if script == PRETRAIN else [*SMALL_PROBE, *linear]
    spec = importlib.util.spec_from_file_location("script", REPOSITORY / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = [script, *settings, "-j", 0, "--epochs", 2, "--resume", "auto", data]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    args = module.parse_args()
    inputs, derived = module.validate_args(args)
    assert inputs.saved["epoch"] == 1

    class Training(Exception):
        """It would start now."""

    def train(*_):
        raise Training

    monkeypatch.setattr(module, "train_one_epoch", train)
    monkeypatch.setattr(module, "configure_cudnn", lambda *_, **__: None)
    with pytest.raises(Training):
        module.main_worker(DistContext(), args, inputs, derived)
    assert not inputs.saved and not getattr(inputs, "backbone", {})


def size_of_job(ctx, path, tensor):
    """How many bytes of its job, of which the tensor is most, a rank still has once it runs."""
    held = [value for frame in inspect.stack() for value in frame.frame.f_locals.values()]
    longest = max(len(value) for value in [b"", *held] if isinstance(value, (bytes, bytearray)))
    torch.save({"bytes": longest, "numbers": tensor.numel()}, path)


def test_a_rank_drops_the_copy_that_was_sent_to_it(tmp_path):
    launch.launch(size_of_job, (tmp_path / "sizes.pt", torch.zeros(10**6)), multiprocessing=True)
    found = torch.load(tmp_path / "sizes.pt")
    assert found["bytes"] < 10**5 and found["numbers"] == 10**6


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_hold_cpu_tensors(tmp_path, monkeypatch, nested):
    """Wherever the training ran, so that torch.load works without options on a machine without a GPU."""
    saved = []
    monkeypatch.setattr(torch, "save", lambda state, file: saved.append(state))
    layer = torch.nn.Conv2d(2, 2, 3, device="meta").to(memory_format=torch.channels_last)

    class OnGpu(torch.Tensor):
        """A tensor that says when it is asked for its CPU copy."""

        def cpu(self):
            return torch.zeros(layer.weight.shape).to(memory_format=torch.channels_last)

    tensor = layer.weight.detach().as_subclass(OnGpu)
    state = {"optimizer": {"state": {0: {"momentum_buffer": tensor}}, "param_groups": [{"lr": 0.1, "params": (0,)}]}}
    checkpoint.save(tmp_path / "file.pth.tar", state if nested else {"weight": tensor, "epoch": 3})
    (written,) = saved
    found = written["optimizer"]["state"][0]["momentum_buffer"] if nested else written["weight"]
    assert found.device.type == "cpu" and found.stride() == layer.weight.stride()
    assert written["optimizer"]["param_groups"] == [{"lr": 0.1, "params": (0,)}] if nested else written["epoch"] == 3
