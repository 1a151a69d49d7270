"""Small inputs, and ways to run the scripts, that several test files share."""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image

from moco import augment
from moco.distributed import DistContext
from moco.encoders import configure_device
from moco.processes import launch
from moco.training import files

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # of the scripts
PRETRAIN, PROBE, EVALUATE = "moco-non-sem-neg.py", "main_lincls.py", "eval_robustness.py"
SMALL = shlex.split("-a resnet10 --image-size 32 --patch-ratio 4 12 --batch-size 8 --moco-k 64 -j 1 --seed 1")
SMALL_PROBE = shlex.split("-a resnet10 --image-size 32 --batch-size 8 -j 1 --seed 1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
FAULTS = "tests/faults/inject.py"
TORCHRUN_RANK = {  # what torchrun sets for the only rank of a run
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_PORT": "29500",
}
TIMINGS = {"images_per_s", "data_share"}


# Data


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
    """A smooth random RGB picture: low frequencies, so that its crops and resizes are not uniform gray noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {} if path.suffix == ".png" else {"format": "JPEG"}
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(path, **options)


def write_folder(root, classes=("n01", "n02"), train=8, val=3, suffix=".JPEG"):
    """A data set with `train` and `val` photos of each class."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            for i in range(count):
                seed = 1000 * label + 10 * i + (split == "val")
                write_photo(root / split / name / f"{name}_{i}{suffix}", seed=seed)
    return root


def unit(*shape, seed=0):
    """Random vectors of unit length."""
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def paint(path, decision, size=32):
    """A picture that GrayLevels classifies as `decision`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (20 * decision,) * 3).save(path)


class GrayLevels(torch.nn.Module):
    """Classifies an image by its gray level: 20 * c is class c, and class c + 1 is its second choice."""

    def __init__(self, outputs=4):
        super().__init__()
        self.outputs, self.fc = outputs, torch.nn.Linear(1, outputs)  # which is not used

    def forward(self, images):
        level = (augment.denormalize(images).mean(dim=(1, 2, 3)) * 255 / 20).round().long()
        first = F.one_hot(level, self.outputs + 1)[:, : self.outputs]
        return first + 0.5 * F.one_hot((level + 1) % self.outputs, self.outputs)


# Results


def log(folder):
    """The lines of log.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Scripts


def run_script(*arguments, launcher=(), env=None, check=True, timeout=300):
    """Run a script of the repository as a user would; its CompletedProcess, with stdout and stderr as text.

    Without a launcher it is forked from a process that has already imported PyTorch, which saves three seconds.
    """
    command, env = [sys.executable, *launcher, *map(str, arguments)], env or {}
    if launcher:
        settings = {"cwd": REPOSITORY, "env": {**ENVIRONMENT, **env}, "text": True, "timeout": timeout}
        result = subprocess.run(command, capture_output=True, **settings)
    else:
        with tempfile.TemporaryDirectory() as folder:
            process = FORKSERVER.Process(target=_script, args=(folder, command[1:], env))
            process.start()
            process.join(timeout)
            assert process.exitcode is not None, f"{command} takes more than {timeout} s"
            outputs = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
            result = subprocess.CompletedProcess(command, process.exitcode, *outputs)
    if check and result.returncode:
        raise AssertionError(f"{command} exited with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def _script(folder, arguments, env):
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    multiprocessing.set_start_method(None, force=True)  # a forked process would inherit "forkserver", for workers too
    os.chdir(REPOSITORY)
    os.environ.update(env)
    sys.path[0] = str(REPOSITORY)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


os.environ["OMP_NUM_THREADS"] = "1"  # the fork server reads it when it starts
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([*launch.PRELOADED, "moco.evaluation.scores", "moco.training.run"])


def refused(script, *arguments):
    """The one line on stderr of a script that refuses its arguments, run in this process: it must build nothing."""
    stdout, stderr, locks = io.StringIO(), io.StringIO(), {}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(files, "_held", locks)
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    for descriptor in locks.values():  # the process that ends here would free them
        os.close(descriptor)
    message = stderr.getvalue()
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith(script + ": error: "), message
    assert stdout.getvalue() == ""
    return message


# Processes that tests watch, stop and kill


def started(script, *arguments, launcher=(), **settings):
    """A running script in a session of its own; it and all that come from it carry a token in their environment."""
    token = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, *launcher, script, *map(str, arguments)], cwd=REPOSITORY, text=True, start_new_session=True,
        env={**ENVIRONMENT, **settings.pop("env", {}), "STARTED_BY_TEST": token},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings,
    )  # fmt: skip
    process.token = token.encode()
    return process


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed: {process.stderr.read()}")


def alive(process):
    """The ids of the process, and of all that came from it in whatever session, that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if process.token in (folder / "environ").read_bytes():  # empty, once it is a zombie
                found.append(int(folder.name))
    return found


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(process, timeout=120):
    """(exit code, stdout, stderr) of a process, which must leave none of its own behind."""
    out, err = process.communicate(timeout=timeout)
    deadline = time.monotonic() + 30
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process), "it left processes behind"
    return process.returncode, out, err


def assert_one_line(result, *expected):
    """The script ended with 1 and one line on stderr, which holds the expected texts. result: as of run_script."""
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert all(text in result.stderr for text in expected), result.stderr


def completed(process, timeout=120):
    """The outcome of `ended`, in the form of run_script's result."""
    return subprocess.CompletedProcess(process.args, *ended(process, timeout))


# Ranks


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world, folder, *functions, kind="cpu"):
    """{name of function: [what function(ctx) returned on each rank]}, in one group of `world` processes.

    They run in the folder, on GPUs if the kind of device is "cuda": each rank on its own if there are as many (over
    NCCL, which refuses two ranks on one), else all on the first ones.
    """
    arguments = (world, free_port(), str(folder), functions, kind)
    mp.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")
    ranks = [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
    return {function.__name__: [rank[function.__name__] for rank in ranks] for function in functions}


def _rank(rank, world, port, folder, functions, kind):
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    configure_device(device, strict_fp32=True, deterministic=True)
    ctx = DistContext(rank, world, rank, world, device)
    backend = "nccl" if gpus >= world else "gloo"
    launch._join_and_run(ctx, f"tcp://127.0.0.1:{port}", backend, _save_results, functions, folder, {})


def _save_results(ctx, functions, folder):
    os.chdir(folder)
    torch.save({function.__name__: function(ctx) for function in functions}, f"{ctx.rank}.pt")
