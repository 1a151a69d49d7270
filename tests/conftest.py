"""Small real inputs that several test files share."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
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
    """Run a script of the repository as a user would; its CompletedProcess, with stdout and stderr as text.

    Without a launcher it is forked from a process that has imported PyTorch already, which saves three seconds each time.
    """
    command = [sys.executable, *launcher, *map(str, arguments)]
    if launcher:
        result = subprocess.run(command, cwd=REPOSITORY, env={**ENVIRONMENT, **(env or {})}, capture_output=True, text=True,
                                timeout=timeout)
    else:
        with tempfile.TemporaryDirectory() as folder:
            process = FORKS.Process(target=_script, args=(folder, command[1:], env or {}))
            process.start()
            process.join(timeout)
            assert process.exitcode is not None, f"{command} takes more than {timeout} s"
            result = subprocess.CompletedProcess(command, process.exitcode, *(Path(folder, name).read_text() for name in "oe"))
    if check and result.returncode:
        raise AssertionError(f"{command} exited with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def _script(folder, arguments, env):
    for name, descriptor in (("o", 1), ("e", 2)):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(REPOSITORY)
    os.environ.update(env)
    sys.path[0] = str(REPOSITORY)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


os.environ["OMP_NUM_THREADS"] = "1"                                   # which the forks' parent reads when it starts
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "torch.optim.swa_utils", "moco.launch", "moco.robustness", "moco.knn"])

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
