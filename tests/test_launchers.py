"""Launchers other than torchrun: srun, operators that set RANK and WORLD_SIZE, mpirun, torch.distributed.launch."""

import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, PRETRAIN, REPOSITORY, SMALL, TORCHRUN_RANK, log, run_script

from moco.errors import UsageError
from moco.processes import environment, launch

SLURM_STEP = {  # what srun sets for the third of four tasks on two nodes
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
OPERATOR = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ENVIRONMENT:
        if name.startswith(("SLURM_", "OMPI_", "PMI_")) or name in {*TORCHRUN_RANK, *OPERATOR}:
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def under(monkeypatch):
    """Sets variables; None removes one."""

    def set_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)

    return set_variables


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    "variables, wanted",
    [
        (SLURM_STEP, ("srun", 2, 4, 0, 2, "gpu03")),
        ({**SLURM_STEP, "MASTER_ADDR": "10.0.0.9"}, ("srun", 2, 4, 0, 2, "10.0.0.9")),
        ({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}, ("srun", 2, 4, 0, 4, "127.0.0.1")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, ("srun", 0, 2, 0, 2, "127.0.0.1")),
        (OPERATOR, ("RANK and WORLD_SIZE", 1, 2, 0, 1, "10.0.0.1")),
        ({**OPERATOR, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ("RANK and WORLD_SIZE", 1, 2, 1, 2, "10.0.0.1")),
        ({**SLURM_STEP, **OPERATOR}, ("RANK and WORLD_SIZE", 1, 2, 0, 2, "10.0.0.1")),
        ({**SLURM_STEP, **TORCHRUN_RANK}, ("torchrun", 0, 1, 0, 1, TORCHRUN_RANK.get("MASTER_ADDR", ""))),
    ],
)
def test_a_launchers_variables_give_the_rank(under, variables, wanted):
    under(variables)
    assert tuple(environment.launched())[:6] == wanted


def test_all_tasks_of_a_step_find_the_same_port(under):
    ports = []
    for step in ("3", "3", "4"):
        under({**SLURM_STEP, "SLURM_STEP_ID": step})
        ports.append(environment.launched().port)
    assert ports[0] == ports[1] != ports[2] and all(15000 <= port < 30000 for port in ports)
    under({"MASTER_PORT": "4711"})
    assert environment.launched().port == 4711


