"""Which process of how many this is, and how the processes find each other."""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megaboat.errors import BadInput

# SLURM_STEP_ID of what is no step of srun: batch scripts, interactive shells, containers.
FIRST_SPECIAL_STEP = 4294967290
BATCH_STEP = "4294967291"
FIRST_PORT, PORTS = 20000, 12000

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all, and its place in the mesh of data x sequence x tensor, the last one innermost.

    The ranks of a tensor group hold one copy of the model together, read the same data and draw the same dropout.
    The copies of a sequence group read the same rows, each its own piece of them. Before `in_mesh` every rank is a copy
    of its own.
    """

    rank: int
    size: int
    device: torch.device
    tensor: int = 1
    """How many ranks hold one copy of the model."""
    sequence: int = 1
    """How many copies share a row."""
    tensor_group: dist.ProcessGroup | None = None
    """This rank's copy of the model; None: it holds a whole one."""
    sequence_group: dist.ProcessGroup | None = None
    """The ranks that hold the same part of the model and other pieces of the same rows; None: this one alone."""
    replica_group: dist.ProcessGroup | None = None
    """The ranks that hold the same part as this one; None: all ranks."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Which copy of the model this rank belongs to."""
        return self.rank // self.tensor

    @property
    def replicas(self) -> int:
        return self.size // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def sequence_rank(self) -> int:
        return self.replica % self.sequence

    @property
    def data_rank(self) -> int:
        """Which rows this rank reads, of `data_size` shares."""
        return self.replica // self.sequence

    @property
    def data_size(self) -> int:
        return self.replicas // self.sequence

    def in_mesh(self, tensor: int, sequence: int = 1) -> "Ranks":
        """This rank in groups of `tensor` neighbours, and of `sequence` neighbouring copies. Once connected."""
        mesh = torch.arange(self.size).view(-1, sequence, tensor)
        return replace(
            self,
            tensor=tensor,
            sequence=sequence,
            tensor_group=_my_group(mesh.flatten(0, 1)) if tensor > 1 else None,
            sequence_group=_my_group(mesh.transpose(1, 2).flatten(0, 1)) if sequence > 1 else None,
            replica_group=_my_group(mesh.flatten(0, 1).T) if tensor > 1 else None,
        )

    def sum(self, values: Tensor) -> Tensor:
        """The sum over replicas, in place."""
        if self.replicas > 1:
            dist.all_reduce(values, group=self.replica_group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The tensors of all ranks (equal shapes), concatenated in the order of ranks; a tensor group's repeat."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def gather_objects(self, value: T) -> list[T]:
        """What each rank passes, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, action: Callable[[], T]) -> T | None:
        """What `action` returns on rank 0, None on the others; where it raises, all ranks raise."""
        result, failure = None, None
        if self.is_first:
            try:
                result = action()
            except Exception as error:
                failure = error
        failure = self.gather_objects(failure)[0]
        if failure is not None:
            raise failure
        return result

    def broadcast(self, values: Tensor) -> None:
        """Rank 0's values to all ranks, in place."""
        if self.size > 1:
            dist.broadcast(values, src=0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def _my_group(groups: Tensor) -> dist.ProcessGroup:
    """Make a process group of each line of ranks; every rank takes part. Returns this rank's."""
    return dist.new_subgroups_by_enumeration(groups.tolist())[0]


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
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
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


def this_process() -> Ranks:
    """Read the environment and choose the device: the local rank's GPU, or the CPU."""
    os.environ.update(environment(os.environ))
    if not torch.cuda.is_available():
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    local_rank, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    device = torch.device("cuda", gpu_of(local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), visible))
    torch.cuda.set_device(device)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


def be_deterministic() -> None:
    """Only kernels that give the same bits each time, in torch and, as ours ask torch, in our own; an operation that
    has none raises RuntimeError when it is met."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def gpu_of(local_rank: int, local_size: int, visible: int) -> int:
    """The index of a rank's GPU: its local rank, or 0 where the scheduler shows each rank only its own."""
    if visible == 1:
        return 0
    if local_size > visible:
        raise BadInput(f"{local_size} ranks on this node, but {visible} GPUs: start one rank a GPU")
    return local_rank
