"""Where this process stands, from the variables of SLURM, torchrun or submitit. Without torch and its seconds, for the
checks before a job."""

import re
import socket
from collections.abc import Mapping

from megaboat.errors import BadInput

# SLURM_STEP_ID of what is no step of srun: batch scripts, interactive shells, containers.
FIRST_SPECIAL_STEP = 4294967290
BATCH_STEP = "4294967291"
FIRST_PORT, PORTS = 20000, 12000


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: nothing where torchrun has set them, else from the
    variables of a SLURM step or of submitit's local executor, else those of a lone process.

    Raises BadInput where SLURM has laid the tasks out in a way that cannot work.
    """
    if "RANK" in variables:
        return {}
    if "SUBMITIT_LOCAL_NTASKS" in variables:
        return _submitit_local(variables)
    if int(variables.get("SLURM_STEP_ID", BATCH_STEP)) < FIRST_SPECIAL_STEP:
        return _slurm_step(variables)
    tasks = int(variables.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" in variables and "SLURM_STEP_ID" not in variables and tasks > 1:
        raise BadInput(f"started by the batch script of a SLURM job of {tasks} tasks: put srun in front of the command")
    free_port()  # for what it refuses
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # nobody else must know it; one that was free a moment ago may be another's by then
    }


def _slurm_step(variables: Mapping[str, str]) -> dict[str, str]:
    """One task of `srun` is one rank. SLURM_JOB_* would be wrong in a step on some of a job's nodes."""
    nodes = variables["SLURM_STEP_NODELIST"]
    node, rank = int(variables["SLURM_NODEID"]), int(variables["SLURM_PROCID"])
    local_rank = int(variables["SLURM_LOCALID"])
    sizes = tasks_per_node(variables["SLURM_STEP_TASKS_PER_NODE"])
    if rank != sum(sizes[:node]) + local_rank:
        raise BadInput(f"task {rank} is number {local_rank} of node {node}: start srun with --distribution=block")
    job, step = int(variables["SLURM_JOB_ID"]), int(variables["SLURM_STEP_ID"])
    attempt = int(variables.get("SLURM_RESTART_COUNT", "0"))
    return {
        "RANK": str(rank),
        "WORLD_SIZE": variables["SLURM_NTASKS"],
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(sizes[node]),
        "MASTER_ADDR": first_node(nodes),
        "MASTER_PORT": str(job_port(job, attempt, step)),
    }


def _submitit_local(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": variables["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": variables["SUBMITIT_LOCAL_NTASKS"],
        "LOCAL_RANK": variables["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": variables["SUBMITIT_LOCAL_NTASKS"],
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job_port(int(variables["SUBMITIT_LOCAL_JOB_ID"]), 0, 0)),
    }


def first_node(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu-a03` of `gpu-a[03-07,9],gpu-b1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise BadInput(f"SLURM's node list {nodes!r} names no host")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def tasks_per_node(text: str) -> list[int]:
    """[8, 8, 4] of SLURM's `8(x2),4`."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts if part is not None for _ in range(int(part[2] or 1))]


def job_port(job: int, attempt: int, step: int) -> int:
    """A port for the ranks of one attempt, below the ports that the kernel hands out (from 32768). Neighbouring jobs
    and attempts get others: ranks of a lost attempt must not meet those of the next."""
    return FIRST_PORT + (job * 101 + attempt * 13 + step) % PORTS


def attempt_name(variables: Mapping[str, str]) -> str:
    """Which try of which job this is, the same on all its ranks and greater in each later try of the same job."""
    if "RANK" not in variables or "SLURM_STEP_ID" not in variables:
        return ""
    parts = (variables["SLURM_JOB_ID"], variables.get("SLURM_RESTART_COUNT", "0"), variables["SLURM_STEP_ID"])
    return ".".join(parts)


def free_port() -> int:
    """A TCP port that nobody listens on at the moment.

    Raises BadInput where this machine cannot even reach itself: torch would try for half an hour.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        try:
            socket.create_connection(probe.getsockname(), timeout=10).close()
        except OSError as error:
            raise BadInput(
                f"127.0.0.1 cannot be reached ({error.strerror}), and ranks talk through it: ip link set lo up"
            ) from None
        return probe.getsockname()[1]


def gpu_of(local_rank: int, local_size: int, visible: int) -> int:
    """The index of a rank's GPU: its local rank, or 0 where the scheduler shows each rank only its own."""
    if visible == 1:
        return 0
    if local_size > visible:
        raise BadInput(f"{local_size} ranks on this node, but {visible} GPUs: start one rank a GPU")
    return local_rank