@pytest.mark.parametrize(
    "variables",
    [
        {**without(SLURM_STEP, "SLURM_STEP_ID"), "SLURM_PROCID": "0"},  # a batch script
        {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**OPERATOR, "WORLD_SIZE": "1", "RANK": "0"},
        {"RANK": "3"},
        {"WORLD_SIZE": "3"},
        {"LOCAL_RANK": "x"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_single_process_is_alone(under, variables):
    under(variables)
    assert environment.launched() is None and environment.is_local_main()
    assert launch.resolve_world_size() == (1, 1)


@pytest.mark.parametrize(
    "variables, message",
    [
        (without(OPERATOR, "MASTER_ADDR"), "MASTER_ADDR"),
        (without(OPERATOR, "MASTER_ADDR", "MASTER_PORT"), "MASTER_ADDR and MASTER_PORT"),
        ({**OPERATOR, "RANK": "2"}, "rank 2 of 2"),
        ({**OPERATOR, "RANK": "first"}, "RANK=first"),
        ({**OPERATOR, "LOCAL_RANK": "1"}, "LOCAL_WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4"),
        ({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "many"}, "many"),
        ({**SLURM_STEP, "SLURM_NODEID": "7"}, "SLURM_NODEID=7"),
    ],
)
def test_variables_that_do_not_fit_are_refused(under, variables, message):
    under(variables)
    with pytest.raises(UsageError, match=message):
        launch.resolve_world_size()


@pytest.mark.parametrize("variables", [SLURM_STEP, OPERATOR])
@pytest.mark.parametrize(
    "options",
    [
        {"multiprocessing": True},
        {"multiprocessing": True, "world_size": 1, "rank": 0},
        {"world_size": 1},
        {"world_size": 2, "rank": 0, "dist_url": "tcp://10.0.0.1:1"},
    ],
)
def test_options_that_make_each_task_a_run_are_refused(under, variables, options):
    under(variables)
    with pytest.raises(UsageError, match="contradicts"):
        launch.resolve_world_size(**options)


def test_one_task_per_node_may_start_the_nodes_processes(under, monkeypatch):
    under({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"})
    monkeypatch.setattr(launch, "usable_gpus", lambda: 8)
    options = {"multiprocessing": True, "world_size": 2, "rank": 1, "dist_url": "tcp://gpu03:1"}
    assert launch.resolve_world_size(**options) == (8, 16)
    under({**without(OPERATOR, "RANK"), "RANK": "1"})
    assert launch.resolve_world_size(multiprocessing=True, dist_url="env://") == (8, 16)


def test_env_url_takes_the_address_from_the_environment(under):
    with pytest.raises(UsageError, match="WORLD_SIZE and RANK and MASTER_ADDR and MASTER_PORT"):
        launch.resolve_world_size(dist_url="env://")
    under({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert launch.resolve_world_size(dist_url="env://", world_size=2, rank=1) == (1, 2)
    assert launch._from_env(2, 1, "env://") == (2, 1, "tcp://10.0.0.1:29500")
    under({"MASTER_ADDR": "fd00::1"})
    assert launch.host_and_port(launch._from_env(2, 1, "env://")[2]) == ("fd00::1", 29500)


def test_more_tasks_than_gpus_are_refused(under, monkeypatch):
    under({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x1)", "SLURM_NODEID": "0"})
    monkeypatch.setattr(launch, "usable_gpus", lambda: 2)
    with pytest.raises(UsageError, match="srun: 4 processes on this node, which has 2 GPUs"):
        launch.resolve_world_size()
    monkeypatch.setattr(launch, "usable_gpus", lambda: 1)  # each task sees its own
    assert launch.resolve_world_size() == (4, 4)


@pytest.mark.parametrize(
    "nodes, host", [("n1", "n1"), ("n1,m[2-3]", "n1"), ("a-b[009-012,20]", "a-b009"), ("r[1-2]c.lan", "r1c.lan")]
)
def test_the_first_host_of_a_slurm_list(nodes, host):
    assert environment.first_host(nodes) == host


def test_slurms_task_counts():
    assert environment.tasks_per_node("2(x3),1") == [2, 2, 2, 1]


# Real runs of two processes: the same log whichever way they were started

RUN = (*SMALL, "--seed", 3, "--epochs", 1)


def run_two(data, folder, variables, *options):
    """Start PRETRAIN twice, the i-th with variables(i)."""
    command = [sys.executable, REPOSITORY / PRETRAIN, *RUN, *options, "--ckpt_path", folder, data]
    processes = [
        subprocess.Popen(
            list(map(str, command)), env={**ENVIRONMENT, **variables(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return log(folder)


@pytest.mark.slow
def test_every_launcher_gives_torchruns_run(shared_data, tmp_path):
    port = launch.free_port()
    launchers = {
        "srun": lambda rank: {
            "SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1",
        },
        "operator": lambda rank: {
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        },
    }  # fmt: skip
    logs = {name: run_two(shared_data, tmp_path / name, variables) for name, variables in launchers.items()}
    for name, module in ("torchrun", "torch.distributed.run"), ("launch", "torch.distributed.launch"):
        launcher = [sys.executable, "-m", module, "--nproc-per-node=2", f"--master-port={launch.free_port()}"]
        command = [*launcher, REPOSITORY / PRETRAIN, *RUN, "--ckpt_path", tmp_path / name, shared_data]
        subprocess.run(list(map(str, command)), env=ENVIRONMENT, check=True, capture_output=True, timeout=120)
        logs[name] = log(tmp_path / name)
    assert logs["torchrun"] and all(found == logs["torchrun"] for found in logs.values()), logs


def test_mpirun_without_ranks_is_refused_by_the_script(shared_data):
    run = run_script(PRETRAIN, *SMALL, shared_data, env={"OMPI_COMM_WORLD_SIZE": "2"}, check=False)
    assert run.returncode == 2 and "mpirun started 2 processes" in run.stderr and run.stderr.count("\n") == 1
