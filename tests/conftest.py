"""Tiers and fixtures."""

import os
import signal

import pytest
import torch
from helpers import TORCHRUN_RANK, write_folder
from preprocessing import write_imagenet

from moco.processes.signals import STOP_SIGNALS

for signum in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(signum) is signal.SIG_IGN:  # as in the background, or under nohup: the scripts would inherit it
        signal.signal(signum, lambda signum, frame: None)  # not a handler that is inherited
torch.set_num_threads(1)  # the same rounding everywhere, and no spinning on busy cores


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run the slow tests: kill loops, fuzzing, launch matrices"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if config.option.markexpr == "gpu":
        config.option.numprocesses = 0  # one test at a time on a GPU: they look at its memory


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu"):
            if "gpu" not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason="gpu: run with -m gpu"))
            elif not torch.cuda.is_available() and os.environ.get("ACCEPTANCE_DEVICE") != "cpu":
                item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU (on the CPU: ACCEPTANCE_DEVICE=cpu)"))
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Defaults such as ./ckpts/moco must not be those of the repository, where there may be runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_launcher(monkeypatch):
    """Start by hand: without the variables of torchrun, srun, operators and MPI."""
    names = {*TORCHRUN_RANK, "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT"}
    for name in list(os.environ):
        if name in names or name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_")):
            monkeypatch.delenv(name)


@pytest.fixture
def under(no_launcher, monkeypatch):
    """Sets variables of a launcher."""
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.fixture
def handlers():
    """Handlers of signals that a test sets are taken back."""
    before = {signum: signal.getsignal(signum) for signum in (*STOP_SIGNALS, signal.SIGCHLD)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def data(tmp_path):
    """A data set of two classes, 8 training and 3 validation photos each."""
    return write_folder(tmp_path / "data")


@pytest.fixture
def imagenet(tmp_path):
    """Two classes of three photos in subfolders, with files among them that are no photos."""
    return write_imagenet(tmp_path / "imagenet")


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory):
    """The folder of `data`, for tests that do not change it."""
    return write_folder(tmp_path_factory.mktemp("shared") / "data")
