"""A real Slurm of two nodes on this machine: the files of docs/launching.md from submission to the table.

Slow, and skipped where there is no Slurm, or without root. It needs three minutes on two cores.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import (
    ENVIRONMENT,
    PRETRAIN,
    REPOSITORY,
    SMALL,
    SMALL_PROBE,
    TORCHRUN,
    log,
    run_script,
    same,
    weights,
    write_folder,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="no Slurm, or not root",
    ),
]
LATEST = "checkpoint_latest.pth.tar"
EPOCHS = 60


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A function that runs one of Slurm's commands, in the folder of the repository."""
    lock = open(Path(tempfile.gettempdir()) / "slurm-of-tests.lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)  # all nodes are this machine: one process of the tests at a time
    folder = tmp_path_factory.mktemp("slurm")
    scripts = REPOSITORY / "tests" / "slurm"
    conf = subprocess.run(["bash", scripts / "start.sh", folder], capture_output=True, text=True, timeout=120)
    assert conf.returncode == 0, conf.stderr
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Both nodes are this machine, which no name server knows as n1.
    env = {**ENVIRONMENT, "SLURM_CONF": conf.stdout.strip(), "PATH": path, "MASTER_ADDR": "127.0.0.1"}

    def run(*command, check=True, **variables):
        settings = {"cwd": REPOSITORY, "env": {**env, **variables}, "text": True, "timeout": 300}
        done = subprocess.run(list(map(str, command)), capture_output=True, **settings)
        assert done.returncode == 0 or not check, done.stderr
        return done

    yield run
    subprocess.run(["bash", scripts / "stop.sh", folder], timeout=120)
    lock.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("slurm-data") / "data", train=20)


def block(start):
    """The block of docs/launching.md that begins with #!/bin/bash and holds a text."""
    text = (REPOSITORY / "docs" / "launching.md").read_text()
    blocks = re.findall(r"(?:^    .*\n|^\n)+", text, re.MULTILINE)
    (found,) = [each for each in blocks if each.lstrip().startswith("#!/bin/bash") and start in each]
    return re.sub(r"^    ", "", found.lstrip("\n"), flags=re.MULTILINE)


def row_file(folder, data):
    """row.sbatch with small settings, which writes to `folder`."""
    small, probe = (" ".join(map(str, [*options, "--batch-size", 4, "-j", 0])) for options in (SMALL, SMALL_PROBE))
    text = block("SLURM_ARRAY_TASK_ID")
    for pattern, value in (
        (r"^name=.*", f"name=row data={data} epochs={EPOCHS}"),
        (r"^pretrain=.*", f'pretrain="{small} -p 1"'),
        (r"^probe=.*", f'probe="{probe} --epochs 2"'),
        (r"^tests=.*", f'tests="--val {data} -j 0"'),
        (r"ckpts/", f"{folder}/"),
        (r"\$name\.json", f"{folder}/row.json"),
    ):
        text, count = re.subn(pattern, value, text, flags=re.MULTILINE)
        assert count, pattern
    (folder / "row.sbatch").write_text(text)
    return folder / "row.sbatch"


TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]


def until(told, seconds=240):
    """Wait until told() is true."""
    deadline = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.5)


def state(slurm, job):
    return slurm("squeue", "-h", "-o", "%T", "-j", job, check=False).stdout.strip()


def epochs(folder):
    return len(log(folder)) if (folder / "log.jsonl").exists() else 0


def steps():
    """The ids of the processes that hold steps of a job."""
    return subprocess.run(["pgrep", "slurmstepd"], capture_output=True, text=True).stdout.split()


