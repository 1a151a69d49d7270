"""The device of the acceptance run: a GPU, or the CPU where ACCEPTANCE_DEVICE=cpu asks for that."""

import os

import pytest
import torch
from helpers import write_photo

from moco.encoders import configure_device

FORCED_CPU = os.environ.get("ACCEPTANCE_DEVICE") == "cpu"
SIZES = {  # of the scripts' runs; a CPU cannot do the real ones within minutes
    "cuda": ["-a", "resnet50", "--image-size", 224, "--batch-size", 32, "--moco-k", 4096, "-j", 8],
    "cpu": ["-a", "resnet10", "--image-size", 32, "--patch-ratio", 4, 12, "--batch-size", 16, "--moco-k", 64, "-j", 1],
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and item.get_closest_marker("cuda_only") and FORCED_CPU:
            item.add_marker(pytest.mark.skip(reason="needs CUDA itself"))


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu") if FORCED_CPU else torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _strict_fp32(device):
    """Full fp32 and deterministic algorithms; afterwards as before."""
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    configure_device(device, strict_fp32=True, deterministic=True)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A data set of two classes: 128 training and 16 validation JPEGs at ImageNet's usual size."""
    root = tmp_path_factory.mktemp("photos") / "data"
    for split, count in (("train", 64), ("val", 8)):
        for label in range(2):
            for i in range(count):
                path = root / split / f"n{label}" / f"{i}.JPEG"
                write_photo(path, (500, 375), seed=1000 * label + 2 * i + (split == "val"))
    return root


@pytest.fixture(scope="session")
def sizes(device):
    return SIZES[device.type]


@pytest.fixture(scope="session")
def environment(device):
    return {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
