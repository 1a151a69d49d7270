from types import SimpleNamespace

import pytest
from helpers import TORCHRUN_RANK

from moco.processes import environment

SLURM_STEP = {  # what srun sets for the third of four tasks on two nodes
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
ONE_NODE = {**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "gpu03"}
OPERATOR = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"}
BY_RANK, SRUN = "RANK and WORLD_SIZE", "srun"

pytestmark = pytest.mark.usefixtures("no_launcher")


def without(variables, missing):
    return {name: value for name, value in variables.items() if name != missing}


@pytest.mark.parametrize(
    "variables, wanted",
    [
        (SLURM_STEP, (SRUN, 2, 4, 0, 2, "gpu03")),
        ({**SLURM_STEP, "MASTER_ADDR": "10.0.0.9"}, (SRUN, 2, 4, 0, 2, "10.0.0.9")),
        ({**SLURM_STEP, "SLURM_STEP_NODELIST": "a-1,gpu[03-04]"}, (SRUN, 2, 4, 0, 2, "a-1")),
        ({**SLURM_STEP, "SLURM_STEP_NODELIST": "n[7,9-10]-x,gpu1"}, (SRUN, 2, 4, 0, 2, "n7-x")),
        ({**SLURM_STEP, "SLURM_STEP_NODELIST": "rack[0-1]node[0-3]"}, (SRUN, 2, 4, 0, 2, "rack0node0")),
        (ONE_NODE, (SRUN, 2, 4, 0, 4, "127.0.0.1")),
        (OPERATOR, (BY_RANK, 1, 2, 0, 1, "10.0.0.1", 23456)),
        ({**OPERATOR, "SLURM_STEP_TASKS_PER_NODE": ""}, (BY_RANK, 1, 2, 0, 1, "10.0.0.1", 23456)),
        ({**OPERATOR, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (BY_RANK, 1, 2, 1, 2, "10.0.0.1", 23456)),
        ({**SLURM_STEP, **OPERATOR}, (BY_RANK, 1, 2, 0, 2, "10.0.0.1", 23456)),
        ({**SLURM_STEP, **TORCHRUN_RANK}, ("torchrun", 0, 1, 0, 1)),  # srun torchrun
    ],
)
def test_a_launchers_variables_give_the_rank(under, variables, wanted):
    under(variables)
    assert tuple(environment.launched())[: len(wanted)] == wanted


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
        {**SLURM_STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)},  # an interactive shell
        {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**OPERATOR, "WORLD_SIZE": "1", "RANK": "0"},
        {"RANK": "3", "LOCAL_RANK": "x", "TORCHELASTIC_RUN_ID": "3"},  # left over
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {**SLURM_STEP, "SLURM_PTY_PORT": "4711"},  # typed into the shell of `srun --pty`
    ],
)
def test_a_single_process_is_alone(under, variables):
    under(variables)
    assert environment.launched() is None and environment.is_local_main() and environment.is_main()


@pytest.mark.parametrize(
    "variables, message",
    [
        (without(OPERATOR, "MASTER_PORT"), "MASTER_PORT"),
        ({**OPERATOR, "RANK": "2"}, "rank 2 of 2"),
        ({**OPERATOR, "RANK": "first"}, "RANK=first"),
        ({**OPERATOR, "LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE=nothing"),  # on all ranks alike
        ({**TORCHRUN_RANK, "RANK": "1"}, "torchrun: rank 1 of 1"),
        ({"FLUX_JOB_SIZE": "4"}, "started 4 processes without RANK"),
        ({**OPERATOR, "SLURM_LOCALID": "1"}, "1 of 1 on this node"),
        ({**OPERATOR, "SLURM_STEP_TASKS_PER_NODE": "2,1"}, "2,1"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun .or alike. started 4 .* use torchrun or srun"),
        ({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "2,1"}, "2,1: start equally many per node"),
        (without(SLURM_STEP, "SLURM_LOCALID"), "SLURM_LOCALID"),
    ],
)
def test_variables_that_do_not_fit_are_refused(under, variables, message):
    under(variables)
    with pytest.raises(ValueError, match=message):
        environment.launched()
    assert environment.is_local_main()  # each reports it


def test_one_process_of_a_node_and_one_of_a_run_are_first(under, monkeypatch):
    assert [environment.is_main(SimpleNamespace(rank=rank)) for rank in (-1, 0, 1)] == [True, True, False]
    under({**TORCHRUN_RANK, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert environment.is_local_main() and not environment.is_main()
    under({"RANK": "3", "LOCAL_RANK": "1"})
    assert not environment.is_local_main()
    monkeypatch.setattr(environment, "spawned_rank", 1)
    monkeypatch.delenv("RANK")
    assert not environment.is_local_main() and not environment.is_main()


def test_only_torchruns_second_attempt_is_a_restart(under):
    under({"TORCHELASTIC_RESTART_COUNT": "1"})
    assert not environment.restarted()
    under(TORCHRUN_RANK)
    assert environment.restarted()
    under({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert not environment.restarted()


@pytest.mark.parametrize(
    "quota, cores", [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("", 4), (None, 4)]
)
def test_cores_are_those_of_the_affinity_and_of_the_containers_quota(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(environment, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: range(4), raising=False)
    if quota is not None:
        environment.CPU_MAX.write_text(quota)
    assert environment.usable_cores() == cores
