"""Ways to start several processes: the same run whichever launcher starts them."""

import os
from pathlib import Path

import pytest
from helpers import (
    FAULTS,
    PRETRAIN,
    SMALL,
    TORCHRUN,
    children,
    ended,
    free_port,
    log,
    run_script,
    same,
    started,
    wait_for,
    weights,
)

LATEST = "checkpoint_latest.pth.tar"


def srun(rank, port):
    return {
        "SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank), "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1",
    }  # fmt: skip


def operator(rank, port):
    return {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip


@pytest.mark.slow
def test_every_launcher_gives_the_same_run(shared_data, tmp_path):
    command = lambda name: [PRETRAIN, *SMALL, "--epochs", 1, "--ckpt_path", tmp_path / name, shared_data]  # noqa: E731
    for name, module in ("torchrun", "torch.distributed.run"), ("launch", "torch.distributed.launch"):
        launcher = ["-m", module, "--nproc-per-node=2", f"--master-port={free_port()}"]
        run_script(*command(name), launcher=launcher)
        again = run_script(*command(name), "--resume", "auto", launcher=launcher)
        assert again.stdout.count("already finished") == 1  # and torchrun ends with 0
    for variables in (srun, operator):
        port = free_port()
        ranks = [started(*command(variables.__name__), env=variables(rank, port)) for rank in range(2)]
        assert [code for code, _, _ in map(ended, ranks)] == [0, 0]
    options = ["--world-size", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}", "-b", 4]
    nodes = [
        started(*command("nodes"), *options, "--rank", rank, *["--multiprocessing-distributed"] * rank)
        for rank in (0, 1)
    ]
    assert [code for code, _, _ in map(ended, nodes)] == [0, 0]
    for name in ("launch", "srun", "operator", "nodes"):
        assert log(tmp_path / name) == log(tmp_path / "torchrun")
        assert same(weights(tmp_path / name / LATEST), weights(tmp_path / "torchrun" / LATEST))


def test_one_process_per_gpu_is_one_on_a_cpu_and_the_run_of_one_process(shared_data, tmp_path):
    for name, options in ("alone", []), ("spawned", ["--multiprocessing-distributed", "--world-size", 1, "--rank", 0]):
        run = run_script(PRETRAIN, *SMALL, "--epochs", 1, *options, "--ckpt_path", tmp_path / name, shared_data)
    assert "no GPU found: running one CPU process (gloo)" in run.stdout
    assert log(tmp_path / "alone") == log(tmp_path / "spawned")


def listening(pid):
    """The addresses, in hexadecimal, on which a process and its children listen."""
    found = set()
    for process in [pid, *children(pid)]:
        sockets = {os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()}
        for table in "tcp", "tcp6":
            lines = map(str.split, Path(f"/proc/{process}/net/{table}").read_text().splitlines())
            found |= {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}
    return found


def test_a_single_node_listens_on_the_loopback_alone(shared_data, tmp_path):
    command = [PRETRAIN, *SMALL, "--epochs", 1000, "--multiprocessing-distributed", "--ckpt_path", tmp_path / "run"]
    process = started(FAULTS, "two GPUs", *command, shared_data)
    wait_for(process, "epoch 1 ")
    (server,) = filter(children, children(process.pid))
    found = listening(process.pid) | listening(server)
    process.terminate()
    ended(process)
    assert found == {"0100007F"}  # 127.0.0.1, of gloo


def test_a_process_per_gpu_is_the_run_of_torchrun(shared_data, tmp_path):
    command = lambda name: [PRETRAIN, *SMALL, "--epochs", 1, "--ckpt_path", tmp_path / name, shared_data]  # noqa: E731
    run_script(*command("torchrun"), launcher=[*TORCHRUN, "--nproc-per-node=2"])
    run_script(FAULTS, "two GPUs", *command("spawned"), "--multiprocessing-distributed")
    assert log(tmp_path / "torchrun") == log(tmp_path / "spawned")
    assert same(weights(tmp_path / "torchrun" / LATEST), weights(tmp_path / "spawned" / LATEST))
