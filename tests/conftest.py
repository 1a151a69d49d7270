"""Small real inputs that several test files share."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the same rounding everywhere, and no spinning where cores are busy
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # of the scripts, too


def fill(name, shape):
    """Numbers that are a function of a name, so that a golden file need not hold them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def fill_encoder(encoder):
    """Weights that are a function of their names: the rule of tests/data/moco_reference.json."""
    for name, value in encoder.state_dict().items():
        if "running_var" in name:
            value.fill_(1)
        elif "running_mean" in name:
            value.zero_()
        elif value.dim() == 1:
            value.fill_(1 if name.endswith("weight") else 0)
        elif value.dim() > 1:
            value.copy_(fill(name, value.shape) * (2 / value[0].numel()) ** 0.5)


def write_photo(path, size=(80, 64), seed=0):
    """A smooth random RGB picture: low frequencies, so that crops and resizes of it are not all gray noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(path, **({} if path.suffix == ".png" else {"format": "JPEG"}))


def write_folder(root, classes=("n01", "n02"), train=8, val=3, suffix=".JPEG"):
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            for i in range(count):
                write_photo(root / split / name / f"{name}_{i}{suffix}", seed=1000 * label + 10 * i + (split == "val"))
    return root


@pytest.fixture
def data(tmp_path):
    """A data set of two classes, 8 training and 3 validation photos each."""
    return write_folder(tmp_path / "data")


def run_script(*arguments, launcher=(), env=None, check=True, timeout=300):
    """Run a script of the repository as a user would; its CompletedProcess, with stdout and stderr as text."""
    environment = {**ENVIRONMENT, **(env or {})}
    command = [sys.executable, *launcher, *map(str, arguments)]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout)
    if check and result.returncode:
        raise AssertionError(f"{command} exited with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
