"""Tiers and fixtures."""

import signal

import pytest
import torch
from helpers import write_folder

for signum in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(signum) is signal.SIG_IGN:  # as in the background, or under nohup: the scripts would inherit it
        signal.signal(signum, lambda signum, frame: None)  # not a handler that is inherited
torch.set_num_threads(1)  # the same rounding everywhere, and no spinning on busy cores


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run the slow tests: kill loops, fuzzing, launch matrices"
    )


def pytest_collection_modifyitems(config, items):
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
def data(tmp_path):
    """A data set of two classes, 8 training and 3 validation photos each."""
    return write_folder(tmp_path / "data")


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory):
    """As `data`, for tests that do not change it."""
    return write_folder(tmp_path_factory.mktemp("shared") / "data")