def restart(slurm, job):
    """Let a job that was queued again begin now; Slurm would wait for two minutes."""
    until(lambda: state(slurm, job) == "PENDING")
    time.sleep(3)  # in the second in which a node revoked the job's credential, it would refuse the new one
    until(lambda: slurm("scontrol", "update", f"jobid={job}", "starttime=now", check=False).returncode == 0)
    slurm("scontrol", "release", job, check=False)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run of seed 1 that nothing disturbs, by torchrun."""
    folder = tmp_path_factory.mktemp("slurm-whole")
    options = [*SMALL, "-j", 0, "--epochs", EPOCHS, "--ckpt_path", folder, data]
    run_script(PRETRAIN, *options, launcher=[*TORCHRUN, "--nproc-per-node=2"])
    return folder


def assert_equal(folder, whole):
    kept = [record for record in log(folder) if "probe" not in record]
    assert kept == log(whole) and same(weights(folder / LATEST), weights(whole / LATEST))


def test_srun_without_torchrun_on_two_nodes(slurm, data, whole, tmp_path):
    command = [sys.executable, PRETRAIN, *SMALL, "-j", 0, "--batch-size", 4, "--epochs", EPOCHS]
    run = slurm("srun", "--nodes=2", "--ntasks=2", *command, "--ckpt_path", tmp_path, data)
    assert run.stdout.count("starting at epoch 0") == 1
    assert_equal(tmp_path, whole)


def test_the_file_of_a_row_from_submission_to_table(slurm, data, whole, tmp_path):
    """Disturbed by a warning of the time limit, a requeue and a node that is down; then submitted once more."""
    file = row_file(tmp_path, data)
    output = [f"--output={tmp_path}/%A-%a.log", "--chdir", REPOSITORY]

    def submit(*options, **variables):
        return slurm("sbatch", "--parsable", *options, *TWO_NODES, *output, file, **variables).stdout.strip()

    dry = submit("--wait", "--array=1", DRY="--dry-run")
    told = (tmp_path / f"{dry}-1.log").read_text()
    assert told.count("nothing was started") == 1 and re.search(r"processes +2,", told), told
    array = submit("--array=1")
    after = submit(f"--dependency=afterok:{array}")
    folder, job = tmp_path / "row-1", f"{array}_1"
    for disturb in (
        ["scancel", "--batch", "--signal=USR1", job],  # what --signal=B:USR1@120 lets Slurm send
        ["scontrol", "requeue", job],
        ["scontrol", "update", "nodename=n2", "state=down", "reason=test"],
    ):
        done = epochs(folder)
        until(lambda done=done: epochs(folder) >= done + 3)
        slurm(*disturb)
        if disturb[1] != "update":
            restart(slurm, job)
    assert "stopped by SIGUSR1" in (tmp_path / f"{array}-1.log").read_text()
    until(lambda: state(slurm, job) == "PENDING")
    slurm("scontrol", "update", "nodename=n2", "state=resume")
    until(lambda: not steps())  # a down node keeps its old step, which has the number of the new one
    restart(slurm, job)
    until(lambda: not state(slurm, after), seconds=400)
    assert_equal(folder, whole)
    table = next(tmp_path.glob(f"{after}-*.log")).read_text()
    assert re.search(r"^\| row +\|", table, re.MULTILINE), table
    again = submit("--wait", "--array=1")
    assert (tmp_path / f"{again}-1.log").read_text().count("already finished") == 2


def test_torchrun_on_two_nodes_saves_at_slurms_signal(slurm, data, tmp_path):
    text = block("srun torchrun")
    start, end = text.index("moco-non-sem-neg.py"), text.index("--save-steps")
    small = " ".join(map(str, [*SMALL, "-j", 0, "--epochs", 100000, "--ckpt_path", tmp_path / "run", "-p", 1]))
    text = text[:start] + f"{PRETRAIN} {small} --resume auto {data}\n" + text[end:].partition("\n")[2]
    text = text.replace("--nproc-per-node=2", "--nproc-per-node=1").replace("$first:", "127.0.0.1:")
    text = text.replace("torchrun ", f"{sys.executable} -m torch.distributed.run ")  # both nodes are this machine
    (tmp_path / "two.sbatch").write_text(text)
    output = [f"--output={tmp_path}/%j.log", "--chdir", REPOSITORY]
    job = slurm("sbatch", "--parsable", *TWO_NODES, *output, tmp_path / "two.sbatch").stdout.strip()
    until(lambda: epochs(tmp_path / "run") >= 2)
    slurm("scancel", "--signal=USR1", job)  # to the steps, as --signal=USR1@120
    until(lambda: not state(slurm, job))
    assert "stopped by SIGUSR1" in (tmp_path / f"{job}.log").read_text()
