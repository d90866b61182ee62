"""SLURM's, submitit's and torchrun's variables, and what becomes of them."""

import pytest

from megaboat.engine.places import attempt_name, environment, first_node, gpu_of, job_port, tasks_per_node
from megaboat.errors import BadInput

STEP = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "mb[2,4]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "mb[1-4]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
}


def test_a_task_of_srun() -> None:
    assert environment(STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "mb2",
        "MASTER_PORT": str(job_port(71, 0, 2)),
    }


def test_a_requeued_job_meets_at_another_port() -> None:
    again = environment(STEP | {"SLURM_RESTART_COUNT": "1"})
    assert again["MASTER_PORT"] != environment(STEP)["MASTER_PORT"]
    ports = {job_port(job, attempt, step) for job in range(50) for attempt in range(5) for step in range(5)}
    assert min(ports) >= 20000
    assert max(ports) < 32768, "the kernel hands out higher ports by itself"


def test_torchrun_has_the_last_word() -> None:
    assert environment(STEP | {"RANK": "0"}) == {}


def test_cyclic_tasks_are_refused() -> None:
    with pytest.raises(BadInput, match="--distribution=block"):
        environment(STEP | {"SLURM_PROCID": "2"})


def test_the_batch_script_without_srun_is_refused() -> None:
    batch = {"SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    with pytest.raises(BadInput, match="put srun in front"):
        environment(batch)
    assert environment(batch | {"SLURM_NTASKS": "1"})["WORLD_SIZE"] == "1"


def test_an_interactive_shell_is_a_lone_process() -> None:
    shell = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert environment(shell)["WORLD_SIZE"] == "1"


def test_submitit_without_slurm() -> None:
    local = {
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_LOCALID": "1",
        "SUBMITIT_LOCAL_JOB_ID": "4711",
    }
    assert environment(local)["RANK"] == "1"
    assert environment(local)["MASTER_PORT"] == environment(local | {"SUBMITIT_LOCAL_GLOBALID": "0"})["MASTER_PORT"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("a1,b2", "a1"),
        ("mb[1-2]", "mb1"),
        ("mb[2,4],c", "mb2"),
        ("gpu-a[03-07,9],gpu-b1", "gpu-a03"),
        ("rack[01-02]-n[3,5].example.org", "rack01-n3.example.org"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_tasks_per_node() -> None:
    assert tasks_per_node("8(x2),4") == [8, 8, 4]


def test_attempts_are_told_apart() -> None:
    variables = STEP | environment(STEP)
    assert attempt_name(variables) == "71.0.2"
    assert attempt_name(variables | {"SLURM_RESTART_COUNT": "3"}) == "71.3.2"
    assert attempt_name({"RANK": "0"}) == ""


def test_gpu_of_a_rank() -> None:
    assert gpu_of(3, 4, 8) == 3
    assert gpu_of(3, 4, 1) == 0, "each rank sees only its own"
    with pytest.raises(BadInput, match="4 ranks on this node, but 2 GPUs"):
        gpu_of(3, 4, 2)
